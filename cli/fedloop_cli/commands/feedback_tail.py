"""`fedloop feedback tail`: what the pipeline has just found out."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloop_cli import console, options
from fedloop_cli.commands import log

if TYPE_CHECKING:
    from fedloop_events.envelope import Record
    from fedloop_events.types import Payload


def tail(
    where: options.DeploymentFolder,
    lines: Annotated[int, typer.Option("--lines", "-n", min=0, help="How many of the last events.")] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on with what is appended, until Ctrl-C.")] = False,
    json: options.Json = False,
) -> None:
    """Show what the pipeline scored, held back, measured, found and curated last, without any text.

    With --follow, --json prints one document a line for each event.
    """
    from fedloop_events import topics

    wanted = (topics.QUARANTINE, topics.SCORED, topics.METRICS, topics.TRAINING)
    log.show_end(where.open_log(), wanted, lines, _document, _line, follow=follow, as_json=json)


def _document(record: Record) -> dict[str, Any]:
    return {
        "appended": console.moment(record.appended_ms),
        "id": record.id,
        "type": record.type,
        "use_case": record.key,
        "what": _what(record),
    }


def _line(record: Record) -> str:
    return f"{console.moment(record.appended_ms)}  {console.printable(record.key):20}  {console.printable(_what(record))}"


def _what(record: Record) -> str:
    from fedloop_events.envelope import decode
    from fedloop_events.errors import InvalidEventError

    try:
        payload = decode(record)
    except InvalidEventError as error:
        return f"not an event: {error.message}"
    return record.type if payload is None else _said(payload) or record.type


def _said(payload: Payload) -> str:
    """What an event says, on one line, without a word of any user's; "" for one of another kind."""
    from fedloop_events import types

    match payload:
        case types.FeedbackScored():
            content = "" if payload.satisfaction is None else f", satisfaction {payload.satisfaction:.2f}"
            return f"scored: {payload.client_id} on {payload.release}{content}, priority {payload.priority:.2f} ({payload.lane})"
        case types.ScoreWithdrawn():
            return f"withdrawn: feedback {payload.feedback_id} of {payload.client_id}"
        case types.EventQuarantined():
            found = ", ".join(f"{count} {kind}" for kind, count in payload.found.items())
            return f"held back: {payload.reason}{f' ({found})' if found else ''}, by {payload.client_id or 'nobody known'}"
        case types.QuarantineDecided():
            return f"{payload.event_id} is to {payload.decision}: {payload.reason}"
        case types.MetricsWindowed():
            content = "" if payload.satisfaction is None else f", satisfaction {payload.satisfaction:.2f}"
            return f"window of {payload.width}: {payload.feedback} pieces of feedback on {payload.release}{content}"
        case types.DriftDetected():
            moved = (
                "" if payload.before is None or payload.after is None else f" from {payload.before:.2f} to {payload.after:.2f}"
            )
            return f"drift: {payload.metric}{moved} ({', '.join(payload.detectors)})"
        case types.MetricForecast():
            return f"forecast: {payload.metric} {payload.expected:.2f} ({payload.low:.2f} to {payload.high:.2f})"
        case types.ExampleCurated():
            return f"curated: {payload.kind} of {payload.client_id}"
        case types.ExampleWithdrawn():
            return f"withdrawn: example {payload.example_id} ({payload.reason})"
        case types.TriggerMuted():
            return f"trigger {payload.trigger} muted: {payload.reason}"
        case types.TriggerFired():
            return f"trigger {payload.trigger} fired: {payload.reason}"
        case _:
            return ""
