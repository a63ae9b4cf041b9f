"""`fedloop feedback triggers`: why rounds open by themselves."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedloop_cli import console, options

if TYPE_CHECKING:
    from fedloop_server.config import ServerConfig
    from fedloop_server.feedback.triggers import Fire, Observed, Standing
    from fedloop_server.triggers import Trigger

app = options.group(help="See why rounds open by themselves, try triggers on the past, mute one, or fire one.")

Name = Annotated[str, typer.Argument(metavar="TRIGGER")]
Why = Annotated[str, typer.Option(help="Why, for whoever reads the log.")]
_DURATION: Final = re.compile(r"(\d{1,6})([smhd]?)")
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}
_SHOWN: Final = 200


@app.command("list", cls=options.Command)
def list_(home: options.ServerFolder, json: options.Json = False) -> None:
    """List the triggers of server.toml: what each waits for, how far it is, when it fired last, and what holds it back."""
    from fedloop_server.feedback import triggers

    config = _config(home)
    found = triggers.standings(home.open_log(), config.triggers, config.time_zone, _now_ms())
    heads = ["trigger", "kind", "waits for", "is at", "fired", "last", "why", "held back"]
    rows = [
        [
            each.trigger.name,
            each.trigger.kind,
            _waits_for(each.trigger),
            _is_at(each),
            each.fired,
            console.moment(each.fired_ms),
            each.why,
            _held_back(each),
        ]
        for each in found
    ]
    empty = f"no trigger: {home.directory}/server/server.toml has no [trigger.NAME]"
    console.show({"triggers": [_document(each) for each in found]}, console.table(heads, rows, empty=empty), as_json=json)


@app.command("test", cls=options.Command)
def look_back(
    home: options.ServerFolder,
    other: Annotated[
        Path | None,
        typer.Option("--with", metavar="FILE", help="Take the [trigger.NAME] tables of this TOML file in place of server.toml."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Say what would have fired in the log's past, and when, and what triggers asked for in fact.

    Rounds and releases are taken as they were: a request that was not made in fact opens none.
    """
    from fedloop_server.feedback import triggers

    config = _config(home)
    configured = config.triggers if other is None else triggers.load(other, config.time_zone)
    tested = triggers.look_back(home.open_log(), configured, config.time_zone, _now_ms())
    document = {
        "triggers": [each.name for each in configured],
        "fired": [
            {
                "trigger": each.trigger,
                "at": console.moment(each.at_ms),
                "why": each.why,
                "request": each.request_id,
                "joins": each.joins,
                "in_fact": each.in_fact,
            }
            for each in tested.fired
        ],
        "asked": [{"request": each.request_id, "at": console.moment(each.at_ms), "reason": each.reason} for each in tested.asked],
    }
    rows = [[console.moment(each.at_ms), each.trigger, each.why, _came_of(each)] for each in tested.fired[-_SHOWN:]]
    parts = [console.table(["at", "trigger", "why", "what came of it"], rows, empty="nothing would have fired")]
    if len(tested.fired) > _SHOWN:
        parts.insert(0, f"the latest {_SHOWN} of {len(tested.fired)} (all of them: --json)")
    asked = len(tested.asked)
    parts.append(f"{asked} {'round was' if asked == 1 else 'rounds were'} asked for by triggers in fact")
    console.show(document, "\n".join(parts), as_json=json)


@app.command(cls=options.Command)
def mute(
    home: options.ServerFolder,
    trigger: Name,
    duration: Annotated[str, typer.Option("--for", metavar="TIME", help="For how long, as in 90s, 30m, 2h, 7d; 0: no longer.")],
    reason: Why = "operator",
    json: options.Json = False,
) -> None:
    """Let a trigger ask for no round for a time. What happens meanwhile is not made up."""
    from fedloop_server import triggers as configured
    from fedloop_server.deployment import open_deployment
    from fedloop_server.feedback import triggers

    found, duration_s = configured.find(_config(home).triggers, trigger), _duration_s(duration)
    until_ms = _now_ms() + duration_s * 1000 if duration_s else 0
    triggers.mute(open_deployment(home.directory, home.place).writer, found, until_ms, reason)
    until = console.moment(until_ms)
    text = f"{found.name} may ask for rounds again" if until is None else f"{found.name} asks for no round until {until}"
    console.show({"trigger": found.name, "muted_until": until}, text, as_json=json)


