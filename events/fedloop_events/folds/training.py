"""What there is to train on: a fold over the topic `training`."""

from __future__ import annotations

from typing import ClassVar, Self

import msgspec
from msgspec import Struct

from fedloop_events import topics, types
from fedloop_events.envelope import Record


class TrainingView(Struct):
    """The curated examples that count. One that was withdrawn counts never again, in whatever order its events come."""

    topics: ClassVar[tuple[str, ...]] = (topics.TRAINING,)
    version: ClassVar[int] = 1

    examples: dict[str, types.ExampleCurated] = {}
    """By id, in the order in which they were curated."""
    withdrawn: set[str] = set()

    def apply(self, record: Record, payload: types.Payload) -> None:
        if isinstance(payload, types.ExampleWithdrawn):
            self.withdrawn.add(payload.example_id)
            self.examples.pop(payload.example_id, None)
        elif isinstance(payload, types.ExampleCurated) and payload.example_id not in self.withdrawn:
            self.examples.setdefault(payload.example_id, payload)

    def to_state(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_state(cls, state: bytes) -> Self:
        return msgspec.msgpack.decode(state, type=cls)
