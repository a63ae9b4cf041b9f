"""Asks for rounds: what the triggers of `server.toml` wait for has happened.

One state holds all of it, under one key, for a round is of the whole deployment: two triggers at once make one round.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Final, NamedTuple

from fedloop_events import ids, topics, types
from fedloop_events.envelope import Record
from fedloop_events.hours import zone
from fedloop_events.types import DEFAULT_RUN, Payload
from msgspec import Struct, field

from fedloop_server import schedules
from fedloop_server.feedback.operator import Emit
from fedloop_server.feedback.under_way import UnderWay
from fedloop_server.triggers import (
    MAX_PER_DAY,
    REQUEST,
    BoundTrigger,
    DriftTrigger,
    EventTrigger,
    FeedbackTrigger,
    ForecastTrigger,
    Metric,
    ScheduleTrigger,
    Trigger,
)

MAX_USE_CASES: Final = 100
MAX_SUPERSEDED: Final = 16
MAX_REASON_CHARS: Final = 200
DAY_MS: Final = 24 * 3600 * 1000
_Z: Final = 2.326
"""Of the normal distribution: one in a hundred is further up."""
_WIDTH_S: Final = {"1m": 60, "1h": 3600, "1d": 24 * 3600}
_DETECTORS: Final = {"adwin": "ADWIN", "page-hinkley": "Page-Hinkley", "psi": "PSI"}
_COUNTED: Final = {"all": "pieces of feedback", "high": "pieces of feedback of high priority", "corrections": "corrections"}
_READ: Final = (
    types.FeedbackScored,
    types.DriftDetected,
    types.MetricForecast,
    types.TriggerMuted,
    types.TriggerFired,
    types.RoundRequested,
    types.RoundRequestWithdrawn,
    types.RoundOpened,
    types.RoundAborted,
    types.ReleaseProposed,
    types.ReleasePublished,
    types.ReleaseRejected,
    types.ReleaseRolledBack,
)


class NewFeedback(Struct):
    """What came of one use case since the last release: counts, and the latest observations of answers by no earlier one."""

    all: int = 0
    high: int = 0
    corrections: int = 0
    satisfaction: list[float] = []
    accuracy: list[float] = []


class Awaited(Struct):
    """A drift after which more feedback has to come."""

    use_case: str
    left: int
    cause: str
    why: str


class TriggerState(Struct):
    """What became of one trigger. Times are the log's own, in ms."""

    fired: int = 0
    """How often, requests that it went into included."""
    fired_ms: int = 0
    why: str = ""
    request_id: str = ""
    """What it asked for last, or what it went into."""
    asked_ms: list[int] = []
    """When it asked; the last `MAX_PER_DAY`."""
    muted_until_ms: int = 0
    scheduled_ms: int = 0
    """Up to when the times of its schedule have passed."""
    awaited: Awaited | None = None
    """The latest; a release that comes first has taken it in."""


class TriggeringState(Struct):
    """Bounded by `MAX_USE_CASES` use cases with at most `triggers.MAX_OVER` observations of two metrics each, and by the
    configured triggers."""

    origin: str = ""
    new: dict[str, NewFeedback] = {}
    """By use case."""
    triggers: dict[str, TriggerState] = {}
    under_way: UnderWay = field(default_factory=UnderWay)
    in_force: dict[str, str] = {}
    """Release by model."""
    superseded: list[str] = []
    """The releases that were in force before."""

    def of(self, trigger: Trigger) -> TriggerState:
        return self.triggers.setdefault(trigger.name, TriggerState())


class Fired(NamedTuple):
    trigger: Trigger
    cause: str | int
    """By which the same happening is known again."""
    at_ms: int
    why: str