@app.command(cls=options.Command)
def fire(home: options.ServerFolder, trigger: Name, reason: Why = "operator", json: options.Json = False) -> None:
    """Say that what a trigger of kind "event" waits for has happened, such as a new document. The pipeline asks for the round.

    Exit status 4 if the trigger is muted, cools down, or has asked often enough for a day.
    """
    from fedloop_server import triggers as configured
    from fedloop_server.deployment import open_deployment
    from fedloop_server.feedback import triggers

    config = _config(home)
    found = configured.find(config.triggers, trigger)
    writer = open_deployment(home.directory, home.place).writer
    triggers.fire(writer, config.triggers, found, reason, time_zone=config.time_zone, now_ms=_now_ms())
    console.show(
        {"trigger": found.name, "reason": reason}, f"{found.name} has fired: the pipeline asks for the round", as_json=json
    )


def _config(home: options.Home) -> ServerConfig:
    from fedloop_events.errors import UsageError

    config = home.config()
    if config is None:
        raise UsageError(f"{home.directory} holds no server.toml", hint="name the folder in which the server was set up")
    return config


def _now_ms() -> int:
    return int(time.time() * 1000)


def _duration_s(text: str) -> int:
    from fedloop_events.errors import UsageError

    found = _DURATION.fullmatch(text)
    if found is None:
        raise UsageError(f"--for {text} is no length of time", hint="give one as in 90s, 30m, 2h or 7d; 0: no longer muted")
    return int(found[1]) * _SECONDS[found[2]]


def _document(each: Standing) -> dict[str, Any]:
    return {
        "trigger": each.trigger.name,
        "kind": each.trigger.kind,
        "use_case": each.trigger.use_case,
        "waits_for": _waits_for(each.trigger),
        "observed": [
            {"use_case": of.use_case, "count": of.count, "of": of.of, "mean": of.mean, "at_most": of.at_most}
            for of in each.observed
        ],
        "next": console.moment(each.next_ms),
        "fired": each.fired,
        "last": console.moment(each.fired_ms),
        "why": each.why,
        "request": each.request_id,
        "asked_in_a_day": each.asked_in_a_day,
        "max_per_day": each.trigger.max_per_day,
        "priority": each.trigger.priority,
        "cooling_until": console.moment(each.cooling_until_ms),
        "muted_until": console.moment(each.muted_until_ms),
        "held_back": each.held_back,
    }


def _waits_for(trigger: Trigger) -> str:
    from fedloop_server import triggers

    match trigger:
        case triggers.FeedbackTrigger():
            what = {"all": "new feedback", "high": "new feedback of high priority", "corrections": "new corrections"}[trigger.of]
            return f"{trigger.count} {what}"
        case triggers.BoundTrigger():
            return f"below {trigger.below:g} over {trigger.over}"
        case triggers.DriftTrigger():
            return f"drift of {', '.join(trigger.metrics)}"
        case triggers.ForecastTrigger():
            return f"{trigger.metric} expected below {trigger.below:g} within {trigger.within_s:g} s"
        case triggers.ScheduleTrigger():
            return trigger.cron
        case _:
            return "an event"


def _is_at(each: Standing) -> str | None:
    if each.next_ms:
        return f"next {console.moment(each.next_ms)}"
    return ", ".join(_observed(of) for of in each.observed) or None


def _observed(of: Observed) -> str:
    if of.mean is None or of.at_most is None:
        return f"{of.use_case} {of.count} of {of.of}"
    return f"{of.use_case} {of.mean:.2f}, at most {of.at_most:.2f} ({of.count} of {of.of})"


def _held_back(each: Standing) -> str | None:
    until_ms = {"muted": each.muted_until_ms, "cooling down": each.cooling_until_ms}.get(each.held_back or "", 0)
    return f"{each.held_back} until {console.moment(until_ms)}" if until_ms else each.held_back


def _came_of(each: Fire) -> str:
    if each.joins:
        return f"joined {each.request_id}"
    return f"asked for {each.request_id}" if each.in_fact else "nothing: it was not asked for"
