"""The device's own events, in order: signed, and durable before the log has them.

A sequence number, an event id and the signature are fixed in the transaction that makes the event due. A crash on either side of
the append therefore sends the same event again, and an event id counts once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import msgspec
from fedloop_events.envelope import Event
from fedloop_events.errors import PolicyError
from fedloop_events.logs.port import EventLog
from fedloop_events.types import ClientEvent
from fedloop_events.writer import EventWriter
from msgspec import Struct

from fedloop_clients.store import Store

BATCH: Final = 200
ENROL_ANEW: Final = (
    "ask the operator to revoke this client (`fedloop server revoke`), then enrol the device under a new name, with a new store "
    "(`fedloop agent enrol`)"
)

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Event).decode


class SuspendedError(PolicyError):
    """The log shows this device's sequence numbers used twice: a copy of its store signs, or has signed, in its name."""


class Mine(Struct, frozen=True):
    """An event of this device that was read in the log."""

    seq: int
    event_id: str


class Outbox:
    """The device's own events by sequence number: dense from 0, sent in order. Only one process at a time may send."""

    def __init__(self, store: Store, writer: EventWriter) -> None:
        self._store, self._writer = store, writer

    def add(self, make: Callable[[int], ClientEvent]) -> Event:
        """Sign `make(seq)` and put it last, within the caller's transaction if there is one.

        Raises `InvalidEventError`, and adds nothing, if the event is too large.
        """
        with self._store.transaction() as db:
            seq = db.execute("SELECT coalesce(max(seq), -1) + 1 FROM outbox").fetchone()[0]
            event = self._writer.event(make(seq))
            db.execute("INSERT INTO outbox VALUES (?, ?, ?)", (seq, event.id, _encode(event)))
        return event

    def flush(self, log: EventLog, before: Callable[[Sequence[Event]], None] = lambda due: None) -> int:
        """Append everything due, in order, each part of it after a call of `before`; how many events that were.

        Raises what the log and `before` raise: the rest stays due.
        """
        sent = 0
        while due := self._store.rows("SELECT seq, event FROM outbox WHERE event IS NOT NULL ORDER BY seq LIMIT ?", (BATCH,)):
            events = [_decode(event) for _, event in due]
            before(events)
            log.append(events)
            with self._store.transaction() as db:
                db.executemany("UPDATE outbox SET event = NULL WHERE seq = ?", [(seq,) for seq, _ in due])
            sent += len(due)
        return sent

    def unsent(self) -> int:
        """How many events are due."""
        return int(self._store.rows("SELECT count(*) FROM outbox WHERE event IS NOT NULL")[0][0])

    def reconcile(self, mine: Sequence[Mine]) -> None:
        """Compare with what the log has of this device, before anything else is appended.

        Numbers that the store does not know (it was restored from a backup) are taken over from the log, and what is there
        already is not sent again. Raises `SuspendedError` if a number stands in the log for another event than ours.
        """
        with self._store.transaction() as db:
            for seq, event_id in ((each.seq, each.event_id) for each in mine):
                known = db.execute("SELECT event_id FROM outbox WHERE seq = ?", (seq,)).fetchone()
                if known is None:
                    db.execute("INSERT INTO outbox VALUES (?, ?, NULL)", (seq, event_id))
                elif known[0] == event_id:
                    db.execute("UPDATE outbox SET event = NULL WHERE seq = ?", (seq,))
                else:
                    raise SuspendedError(
                        f"number {seq} of this device stands in the log for event {event_id}, not for {known[0]}",
                        cause="two copies of the device's store have been used",
                        hint=ENROL_ANEW,
                    )
