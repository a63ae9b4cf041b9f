"""What an operator of the feedback pipeline is: a keyed fold that emits events.

An operator is pure: what it emits is a function of its state and of what it reads, so that a runner that reads some of the log
again, after a crash, emits the same events under the same ids, and the log holds each once.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, Protocol, TypeVar

from fedloop_events import ids
from fedloop_events.envelope import Event, Record
from fedloop_events.types import Payload
from fedloop_events.writer import EventWriter
from msgspec import Struct

S = TypeVar("S", bound=Struct)


class Emit(NamedTuple):
    """An event to append. Its id is a function of `of`, or else of the event that it was emitted for and its place among that
    event's. `time_ms` is since 1970 (None: when that event was appended)."""

    payload: Payload
    of: tuple[str | int, ...] = ()
    time_ms: int | None = None


class Operator(Protocol[S]):
    """A named, versioned fold by key over some topics. A state holds one key's; it is changed in place, and is bounded."""

    @property
    def name(self) -> str: ...

    @property
    def version(self) -> int:
        """Part of the ids of what it emits, and of what its states are kept under: another version begins anew, where the log is
        taken in up to."""

    @property
    def topics(self) -> tuple[str, ...]:
        """What it reads. Order holds within one key of one topic, and nowhere else."""

    @property
    def state_type(self) -> type[S]:
        """Made without arguments it is the state that a key has at first."""

    def key(self, record: Record, payload: Payload) -> str | None:
        """Whose state an event concerns, which is its own key (a runner on several processes has no other at hand); None if
        it concerns nobody's."""

    def apply(self, state: S, record: Record, payload: Payload) -> Iterator[Emit]:
        """Take in one event, once."""

    def advance(self, key: str, state: S, now_ms: int) -> Iterator[Emit]:
        """Emit what is due: everything of this key that was appended to its topics before `now_ms`, by the log's clock, has been
        taken in. What is emitted names what it is `of`. It is not asked of an operator that reads a topic by client, which has
        too many keys for that."""


def event_of(writer: EventWriter, operator: Operator[S], emitted: Emit, record: Record | None, number: int) -> Event:
    """The signed event, the same whenever it is made; `number` is its place among those of `record`."""
    assert emitted.of or record is not None, f"{operator.name} emits something of nothing"
    of = emitted.of or ((record.id, number) if record is not None else ())
    time_ms = emitted.time_ms if emitted.time_ms is not None else record.appended_ms if record is not None else 0
    identity = ids.derived_id(emitted.payload.origin, operator.name, operator.version, *of)
    return writer.event(emitted.payload, id=identity, time_s=time_ms // 1000)
