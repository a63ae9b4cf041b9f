"""`fedloop feedback quarantine`: what the second gate held back, and what becomes of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from fedloop_cli import console, options

if TYPE_CHECKING:
    from fedloop_server.feedback.quarantine import Held

app = options.group(help="See what looked personal to the second gate, and decide about it.")

EventId = Annotated[str, typer.Argument(metavar="EVENT")]
Reason = Annotated[str, typer.Option(help="Why, for whoever reads the log; never what the event holds.")]
_SHOWN: Final = 200


@app.command("list", cls=options.Command)
def list_(where: options.DeploymentFolder, json: options.Json = False) -> None:
    """List what was held back, oldest first, what was found in it by type, and whose masker misses often."""
    from fedloop_server.feedback import quarantine

    found = quarantine.listed(where.open_log())
    document = {
        "events": [_document(each) for each in found.events],
        "found": found.found,
        "reasons": found.reasons,
        "clients": [
            {"client_id": each.client_id, "held": each.held, "feedback": each.feedback, "share": each.share, "often": each.often}
            for each in found.clients
        ],
    }
    heads = ["event", "client", "use case", "reason", "found", "recorded", "status"]
    rows = [
        [each.event_id, each.client_id, each.use_case, each.reason, _counts(each), console.moment(each.recorded_ms), each.status]
        for each in found.events[-_SHOWN:]
    ]
    parts = [console.table(heads, rows, empty="nothing is held back")]
    if len(found.events) > _SHOWN:
        parts.insert(0, f"the latest {_SHOWN} of {len(found.events)} (all of them: --json)")
    if found.found:
        parts += ["", console.fields({"found": found.found, "reasons": found.reasons})]
    if found.clients:
        clients = [[each.client_id, each.held, each.feedback, f"{each.share:.1%}"] for each in found.clients]
        parts += ["", console.table(["client", "held back in a week", "of its feedback", "share"], clients)]
    parts += [
        f"the masker of {console.printable(each.client_id)} misses often: look at how it is set up"
        for each in found.clients
        if each.often
    ]
    console.show(document, "\n".join(parts), as_json=json)


@app.command(cls=options.Command)
def show(
    where: options.DeploymentFolder,
    event_id: EventId,
    text: Annotated[bool, typer.Option("--text", help="Print its texts too, which may be personal.")] = False,
    json: options.Json = False,
) -> None:
    """Show where an event stands, why it was held back, and what was found in it, by type.

    With --text, exit status 4 if the log no longer holds it, its author did not sign it, or its user has taken it back.
    """
    from fedloop_server.feedback import quarantine

    shown = quarantine.show(where.open_log(), event_id, text=text)
    if text:
        console.note("warning: what follows may be personal: keep it off files, tickets and chats")
    held = shown.held
    document = _document(held) | {"stream": shown.stream, "offset": shown.offset, "texts": shown.texts}
    at = "the log no longer holds it" if shown.offset is None else console.offset(shown.stream, shown.offset)
    rows = {name.replace("_", " "): value for name, value in _document(held).items()} | {"offset": at}
    parts = [console.fields(rows)]
    parts += ["", *map(console.printable, shown.texts)] if shown.texts is not None else []
    console.show(document, "\n".join(parts), as_json=json)


@app.command(cls=options.Command)
def release(home: options.ServerFolder, event_id: EventId, reason: Reason, json: options.Json = False) -> None:
    """Let the pipeline take in feedback as it is: nothing in it is personal. It is scored once, however often this is called.

    Exit status 4 if it was dropped, its author did not sign it, the log no longer holds it, or its user has taken it back.
    """
    from fedloop_server.deployment import open_deployment
    from fedloop_server.feedback import quarantine

    held = quarantine.release(open_deployment(home.directory, home.place).writer, event_id, reason)
    console.show(_document(held), f"{event_id} is released: it counts as feedback from now on", as_json=json)


@app.command(cls=options.Command)
def drop(home: options.ServerFolder, event_id: EventId, reason: Reason = "operator", json: options.Json = False) -> None:
    """Leave an event out for ever. Exit status 4 if it was released."""
    from fedloop_server.deployment import open_deployment
    from fedloop_server.feedback import quarantine

    held = quarantine.drop(open_deployment(home.directory, home.place).writer, event_id, reason)
    console.show(_document(held), f"{event_id} is dropped", as_json=json)


def _counts(held: Held) -> str | None:
    return ", ".join(f"{count} {kind}" for kind, count in held.found.items()) or None


def _document(held: Held) -> dict[str, Any]:
    return {
        "event_id": held.event_id,
        "status": held.status,
        "why": held.why,
        "decided": console.moment(held.decided_ms),
        "reason": held.reason,
        "detail": held.detail,
        "found": held.found,
        "source_topic": held.source_topic,
        "client_id": held.client_id,
        "use_case": held.use_case,
        "release": held.release,
        "given": console.moment(held.given_ms),
        "recorded": console.moment(held.recorded_ms),
    }
