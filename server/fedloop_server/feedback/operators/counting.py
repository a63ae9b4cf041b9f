"""Counts by client, and of the quarantine, passed on by use case: what is measured is read by use case alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Final

from fedloop_events import topics
from fedloop_events.envelope import Record
from fedloop_events.types import EventQuarantined, Payload, UsageCounted, UsageSummarised
from msgspec import Struct

from fedloop_server.feedback.operator import Emit

_LONGEST_MS: Final = 7 * 24 * 3600 * 1000


class Nothing(Struct):
    """No state: every event is passed on by itself."""


class Counting:
    """Emits a `UsageCounted` for each `UsageSummarised` that is plausible, and for each event of a use case that was quarantined.

    A summary counts for nothing if it contradicts itself: its time is none, or longer than a week, it has more than one answer a
    millisecond, or more response times than answers. So no device alone makes a count that is out of all bounds.
    """

    name: ClassVar[str] = "count"
    version: ClassVar[int] = 1
    topics: ClassVar[tuple[str, ...]] = (topics.FEEDBACK, topics.QUARANTINE)
    state_type: type[Nothing] = Nothing

    def key(self, record: Record, payload: Payload) -> str | None:
        return payload.key if isinstance(payload, UsageSummarised | EventQuarantined) else None

    def apply(self, state: Nothing, record: Record, payload: Payload) -> Iterator[Emit]:
        if isinstance(payload, UsageSummarised):
            if _plausible(payload):
                yield Emit(
                    UsageCounted(
                        payload.origin,
                        payload.use_case,
                        release=payload.release,
                        from_ms=payload.from_ms,
                        to_ms=payload.to_ms,
                        recorded_ms=record.appended_ms,
                        answers=payload.answers,
                        latency=payload.latency,
                    )
                )
        elif isinstance(payload, EventQuarantined) and payload.use_case is not None and payload.release is not None:
            at_ms = payload.given_ms or payload.recorded_ms
            yield Emit(
                UsageCounted(payload.origin, payload.use_case, payload.release, at_ms, at_ms, payload.recorded_ms, quarantined=1)
            )

    def advance(self, key: str, state: Nothing, now_ms: int) -> Iterator[Emit]:
        return iter(())


def _plausible(usage: UsageSummarised) -> bool:
    took_ms = usage.to_ms - usage.from_ms
    return 0 < took_ms <= _LONGEST_MS and usage.answers <= took_ms and sum(usage.latency.values()) <= usage.answers