class Triggering:
    """Emits `RoundRequested`; `made` are the only requests that it asks for, where it looks back at what was."""

    name, version = "trigger", 1
    topics = (topics.SCORED, topics.METRICS, topics.ROUNDS, topics.RELEASES)
    state_type = TriggeringState

    def __init__(self, triggers: Sequence[Trigger], time_zone: str = "UTC", *, made: Collection[str] | None = None) -> None:
        self.triggers, self._made = triggers, made
        self._zone = zone(time_zone)
        self._levels = [each for each in triggers if isinstance(each, FeedbackTrigger | BoundTrigger)]
        self._kept: dict[Metric, int] = {
            metric: max((each.over for each in triggers if isinstance(each, BoundTrigger) and each.metric == metric), default=0)
            for metric in ("satisfaction", "accuracy")
        }

    def key(self, record: Record, payload: Payload) -> str | None:
        if not isinstance(payload, _READ) or getattr(payload, "run_id", DEFAULT_RUN) != DEFAULT_RUN:
            return None
        return DEFAULT_RUN

    def apply(self, state: TriggeringState, record: Record, payload: Payload) -> Iterator[Emit]:
        state.origin = payload.origin
        state.under_way.apply(payload)
        yield from self._ask(state, list(self._taken_in(state, record, payload)))

    def advance(self, key: str, state: TriggeringState, now_ms: int) -> Iterator[Emit]:
        yield from self._ask(state, list(self._scheduled(state, now_ms)))

    def _taken_in(self, state: TriggeringState, record: Record, payload: Payload) -> Iterator[Fired]:
        match payload:
            case types.FeedbackScored():
                new = _new_of(state, payload.use_case)
                self._count(state, new, payload)
                for level in self._levels:
                    if level.watches(payload.use_case) and (why := due(level, payload.use_case, new)):
                        yield Fired(level, record.id, record.appended_ms, why)
                yield from self._waited(state, payload.use_case, record)
            case types.DriftDetected() | types.MetricForecast():
                for trigger in self.triggers:
                    if trigger.watches(payload.use_case) and (why := _concluded(trigger, payload)):
                        if isinstance(trigger, DriftTrigger) and trigger.after:
                            state.of(trigger).awaited = Awaited(payload.use_case, trigger.after, record.id, why)
                        else:
                            yield Fired(trigger, record.id, record.appended_ms, why)
            case types.TriggerFired():
                for trigger in self.triggers:
                    if trigger.name == payload.trigger and isinstance(trigger, EventTrigger):
                        yield Fired(trigger, record.id, record.appended_ms, f"event: {payload.reason or trigger.name}")
            case types.TriggerMuted():
                for trigger in self.triggers:
                    if trigger.name == payload.trigger:
                        state.of(trigger).muted_until_ms = payload.until_ms
            case types.ReleasePublished():
                _supersede(state, payload.model, payload.release)
                state.new.clear()
                for one in state.triggers.values():
                    one.awaited = None
            case types.ReleaseRolledBack():
                _supersede(state, payload.model, payload.release)
                for new in state.new.values():
                    new.satisfaction, new.accuracy = [], []
            case _:
                pass

    def _waited(self, state: TriggeringState, use_case: str, record: Record) -> Iterator[Fired]:
        for trigger in self.triggers:
            one = state.of(trigger)
            if one.awaited is not None and one.awaited.use_case == use_case:
                one.awaited.left -= 1
                if one.awaited.left <= 0:
                    yield Fired(trigger, one.awaited.cause, record.appended_ms, one.awaited.why)
                    one.awaited = None

    def _count(self, state: TriggeringState, new: NewFeedback, scored: types.FeedbackScored) -> None:
        new.all += 1
        new.high += scored.lane == "high"
        said = scored.reaction
        new.corrections += said.correction is not None or said.label not in (None, said.predicted)
        if scored.release in state.superseded:
            return
        for values, value, kept in (
            (new.satisfaction, scored.satisfaction, self._kept["satisfaction"]),
            (new.accuracy, scored.correct, self._kept["accuracy"]),
        ):
            if value is not None and kept:
                values.append(float(value))
                del values[:-kept]

    def _scheduled(self, state: TriggeringState, now_ms: int) -> Iterator[Fired]:
        for trigger in self.triggers:
            if isinstance(trigger, ScheduleTrigger) and state.origin:
                one, last = state.of(trigger), schedules.last_before(trigger.cron, self._zone, now_ms // 60_000)
                if not one.scheduled_ms:
                    one.scheduled_ms = now_ms
                elif last is not None and (last_ms := int(last.timestamp() * 1000)) > one.scheduled_ms:
                    one.scheduled_ms = last_ms
                    yield Fired(trigger, last_ms, last_ms, f"schedule: {last.isoformat(timespec='minutes')}")

    def _ask(self, state: TriggeringState, fired: list[Fired]) -> Iterator[Emit]:
        under_way = state.under_way.request
        ready = [
            each
            for each in fired
            if holding_back(each.trigger, state.of(each.trigger), each.at_ms) is None
            and not (under_way and state.of(each.trigger).request_id == under_way)  # once for a round
        ]
        if not ready:
            return
        leader = max(ready, key=lambda each: each.trigger.priority)
        request_id = under_way or f"{REQUEST}{leader.trigger.name}-{ids.derived_id(leader.trigger.name, leader.cause)[:16]}"
        if self._made is not None and request_id not in self._made:
            return
        for each in ready:
            one = state.of(each.trigger)
            one.fired, one.fired_ms, one.why, one.request_id = one.fired + 1, each.at_ms, _cut(each.why), request_id
        if under_way:
            return
        asking = state.of(leader.trigger)
        asking.asked_ms = [*asking.asked_ms, leader.at_ms][-MAX_PER_DAY:]
        rounds = max(each.trigger.rounds for each in ready)
        state.under_way.ask(request_id, rounds)
        others = [each.trigger.name for each in ready if each is not leader]
        reason = _cut(leader.why, f"; also {', '.join(others)}" if others else "")
        yield Emit(types.RoundRequested(state.origin, DEFAULT_RUN, request_id, rounds, reason), (request_id,), leader.at_ms)


def holding_back(trigger: Trigger, one: TriggerState, at_ms: int) -> str | None:
    """Why a trigger does not fire now, whatever happens; None if nothing keeps it from it."""
    if at_ms < one.muted_until_ms:
        return "muted"
    if one.fired and at_ms < one.fired_ms + trigger.cooldown_s * 1000:
        return "cooling down"
    if sum(each > at_ms - DAY_MS for each in one.asked_ms) >= trigger.max_per_day:
        return "asked often enough for a day"
    return None


def due(trigger: FeedbackTrigger | BoundTrigger, use_case: str, new: NewFeedback) -> str:
    """Why a trigger fires by what is new of a use case; "" if it does not."""
    if isinstance(trigger, FeedbackTrigger):
        count: int = getattr(new, trigger.of)
        found = f"feedback: {count} {_COUNTED[trigger.of]} of {use_case} since the last release"
        return found if count >= trigger.count else ""
    values = getattr(new, trigger.metric)[-trigger.over :]
    if len(values) < trigger.over or (mean := sum(values) / len(values)) >= trigger.below:
        return ""
    if upper(mean, len(values)) >= trigger.below:
        return ""
    return f"{trigger.metric}: {mean:.2f} of {use_case} over the last {len(values)}, and the bound is {trigger.below:g}"


def upper(mean: float, count: int) -> float:
    """What the true mean of `count` values from 0 to 1 is above once in a hundred (Wilson 1927, JASA 22)."""
    square = _Z * _Z / count
    return (mean + square / 2 + math.sqrt(square * (mean * (1 - mean) + square / 4))) / (1 + square)


def _concluded(trigger: Trigger, found: types.DriftDetected | types.MetricForecast) -> str:
    match trigger, found:
        case DriftTrigger(), types.DriftDetected() if found.metric in trigger.metrics:
            names = ", ".join(_DETECTORS.get(each, each) for each in found.detectors)
            if found.before is None or found.after is None:
                return f"drift: {found.metric} of {found.use_case} changed ({names})"
            if found.after < found.before:
                moved = f"{found.before:.2f} to {found.after:.2f}"
                return f"drift: {found.metric} of {found.use_case} fell from {moved} ({names})"
            return ""
        case ForecastTrigger(), types.MetricForecast() if found.metric == trigger.metric:
            crosses_s = _crosses_s(found, trigger.below)
            if crosses_s is None or crosses_s > trigger.within_s:
                return ""
            when = f"{crosses_s / 60:.0f} minutes" if crosses_s >= 60 else "a minute"
            return f"forecast: {found.metric} of {found.use_case} is expected below {trigger.below:g} within {when}"
        case _:
            return ""


def _crosses_s(found: types.MetricForecast, below: float) -> float | None:
    """Seconds after the last window in which the bound is expected to be crossed; None if it is not."""
    if found.bound == below and found.crosses_ms is not None:
        return (found.crosses_ms - found.after_ms) / 1000
    return found.horizon * _WIDTH_S[found.width] if found.expected < below else None


def _new_of(state: TriggeringState, use_case: str) -> NewFeedback:
    if use_case not in state.new and len(state.new) >= MAX_USE_CASES:
        del state.new[next(iter(state.new))]
    return state.new.setdefault(use_case, NewFeedback())


def _supersede(state: TriggeringState, model: str, release: str) -> None:
    before = [state.in_force[model]] if model in state.in_force else []
    state.in_force[model] = release
    state.superseded = [each for each in (*state.superseded, *before) if each != release][-MAX_SUPERSEDED:]


def _cut(text: str, tail: str = "") -> str:
    """A line of at most `MAX_REASON_CHARS`, which ends with `tail`, if that fits."""
    if len(text) + len(tail) <= MAX_REASON_CHARS:
        return text + tail
    tail = tail if len(tail) <= MAX_REASON_CHARS // 2 else ""
    return f"{text[: MAX_REASON_CHARS - 1 - len(tail)]}…{tail}"
