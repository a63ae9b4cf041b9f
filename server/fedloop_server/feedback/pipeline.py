"""The embedded runner: all operators in one process, their states and the position in one SQLite file.

A step reads a batch, lets the operators take it in, appends what they emit, and then commits states and position in one
transaction. Killed before the commit it does the same step again: what it appends again is in the log already.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final

from fedloop_events import ids, topics, types
from fedloop_events.envelope import Event, Record
from fedloop_events.errors import InvalidEventError, SignatureError
from fedloop_events.folds import marks
from fedloop_events.folds.admit import Admit
from fedloop_events.folds.identities import MAX_SKEW_MS, Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.logs.port import READ_AHEAD, EventLog, Position
from fedloop_events.types import Payload
from fedloop_events.writer import EventWriter

from fedloop_server.deciding import batches
from fedloop_server.feedback.operator import Emit, Operator, event_of
from fedloop_server.feedback.states import States

POLL_S: Final = 0.5
IDLE_STEPS: Final = 4
"""Without news, after which operators have been told that everything is taken in: a watermark takes three of them."""
TICK_MS: Final = 500
"""Operators are told no more often how far the log has come."""


class Watermark:
    """Up to when, by the log's clock, everything has been taken in, what that made the operators emit included.

    It rests on no read alone, for a log with several streams may give less than it has: an end of the log that was noted is
    reached, or nothing is left. What was read until then may have made operators emit; that lies before the end noted next.
    """

    def __init__(self, end: Callable[[], Position], skew_ms: int) -> None:
        self.complete_ms = 0
        self._end, self._skew_ms = end, skew_ms
        self._reached_ms = 0
        self._noted: tuple[int, Position] | None = None

    def read(self, position: Position, *, nothing_left: bool, now_ms: int) -> None:
        """After everything up to `position` has been taken in, and what it made emit is in the log; `now_ms` is when that was
        read."""
        if self._noted is not None:
            noted_ms, end = self._noted
            if not nothing_left and (now_ms - noted_ms < TICK_MS or not _reaches(position, end)):
                return
            self.complete_ms, self._reached_ms = self._reached_ms, noted_ms - self._skew_ms
        self._noted = now_ms, self._end()


def _reaches(position: Position, end: Position) -> bool:
    """Of the streams that anything was read of."""
    return all(position.covers(stream, offset) for stream, offset in end.offsets.items() if stream in position.offsets)


class Pipeline:
    """Runs `operators` over a log; `wall` gives seconds since 1970, `skew_ms` is how far the log's clock may differ from it.
    `on_emitted` is called with each event that is about to be appended.

    Raises `LogChangedError` if the log is not the one that the states are of.
    """

    def __init__(
        self,
        log: EventLog,
        writer: EventWriter,
        operators: Sequence[Operator[Any]],
        states: States,
        *,
        wall: Callable[[], float] = time.time,
        skew_ms: int = MAX_SKEW_MS,
        on_emitted: Callable[[Payload], None] | None = None,
    ) -> None:
        self.operators = operators
        self._on_emitted = on_emitted
        self.read = self.emitted = self.refused = 0
        self._log, self._writer, self._states, self._wall = log, writer, states, wall
        self._watermark = Watermark(log.end, skew_ms)
        self._topics = tuple(sorted({topic for each in operators for topic in each.topics}))
        self._people = Reader(log, Identities())
        self._admit = Admit(self._people.fold)
        self._admit.standing = states.progress.standing
        self._advanced_ms = 0
        kept = states.progress.marks
        marks.check(log.end(), lambda after: log.read(self._topics, after, limit=1), states.position, kept)

    @property
    def complete_ms(self) -> int:
        """Up to when, by the log's clock, everything has been taken in; 0 before that is known."""
        return self._watermark.complete_ms

    def run(self, stop: threading.Event, *, until_idle: bool = False) -> int:
        """Go on until `stop` is set, or (`until_idle`) the log holds nothing that was not taken in, and all that is due by now is
        emitted; how many events were read."""
        idle = 0
        while not stop.is_set() and idle < (IDLE_STEPS if until_idle else math.inf):
            idle = 0 if self.step(0.0 if until_idle else POLL_S) else idle + 1
        return self.read

    def step(self, wait_s: float = 0.0) -> int:
        """Take in one batch, waiting up to `wait_s` for it; how many events it had."""
        began_ms = int(self._wall() * 1000)
        batch = self._log.read(self._topics, self._states.position, limit=READ_AHEAD, wait_s=wait_s)
        if batch.records:
            self._people.catch_up()
        events = [event for record in batch.records for event in self._taken_in(record)]
        complete_ms = self._watermark.complete_ms
        if advanced := complete_ms > self._advanced_ms:
            events += self._advanced(complete_ms)
            self._advanced_ms = complete_ms
        for some in batches(events):
            self._log.append(some)
        if batch.records or advanced:
            marks.remember(self._states.progress.marks, batch.records)
            self._states.commit(batch.position)
        self._watermark.read(batch.position, nothing_left=not batch.records, now_ms=began_ms)
        self.read += len(batch.records)
        self.emitted += len(events)
        return len(batch.records)

    def _taken_in(self, record: Record) -> Iterator[Event]:
        if not self._states.first(record):
            return
        try:
            payload = self._admit(record)
        except InvalidEventError as error:
            self.refused += 1
            if record.topic == topics.FEEDBACK:
                yield self._quarantined(record, error)
            return
        if payload is None:
            return
        for operator in self.operators:
            if record.topic in operator.topics and (key := operator.key(record, payload)) is not None:
                yield from self._signed(operator, operator.apply(self._states.of(operator, key), record, payload), record)

    def _advanced(self, now_ms: int) -> Iterator[Event]:
        for operator in self.operators:
            for key, state in self._states.advancing(operator):
                yield from self._signed(operator, operator.advance(key, state, now_ms), None)

    def _signed(self, operator: Operator[Any], emitted: Iterable[Emit], record: Record | None) -> Iterator[Event]:
        for number, each in enumerate(emitted):
            if self._on_emitted is not None:
                self._on_emitted(each.payload)
            yield event_of(self._writer, operator, each, record, number)

    def _quarantined(self, record: Record, error: InvalidEventError) -> Event:
        """Of an event that is malformed, or that its author did not sign: nothing that stands in it is believed."""
        reason = "not-authentic" if isinstance(error, SignatureError) else "malformed"
        origin = self._people.fold.origin
        found = types.EventQuarantined(origin, record.topic, record.id, reason, recorded_ms=record.appended_ms)
        identity = ids.derived_id(origin, "admit", record.id)
        return self._writer.event(found, id=identity, time_s=record.appended_ms // 1000)
