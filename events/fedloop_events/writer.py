"""Writing events: payloads become signed events at the end of the log."""

from __future__ import annotations

import time
from collections.abc import Callable

from fedloop_events import envelope, ids, signatures
from fedloop_events.envelope import Event
from fedloop_events.logs.port import EventLog
from fedloop_events.signatures import SigningKey
from fedloop_events.types import Payload


class EventWriter:
    """Signs with `key` and appends to `log`; `clock` gives seconds since 1970."""

    def __init__(self, log: EventLog, key: SigningKey, *, clock: Callable[[], float] = time.time) -> None:
        self.log, self.key = log, key
        self._clock = clock

    def event(self, payload: Payload, *, id: str | None = None, time_s: int | None = None) -> Event:  # noqa: A002 (the attribute's name)
        """The signed event of `payload`, under a new id and of now unless they are given; not yet appended."""
        event = envelope.encode(
            payload, id=ids.new_id() if id is None else id, time_s=int(self._clock()) if time_s is None else time_s
        )
        return signatures.sign(event, self.key)

    def append(self, *payloads: Payload) -> list[Event]:
        """Append `payloads`, all or none, durably."""
        events = [self.event(payload) for payload in payloads]
        self.log.append(events)
        return events
