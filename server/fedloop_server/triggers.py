"""Why rounds open by themselves: the `[trigger.NAME]` tables of `server.toml`, decoded strictly.

What they do is `feedback/operators/triggering.py`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from difflib import get_close_matches
from typing import Annotated, Any, ClassVar, Final, Literal, get_type_hints

import msgspec
from fedloop_events.errors import UsageError
from fedloop_events.types import IDENTIFIER_RULE, Identifier
from msgspec import Meta, Struct

from fedloop_server import schedules

REQUEST: Final = "t-"
"""How the id of a trigger's request begins."""
MAX_TRIGGERS: Final = 50
MAX_NAME_CHARS: Final = 40
MAX_OVER: Final = 500
MAX_PER_DAY: Final = 100
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")

Metric = Literal["satisfaction", "accuracy"]
Drifting = Literal["satisfaction", "accuracy", "labels", "embeddings"]
_Bound = Annotated[float, Meta(gt=0, le=1)]
_Seconds = Annotated[float, Meta(ge=1, le=366 * 24 * 3600)]


class Trigger(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What all kinds have; `MEANING` says what each key means, of a kind those of its own first."""

    MEANING: ClassVar[dict[str, str]] = {
        "use_case": "Whose feedback it watches; left out: every use case, each by itself.",
        "cooldown_s": "Seconds after it has fired in which it does not fire again.",
        "max_per_day": "Requests that it may make in any 24 hours.",
        "priority": "Of triggers that fire together the one of the highest priority gives the reason.",
        "rounds": "Rounds that it requests.",
    }
    kind: ClassVar[str]

    name: str
    use_case: Identifier | None = None
    cooldown_s: Annotated[float, Meta(ge=0, le=366 * 24 * 3600)] = 3600.0
    max_per_day: Annotated[int, Meta(ge=1, le=MAX_PER_DAY)] = 4
    priority: Annotated[int, Meta(ge=0, le=100)] = 50
    rounds: Annotated[int, Meta(ge=1, le=100)] = 1

    def watches(self, use_case: str) -> bool:
        return self.use_case in (None, use_case)


class FeedbackTrigger(Trigger, frozen=True, forbid_unknown_fields=True, kw_only=True):
    MEANING: ClassVar[dict[str, str]] = {
        "count": "Pieces of feedback since the last release.",
        "of": 'Which count: "all"; "high", those of high priority; "corrections".',
    }
    kind = "feedback"

    count: Annotated[int, Meta(ge=1, le=1_000_000)]
    of: Literal["all", "high", "corrections"] = "all"


class BoundTrigger(Trigger, frozen=True, forbid_unknown_fields=True, kw_only=True):
    MEANING: ClassVar[dict[str, str]] = {
        "below": "The bound.",
        "over": f"Latest observations that are below it by more than chance explains, at most {MAX_OVER}.",
    }
    metric: ClassVar[Metric]

    below: _Bound
    over: Annotated[int, Meta(ge=10, le=MAX_OVER)] = 50


class SatisfactionTrigger(BoundTrigger, frozen=True, forbid_unknown_fields=True, kw_only=True):
    kind = "satisfaction"
    metric = "satisfaction"


class AccuracyTrigger(BoundTrigger, frozen=True, forbid_unknown_fields=True, kw_only=True):
    kind = "accuracy"
    metric = "accuracy"


class DriftTrigger(Trigger, frozen=True, forbid_unknown_fields=True, kw_only=True):
    MEANING: ClassVar[dict[str, str]] = {
        "metrics": 'What drifted: "satisfaction" or "accuracy", if they fell, "labels", "embeddings".',
        "after": "Pieces of feedback after the drift, from which a round can learn what is new, before it fires.",
    }
    kind = "drift"

    metrics: Annotated[tuple[Drifting, ...], Meta(min_length=1, max_length=4)] = (
        "satisfaction",
        "accuracy",
        "labels",
        "embeddings",
    )
    after: Annotated[int, Meta(ge=0, le=1_000_000)] = 0


class ForecastTrigger(Trigger, frozen=True, forbid_unknown_fields=True, kw_only=True):
    MEANING: ClassVar[dict[str, str]] = {
        "metric": 'What is expected to fall: "satisfaction" or "accuracy".',
        "below": "The bound that it is expected to cross.",
        "within_s": "Seconds in which it is expected to.",
    }
    kind = "forecast"

    metric: Metric
    below: _Bound
    within_s: _Seconds = 3600.0


class ScheduleTrigger(Trigger, frozen=True, forbid_unknown_fields=True, kw_only=True):
    MEANING: ClassVar[dict[str, str]] = {"cron": 'When, as cron says it, in the time zone above: "30 2 * * *".'}
    kind = "schedule"

    cron: Annotated[str, Meta(max_length=200)]
    cooldown_s: Annotated[float, Meta(ge=0, le=366 * 24 * 3600)] = 0.0
    max_per_day: Annotated[int, Meta(ge=1, le=MAX_PER_DAY)] = MAX_PER_DAY


class EventTrigger(Trigger, frozen=True, forbid_unknown_fields=True, kw_only=True):
    MEANING: ClassVar[dict[str, str]] = {}
    kind = "event"


_KINDS: Final[dict[str, type[Trigger]]] = {
    each.kind: each
    for each in (
        FeedbackTrigger,
        SatisfactionTrigger,
        AccuracyTrigger,
        DriftTrigger,
        ForecastTrigger,
        ScheduleTrigger,
        EventTrigger,
    )
}

EXAMPLES: Final = """\
# What opens rounds by itself, a table [trigger.NAME] for each; without one, only requests and the schedule do. The pipeline,
# `fedloop feedback run`, reads them when it starts. kind: feedback, satisfaction, accuracy, drift, forecast, schedule, event.
# Each takes use_case, cooldown_s, max_per_day, priority and rounds. As in:
#
# [trigger.enough]
# kind = "feedback"
# count = 500
#
# [trigger.unhappy]
# kind = "satisfaction"
# below = 0.7
# over = 50
#
# [trigger.drifted]
# kind = "drift"
# priority = 80
"""


def decode(tables: object, time_zone: str) -> tuple[Trigger, ...]:
    """The triggers that the parsed tables hold, in their order. Raises `UsageError` that names table, key, value and what is
    allowed."""
    if not isinstance(tables, dict):
        raise UsageError(
            f"trigger = {tables!r} in the server's configuration is not allowed: triggers are tables",
            hint='write one as in: [trigger.enough], and below it kind = "feedback" and count = 500',
        )
    if len(tables) > MAX_TRIGGERS:
        raise UsageError(f"the server's configuration has {len(tables)} triggers; {MAX_TRIGGERS} are allowed")
    return tuple(_decode(name, table, time_zone) for name, table in tables.items())


def _decode(name: str, table: object, time_zone: str) -> Trigger:
    where = f"[trigger.{name}] of the server's configuration"
    if not _NAME.fullmatch(name) or len(name) > MAX_NAME_CHARS:
        raise UsageError(
            f"{name!r} is no name for a trigger", hint=IDENTIFIER_RULE.replace("1 to 80", f"it has 1 to {MAX_NAME_CHARS}")
        )
    if not isinstance(table, dict):
        raise UsageError(
            f"trigger.{name} = {table!r} in the server's configuration is not allowed: a trigger is a table",
            hint=f'write [trigger.{name}], and below it kind = "feedback" and count = 500',
        )
    kind = _kind(table.get("kind"), where)
    meanings = _meanings(kind)
    values: dict[str, Any] = {}
    hints = get_type_hints(kind, include_extras=True)
    for key, value in table.items():
        if key == "kind":
            continue
        if key not in meanings:
            raise UsageError(
                f'"{key}" is no key of {where}, whose kind is "{kind.kind}"{_near(key, meanings)}',
                hint=f"the keys are kind, {', '.join(meanings)}",
            )
        try:
            values[key] = msgspec.convert(_finite(value), hints[key])
        except msgspec.ValidationError as error:
            expected = str(error).replace("`", "")
            raise _wrong(key, value, where, f"{expected[:1].lower()}{expected[1:]}. {meanings[key]}") from None
    for field in msgspec.structs.fields(kind):
        if field.required and field.name != "name" and field.name not in values:
            raise UsageError(f"{where} lacks {field.name}", hint=f"{field.name}: {meanings[field.name]}")
    made = kind(name=name, **values)
    if isinstance(made, ScheduleTrigger):
        try:
            schedules.check(made.cron, time_zone)
        except UsageError as error:
            raise _wrong("cron", made.cron, where, error.message) from None
    return made


def dump(triggers: tuple[Trigger, ...]) -> str:
    """Their tables as TOML, each key that is not as by default with what it means; or examples, if there are none."""
    if not triggers:
        return EXAMPLES
    lines: list[str] = []
    for each in triggers:
        lines += [f"[trigger.{_key(each.name)}]", f'kind = "{each.kind}"']
        for field in msgspec.structs.fields(each):
            value = getattr(each, field.name)
            if field.name != "name" and (field.required or value != field.default):
                lines += [f"# {_meanings(type(each))[field.name]}", f"{field.name} = {msgspec.json.encode(value).decode()}"]
        lines.append("")
    return "\n".join(lines)


def find(triggers: tuple[Trigger, ...], name: str) -> Trigger:
    """Raises `UsageError` if none is called so."""
    names = [each.name for each in triggers]
    if name not in names:
        hint = f"there are {', '.join(names)}" if names else "server.toml has no [trigger.NAME]"
        raise UsageError(f"there is no trigger {name!r}{_near(name, names)}", hint=hint)
    return triggers[names.index(name)]


def _kind(given: object, where: str) -> type[Trigger]:
    kinds = ", ".join(_KINDS)
    if given is None:
        raise UsageError(f"{where} lacks kind", hint=f"the kinds are {kinds}")
    if not isinstance(given, str) or given not in _KINDS:
        raise UsageError(f"kind = {given!r} in {where} is not allowed{_near(str(given), _KINDS)}", hint=f"the kinds are {kinds}")
    return _KINDS[given]


def _meanings(kind: type[Trigger]) -> dict[str, str]:
    bound = BoundTrigger.MEANING if issubclass(kind, BoundTrigger) else {}
    return {**bound, **kind.MEANING, **Trigger.MEANING}


def _key(name: str) -> str:
    """A bare key of TOML has no dots."""
    return f'"{name}"' if "." in name else name


def _near(given: str, known: Mapping[str, object] | list[str]) -> str:
    near = get_close_matches(given, list(known), 1)
    return f'; did you mean "{near[0]}"?' if near else ""


def _finite(value: object) -> object:
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise msgspec.ValidationError("expected a finite number or a word")
    return value


def _wrong(key: str, value: object, where: str, allowed: str) -> UsageError:
    return UsageError(f"{key} = {value!r} in {where} is not allowed: {allowed}")
