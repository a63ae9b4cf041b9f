"""What one device may ask of a gateway, and the books that are kept of it. Every book is bounded."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Mapping
from typing import Final

from fedloop_events.types import ClientSeen
from msgspec import Struct

_BOOKS: Final = 100_000
"""Clients of whom a rate is known; the one that was silent for longest gives way, and by then its bucket is full again."""


class Limits(Struct, frozen=True, kw_only=True):
    """Of one device, unless it says otherwise. The deployment's own key is bound by the sizes alone.

    `body_bytes`, `batch_events` and `batch_blobs` (which they name) are of one append, `page_events` of one answer,
    `header_bytes` of all header lines,
    `target_bytes` of path and query; `depth` is of nested arrays and objects. `requests_per_s` refills a bucket that holds
    `burst`, `events_per_s` one of `events_burst` new events for each kind but heartbeats, which have their own.

    For each of its newest `open_instructions` that it has not answered, a device sends `uploads` blobs, and in all `upload_bytes`
    within `window_s`. A signature may be `skew_s` ahead of the gateway's clock and lasts at most `valid_s`; meanwhile `nonces` of
    them are remembered. `polls` requests may wait at once.

    Of one address `connections_each` are held, of all `connections`, and idle ones give way to new ones.

    Of the whole gateway: `strangers_per_s` and `strangers_burst` (by address, of who is not enrolled), `bodies_bytes` (requests
    being read), `queued_events` (appends that wait for the log), `ring_events` and `ring_bytes` (the newest events, in memory).
    """

    body_bytes: int = 16 << 20
    batch_events: int = 2_000
    batch_blobs: int = 500
    enrolment_bytes: int = 16_384
    blob_bytes: int = 1 << 30
    page_events: int = 500
    header_bytes: int = 8_192
    target_bytes: int = 4_096
    depth: int = 32
    body_timeout_s: float = 60.0
    slowest_bytes_per_s: int = 16_384
    requests_per_s: float = 50.0
    burst: float = 200.0
    events_per_s: float = 20.0
    events_burst: float = 5_000.0
    heartbeats_per_s: float = 0.5
    heartbeats_burst: float = 200.0
    polls: int = 4
    longest_wait_s: float = 30.0
    longest_stream_s: float = 600.0
    open_instructions: int = 16
    uploads: int = 2
    upload_bytes: int = 4 << 30
    window_s: float = 3_600.0
    skew_s: float = 30.0
    valid_s: float = 120.0
    nonces: int = 20_000
    all_nonces: int = 1_000_000
    strangers_per_s: float = 50.0
    strangers_burst: float = 500.0
    connections: int = 4_096
    connections_each: int = 512
    bodies_bytes: int = 256 << 20
    queued_events: int = 20_000
    group_events: int = 5_000
    ring_events: int = 50_000
    ring_bytes: int = 64 << 20
    scan_events: int = 5_000


class Buckets:
    """Token buckets by name: `per_s` tokens a second, at most `burst`."""

    def __init__(self, per_s: float, burst: float) -> None:
        self._per_s, self._burst = per_s, burst
        self._books: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def wait_s(self, name: str, now: float, amount: int = 1) -> float:
        """In how many seconds there are so many tokens, or, if the bucket holds no more, it is full; 0.0 if there are now."""
        return max(0.0, (min(amount, self._burst) - self._held(name, now)) / self._per_s)

    def take(self, name: str, now: float, amount: int = 1) -> float:
        """`wait_s`; if that is 0.0, the tokens are taken, and where it was more than the bucket holds, they are owed."""
        wait_s, held = self.wait_s(name, now, amount), self._held(name, now)
        self._books.pop(name, None)
        self._books[name] = (held if wait_s else held - amount, now)
        if len(self._books) > _BOOKS:
            self._books.popitem(last=False)
        return wait_s

    def _held(self, name: str, now: float) -> float:
        held, since = self._books.get(name, (self._burst, now))
        return min(self._burst, held + (now - since) * self._per_s)


class EventRates:
    """How fast each client appends new events of each kind. None takes anything from another."""

    def __init__(self, limits: Limits) -> None:
        self._heartbeats = Buckets(limits.heartbeats_per_s, limits.heartbeats_burst)
        self._others = Buckets(limits.events_per_s, limits.events_burst)

    def take(self, client_id: str, kinds: Mapping[str, int], now: float) -> float:
        """0.0 if so many events of each type are granted, otherwise in how many seconds to ask again."""
        asked = [
            (self._heartbeats if kind == ClientSeen.type_name else self._others, f"{client_id} {kind}", amount)
            for kind, amount in kinds.items()
        ]
        wait_s = max((bucket.wait_s(name, now, amount) for bucket, name, amount in asked), default=0.0)
        if not wait_s:
            for bucket, name, amount in asked:
                bucket.take(name, now, amount)
        return wait_s


class Quota:
    """How much each name has used within the present window of `window_s`, out of `most`."""

    def __init__(self, most: int, window_s: float) -> None:
        self._most, self._window_s = most, window_s
        self._used: defaultdict[str, int] = defaultdict(int)
        self._window = -1

    def take(self, name: str, amount: int, now: float) -> float:
        """0.0 if `amount` is granted, otherwise in how many seconds the next window begins."""
        window = int(now // self._window_s)
        if window != self._window:
            self._window = window
            self._used.clear()
        if self._used[name] + amount > self._most:
            return (window + 1) * self._window_s - now
        self._used[name] += amount
        return 0.0


class Nonces:
    """The nonces that were used, each until it expires: none is forgotten while its signature is valid.

    At most `each` of one name and `total` of all: who has used up its share is refused until some have expired.
    """

    def __init__(self, each: int, total: int) -> None:
        self._each, self._total = each, total
        self._seen: set[tuple[str, str]] = set()
        self._count: defaultdict[str, int] = defaultdict(int)
        self._by_second: dict[int, list[tuple[str, str]]] = {}
        self._swept = 0

    def __len__(self) -> int:
        return len(self._seen)

    def seen(self, name: str, nonce: str) -> bool:
        return (name, nonce) in self._seen

    def full(self, name: str, now: float, *, bounded: bool = True) -> bool:
        """Whether no more can be remembered of this name, or, unless it is `bounded`, of anybody."""
        self._sweep(int(now))
        return (bounded and self._count.get(name, 0) >= self._each) or len(self._seen) >= self._total

    def add(self, name: str, nonce: str, expires: int) -> None:
        one = (name, nonce)
        self._seen.add(one)
        self._count[name] += 1
        self._by_second.setdefault(expires, []).append(one)

    def _sweep(self, now: int) -> None:
        if now == self._swept:
            return
        self._swept = now
        for second in [each for each in self._by_second if each < now]:
            for one in self._by_second.pop(second):
                self._seen.discard(one)
                self._count[one[0]] -= 1
                if not self._count[one[0]]:
                    del self._count[one[0]]
