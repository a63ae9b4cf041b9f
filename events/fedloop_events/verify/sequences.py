"""The clients' own sequence numbers, which show what is missing from a log whose offsets do not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from msgspec import Struct

_MOST_AT_ONCE: Final = 100_000
_MOST_PER_MS: Final = 100
"""More events than these no client ever appended: numbers beyond were left out by the client, not removed from the log."""


class At(Struct, frozen=True):
    """Where an event stands."""

    stream: str
    offset: int
    event_id: str | None = None


Wrong = Callable[[str, At], None]


class _Client:
    """`due` is the lowest number that has not come; `ahead` are those above it that have, with the log's clock."""

    __slots__ = ("ahead", "due", "due_ms", "last")

    def __init__(self) -> None:
        self.due, self.due_ms = 0, 0
        self.ahead: dict[int, tuple[int, At]] = {}
        self.last: dict[str, int] = {}
        """By order of events, within which numbers rise."""


class Sequences:
    """Numbers that each client gives its events, 0, 1, 2 and so on, over all topics.

    `wrong` is called for what may be tampering; `client_wrong` for what the client alone can have done: the same number for two
    events that it has signed, and a leap over more events than it can have appended in the time between.
    """

    def __init__(self, wrong: Wrong, client_wrong: Wrong) -> None:
        self._wrong, self._client_wrong = wrong, client_wrong
        self._clients: dict[str, _Client] = {}
        self._removed_until_ms = -1

    def begins_late(self, first_ms: int) -> None:
        """The first events of a stream are gone, by retention: what was appended before `first_ms` may be missing."""
        self._removed_until_ms = max(self._removed_until_ms, first_ms)

    def take(self, client_id: str, seq: int, appended_ms: int, at: At, order: str) -> None:
        """`order` names what is read in its order, so that the client's numbers rise in it."""
        client = self._clients.setdefault(client_id, _Client())
        if seq < client.due or seq in client.ahead:
            self._client_wrong(f"{client_id} used its sequence number {seq} for a second event", at)
        elif seq < client.last.get(order, -1):
            self._wrong(f"event {seq} of {client_id} stands after a later one: events changed places", at)
        client.last[order] = max(seq, client.last.get(order, -1))
        if seq > client.due:
            client.ahead.setdefault(seq, (appended_ms, at))
        elif seq == client.due:
            client.due, client.due_ms = seq + 1, appended_ms
            while client.due in client.ahead:
                client.due_ms, _ = client.ahead.pop(client.due)
                client.due += 1

    def end(self) -> None:
        """Say what has not come at all."""
        for client_id, client in self._clients.items():
            due, before_ms = client.due, client.due_ms
            for seq, (appended_ms, at) in sorted(client.ahead.items()):
                if seq > due and before_ms > self._removed_until_ms:
                    self._missing(client_id, seq - due, appended_ms - before_ms, at)
                due, before_ms = seq + 1, appended_ms

    def _missing(self, client_id: str, count: int, within_ms: int, at: At) -> None:
        if count > _MOST_AT_ONCE + _MOST_PER_MS * max(0, within_ms):
            self._client_wrong(f"{client_id} left out {count:,} sequence numbers before this event", at)
        else:
            self._wrong(f"{count} events of {client_id} before this one are missing", at)
