"""What a device counts of its use, and publishes once an interval: how often it answered and how fast, never what.

An answer is kept and counted in one transaction, and counts are published in one, so that a crash counts nothing twice and loses
nothing.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, Final, Literal

from fedloop_events import sketch, types

from fedloop_clients.enrolment import Identity
from fedloop_clients.outbox import Outbox
from fedloop_clients.store import Store

KEPT_MS: Final = 90 * 24 * 3600 * 1000
"""Counts of a device that publishes nothing for longer than the log keeps feedback are forgotten."""
_MAX_NAMES: Final = 64
_OTHER: Final = "other"

_Kind = Literal["answer", "latency", "signal", "masked"]


class Timed:
    """How long an answer has taken: until it was written, or, as long as it is not, until now."""

    def __init__(self) -> None:
        self._begun_s = time.monotonic()
        self._took_s: float | None = None

    def written(self) -> None:
        self._took_s = self.seconds

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._begun_s if self._took_s is None else self._took_s


class Usage:
    """The counts of one store, by interval, use case and release. Intervals are of `every_s` seconds of the device's wall clock,
    which `clock` gives; None: nothing is counted."""

    def __init__(self, store: Store, use_case: str, every_s: float | None, clock: Callable[[], float]) -> None:
        self._store, self._use_case, self._clock = store, use_case, clock
        self._every_ms = None if every_s is None else round(every_s * 1000)

    @contextmanager
    def answered(self, release: str, took_s: float | None, masked: Mapping[str, int] | None = None) -> Iterator[None]:
        """Count an answer with what is kept of it in the block, in one transaction: both, or neither.

        `took_s` is how long it took, if that is known; `masked` what the masker found in its prompt, by type.
        """
        with self._store.transaction() as db:
            yield
            self._count(db, release, "answer")
            if took_s is not None:
                self._count(db, release, "latency", str(sketch.bin_of(took_s)))
            for kind, count in (masked or {}).items():
                self._count(db, release, "masked", kind, count)

    def masked(self, owner: str, found: Mapping[str, int]) -> None:
        """Count what the masker found in a text of a response, or of feedback: `owner` is its id."""
        with self._store.transaction() as db:
            for (release,) in db.execute(_RELEASE_OF, (owner, owner)).fetchall():
                for kind, count in found.items():
                    self._count(db, release, "masked", kind, count)

    def signalled(self, release: str, signal: str) -> None:
        """Count a signal that is published."""
        with self._store.transaction() as db:
            self._count(db, release, "signal", signal)

    def summarise(self, outbox: Outbox, identity: Identity) -> int:
        """Put a summary of each interval that is over into the outbox, in place of its counts; how many those are.

        It is due between one and ten sixtieths of the interval after its end, at a time of the device's own, so that not all
        devices' come at once.
        """
        drawn = int.from_bytes(hashlib.sha256(identity.client_id.encode()).digest()[:8], "big") / 2**64
        due: list[Any] = self._store.rows(_DUE, (self._now_ms(), (1 + 9 * drawn) / 60))
        for interval in due:
            with self._store.transaction() as db:
                counts = _counts(db, interval)
                if counts["answer"] or counts["signal"] or counts["masked"]:
                    outbox.add(partial(_summary, identity, interval, counts))
                db.execute("DELETE FROM usage WHERE from_ms = ? AND to_ms = ? AND use_case = ? AND release = ?", interval)
        return len(due)

    def _now_ms(self) -> int:
        return max(int(self._clock() * 1000), 0)

    def _count(self, db: Any, release: str, kind: _Kind, name: str = "", count: int = 1) -> None:
        if self._every_ms is not None:
            from_ms = self._now_ms() // self._every_ms * self._every_ms
            db.execute(_ADD, (from_ms, from_ms + self._every_ms, self._use_case, release, kind, name, count))
            db.execute("DELETE FROM usage WHERE from_ms < ?", (from_ms - KEPT_MS,))


_ADD: Final = """
INSERT INTO usage VALUES (?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (from_ms, to_ms, use_case, release, kind, name) DO UPDATE SET count = count + excluded.count
"""
_RELEASE_OF: Final = """
SELECT release FROM responses WHERE response_id = ?
UNION ALL SELECT release FROM feedback JOIN responses USING (response_id) WHERE feedback_id = ? LIMIT 1
"""
_DUE: Final = """
SELECT DISTINCT from_ms, to_ms, use_case, release FROM usage
WHERE to_ms + (to_ms - from_ms) * ?2 <= ?1
    OR from_ms > ?1 -- counted by a clock that was set back since
"""
_Interval = tuple[int, int, str, str]


def _counts(db: Any, interval: _Interval) -> dict[_Kind, dict[str, int]]:
    found: dict[_Kind, dict[str, int]] = {"answer": {}, "latency": {}, "signal": {}, "masked": {}}
    rows = db.execute(
        "SELECT kind, name, count FROM usage WHERE from_ms = ? AND to_ms = ? AND use_case = ? AND release = ?", interval
    ).fetchall()
    for kind, name, count in rows:
        found[kind][name] = count
    return found


def _summary(identity: Identity, interval: _Interval, counts: dict[_Kind, dict[str, int]], seq: int) -> types.UsageSummarised:
    from_ms, to_ms, use_case, release = interval
    return types.UsageSummarised(
        origin=identity.origin,
        client_id=identity.client_id,
        seq=seq,
        use_case=use_case,
        release=release,
        from_ms=from_ms,
        to_ms=to_ms,
        answers=counts["answer"].get("", 0),
        latency=counts["latency"],
        signals=_bounded(counts["signal"]),
        masked=_bounded(counts["masked"]),
    )


def _bounded(counts: dict[str, int]) -> dict[str, int]:
    """As many names as an event can hold; the rarest are counted as "other"."""
    if len(counts) <= _MAX_NAMES:
        return counts
    most = sorted(counts.items(), key=lambda each: (each[0] == _OTHER, -each[1], each[0]))
    return dict(most[: _MAX_NAMES - 1]) | {_OTHER: sum(count for _, count in most[_MAX_NAMES - 1 :])}
