"""The triggers of a deployment: how far each is from firing, what would have fired in the past, muting and firing one.

Everything is read from the log, by the pipeline's own operator: it needs no pipeline that runs.
"""

from __future__ import annotations

import math
import tomllib
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Final

from fedloop_events import topics, types
from fedloop_events.envelope import Record
from fedloop_events.errors import PolicyError, UsageError
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.hours import zone
from fedloop_events.logs.port import EventLog
from fedloop_events.types import DEFAULT_RUN, Payload
from fedloop_events.writer import EventWriter
from msgspec import Struct

from fedloop_server import config, schedules, triggers
from fedloop_server.feedback.operator import Emit
from fedloop_server.feedback.operators.triggering import (
    DAY_MS,
    NewFeedback,
    Triggering,
    TriggeringState,
    holding_back,
    upper,
)
from fedloop_server.operations import commands
from fedloop_server.triggers import (
    REQUEST,
    BoundTrigger,
    EventTrigger,
    FeedbackTrigger,
    ScheduleTrigger,
    Trigger,
)

MAX_SHOWN: Final = 10_000
"""Of what would have fired, the latest."""
ANY_USE_CASE: Final = "default"
"""Under which use case an event about a trigger of all of them stands."""


class Observed(Struct, frozen=True):
    """How much of what it takes is there of one use case; of a metric its mean, and what chance may make of it at most."""

    use_case: str
    count: int
    of: int
    mean: float | None = None
    at_most: float | None = None


class Standing(Struct, frozen=True):
    """One trigger. Times are the log's own, in ms; 0 for what has not happened."""

    trigger: Trigger
    observed: list[Observed]
    fired: int
    """How often, rounds that it joined included."""
    fired_ms: int
    why: str
    request_id: str
    asked_in_a_day: int
    cooling_until_ms: int
    muted_until_ms: int
    next_ms: int
    """Of its schedule."""
    held_back: str | None
    """Why it does not fire now, whatever happens."""


class Fire(Struct, frozen=True):
    """A trigger that fires in a log's past. It `joins` a round that is under way, or asks for one, which was asked for `in_fact`
    or not."""

    trigger: str
    at_ms: int
    why: str
    request_id: str
    joins: bool
    in_fact: bool


class Asked(Struct, frozen=True):
    """A round that a trigger has asked for in fact."""

    request_id: str
    at_ms: int
    reason: str


class Tested(Struct, frozen=True):
    """What would have fired, the latest `MAX_SHOWN`, and what was asked for in fact."""

    fired: list[Fire]
    asked: list[Asked]


def standings(log: EventLog, configured: Sequence[Trigger], time_zone: str, now_ms: int) -> list[Standing]:
    """Of each configured trigger, as the log has it: what was not asked for in fact has not fired."""
    replay = _replay(log, configured, time_zone, [each.request_id for each in _asked(log)], only_made=True)
    return [_standing(each, replay.state, time_zone, now_ms) for each in configured]


def look_back(log: EventLog, configured: Sequence[Trigger], time_zone: str, now_ms: int) -> Tested:
    """What would have fired, had the triggers been these. Rounds and releases are those that there were: of a request that was
    not made in fact nothing came."""
    asked = _asked(log)
    replay = _replay(log, configured, time_zone, [each.request_id for each in asked], only_made=False)
    replay.pass_until(now_ms)
    return Tested(replay.fired, [each for each in asked if each.request_id.startswith(REQUEST)])


def load(path: Path, time_zone: str) -> tuple[Trigger, ...]:
    """The triggers of another file, whose other keys are not looked at. Raises `UsageError`."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read as TOML", cause=str(error)) from None
    if config.TRIGGER not in found:
        raise UsageError(f"{path} has no trigger", hint='write one as in: [trigger.enough], kind = "feedback", count = 500')
    return triggers.decode(found[config.TRIGGER], time_zone)


def mute(writer: EventWriter, trigger: Trigger, until_ms: int, reason: str) -> None:
    """It asks for no round before `until_ms`; 0: it may again."""
    origin, reason = commands.identities(writer).origin, commands.check_reason(reason)
    writer.append(types.TriggerMuted(origin, trigger.use_case or ANY_USE_CASE, trigger.name, until_ms, reason))


def fire(
    writer: EventWriter, configured: Sequence[Trigger], trigger: Trigger, reason: str, *, time_zone: str, now_ms: int
) -> None:
    """What a trigger waits for, one of those that are configured, has happened.

    Raises `UsageError` for one of another kind, `PolicyError` if it does not fire now.
    """
    if not isinstance(trigger, EventTrigger):
        raise UsageError(
            f'{trigger.name} is of kind "{trigger.kind}", and waits for no event',
            hint="ask for a round: `fedloop round start DIR --reason WHY`",
        )
    standing = next(each for each in standings(writer.log, configured, time_zone, now_ms) if each.trigger == trigger)
    if standing.held_back is not None:
        raise PolicyError(
            f"{trigger.name} does not fire now: {standing.held_back}", hint="`fedloop feedback triggers list DIR` says until when"
        )
    origin, reason = commands.identities(writer).origin, commands.check_reason(reason)
    writer.append(types.TriggerFired(origin, trigger.use_case or ANY_USE_CASE, trigger.name, reason))


class _Replay:
    """A fold that runs the operator, and lets the times of its schedules pass."""

    topics = Triggering.topics

    def __init__(self, configured: Sequence[Trigger], time_zone: str, made: Collection[str], *, only_made: bool) -> None:
        self.state = TriggeringState()
        self.fired: list[Fire] = []
        self._made = frozenset(made)
        self._operator = Triggering(configured, time_zone, made=self._made if only_made else None)
        self._zone = zone(time_zone)
        self._crons = [each.cron for each in configured if isinstance(each, ScheduleTrigger)]
        self._next_s = 0.0

    def apply(self, record: Record, payload: Payload) -> None:
        if self._operator.key(record, payload) is None:
            return
        if self._next_s:
            self.pass_until(record.appended_ms)
        self._note(self._operator.apply(self.state, record, payload))
        if not self._next_s:
            self._pass(record.appended_ms)

    def pass_until(self, now_ms: int) -> None:
        while 0 < self._next_s <= now_ms / 1000:
            self._pass(int(self._next_s * 1000))

    def _pass(self, now_ms: int) -> None:
        self._note(self._operator.advance(DEFAULT_RUN, self.state, now_ms))
        self._next_s = min((schedules.first_after(cron, self._zone, now_ms / 1000) for cron in self._crons), default=math.inf)

    def _note(self, emitted: Iterator[Emit]) -> None:
        before = {name: each.fired for name, each in self.state.triggers.items()}
        asked = {each.payload.request_id for each in emitted if isinstance(each.payload, types.RoundRequested)}
        for name, one in self.state.triggers.items():
            if one.fired != before.get(name, 0):
                joins, in_fact = one.request_id not in asked, one.request_id in self._made
                self.fired.append(Fire(name, one.fired_ms, one.why, one.request_id, joins, in_fact))
                del self.fired[:-MAX_SHOWN]
        for request_id in asked - self._made:
            self.state.under_way.requests.pop(request_id, None)


def _replay(log: EventLog, configured: Sequence[Trigger], time_zone: str, made: Collection[str], *, only_made: bool) -> _Replay:
    replay = _Replay(configured, time_zone, made, only_made=only_made)
    Reader(log, replay, identities=Identities()).catch_up()
    return replay


class _Requests:
    topics = (topics.ROUNDS,)

    def __init__(self) -> None:
        self.asked: dict[str, Asked] = {}

    def apply(self, record: Record, payload: Payload) -> None:
        if isinstance(payload, types.RoundRequested) and payload.run_id == DEFAULT_RUN:
            self.asked.setdefault(payload.request_id, Asked(payload.request_id, record.appended_ms, payload.reason))


def _asked(log: EventLog) -> list[Asked]:
    requests = _Requests()
    Reader(log, requests, identities=Identities()).catch_up()
    return list(requests.asked.values())


def _standing(trigger: Trigger, state: TriggeringState, time_zone: str, now_ms: int) -> Standing:
    one = state.of(trigger)
    next_s = 0.0
    if isinstance(trigger, ScheduleTrigger):
        next_s = schedules.first_after(trigger.cron, zone(time_zone), now_ms / 1000)
    return Standing(
        trigger,
        [_observed(trigger, use_case, new) for use_case, new in state.new.items() if trigger.watches(use_case)]
        if isinstance(trigger, FeedbackTrigger | BoundTrigger)
        else [],
        one.fired,
        one.fired_ms,
        one.why,
        one.request_id,
        sum(each > now_ms - DAY_MS for each in one.asked_ms),
        int(one.fired_ms + trigger.cooldown_s * 1000) if one.fired else 0,
        one.muted_until_ms,
        int(next_s * 1000) if math.isfinite(next_s) else 0,
        holding_back(trigger, one, now_ms),
    )


def _observed(trigger: FeedbackTrigger | BoundTrigger, use_case: str, new: NewFeedback) -> Observed:
    if isinstance(trigger, FeedbackTrigger):
        return Observed(use_case, getattr(new, trigger.of), trigger.count)
    values = getattr(new, trigger.metric)[-trigger.over :]
    if not values:
        return Observed(use_case, 0, trigger.over)
    mean = sum(values) / len(values)
    return Observed(use_case, len(values), trigger.over, mean, upper(mean, len(values)))
