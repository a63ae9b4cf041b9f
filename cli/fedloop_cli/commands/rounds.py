"""`fedloop round`: ask for rounds, and look at them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloop_cli import console, documents, options, waiting

if TYPE_CHECKING:
    from fedloop_events.writer import EventWriter

app = options.group(help="Ask for rounds, and look at them.")

RoundId = Annotated[str, typer.Argument(metavar="ROUND")]
Timeout = Annotated[float | None, typer.Option("--timeout", min=0, help="Give up after so many seconds (exit status 3).")]


@app.command(cls=options.Command)
def start(
    home: options.ServerFolder,
    rounds: Annotated[int, typer.Option("--rounds", min=1, max=10_000, help="How many rounds.")] = 1,
    reason: Annotated[str, typer.Option(help="Why, for whoever reads the log.")] = "operator",
    wait: Annotated[bool, typer.Option("--wait", help="Wait until they ended; exit status 1 if one made no release.")] = False,
    timeout_s: Timeout = None,
    json: options.Json = False,
) -> None:
    """Ask the server for rounds. It opens them when it runs and enough clients are there.

    With --wait, a request that is given up (--timeout, Ctrl-C) is withdrawn: no further round is opened for it.
    """
    from fedloop_events.errors import UnreachableError
    from fedloop_server.deployment import open_deployment
    from fedloop_server.operations import rounds as operations

    writer = open_deployment(home.directory, home.place).writer
    request_id = operations.request(writer, rounds, reason)
    if not wait:
        document = {"request_id": request_id, "rounds": rounds}
        console.show(document, f"requested {rounds} {'round' if rounds == 1 else 'rounds'}: {request_id}", as_json=json)
        return
    try:
        console.note(f"requested {rounds} as {request_id}; waiting")
        ended = operations.until_ended(home.follow(), request_id, timeout_s, config=home.config(), on_wait=waiting.Waiting().show)
    except (UnreachableError, KeyboardInterrupt):
        _withdraw(writer, request_id)
        raise
    found = {"request_id": request_id, "rounds": [documents.round_document(each) for each in ended]}
    console.show(found, documents.rounds_table(ended), as_json=json)
    if any(each.release is None for each in ended) or len(ended) < rounds:
        raise typer.Exit(1)


@app.command(cls=options.Command)
def withdraw(
    home: options.ServerFolder,
    request_id: Annotated[str, typer.Argument(metavar="REQUEST")],
    reason: Annotated[str, typer.Option(help="Why, for whoever reads the log.")] = "operator",
    json: options.Json = False,
) -> None:
    """Take a request back: its rounds that have not been opened are not opened any more."""
    from fedloop_server.deployment import open_deployment
    from fedloop_server.operations import rounds

    left = rounds.withdraw(open_deployment(home.directory, home.place).writer, request_id, reason)
    document = {"request_id": request_id, "withdrawn": left}
    console.show(document, f"{request_id} is withdrawn: {left} not opened", as_json=json)


@app.command(cls=options.Command)
def abort(
    home: options.ServerFolder,
    round_id: RoundId,
    reason: Annotated[str, typer.Option(help="Why, for whoever reads the log.")] = "operator",
    json: options.Json = False,
) -> None:
    """End a round without a release. The server does it, at once if it runs; what devices have spent in it is spent.

    Exit status 1 if the round is over, or its release is proposed.
    """
    from fedloop_server.deployment import open_deployment
    from fedloop_server.operations import awaiting, rounds

    rounds.abort(open_deployment(home.directory, home.place).writer, round_id, reason)
    awaited = awaiting.now(home.follow(), home.config())
    document = {"round_id": round_id, "reason": reason, "awaited": waiting.document(awaited)}
    console.show(document, f"{round_id} is to be aborted; {awaited.server}", as_json=json)


@app.command("list", cls=options.Command)
def list_(where: options.DeploymentFolder, json: options.Json = False) -> None:
    """List the rounds, oldest first, and what is still to come."""
    from fedloop_server.operations import awaiting, rounds

    followed = where.follow()
    found, wanted = rounds.summaries(followed), rounds.waiting(followed.rounds)
    awaited = awaiting.now(followed, where.config())
    document = {
        "rounds": [documents.round_document(each) for each in found],
        "requested": wanted,
        "epoch": followed.rounds.epoch,
        "awaited": waiting.document(awaited),
    }
    text = documents.rounds_table(found) + (f"\n{wanted} requested and not opened yet" if wanted else "")
    text += f"\nwaiting: {console.printable(awaited.line)}" if awaited.what != "nothing" else ""
    console.show(document, text, as_json=json)


@app.command(cls=options.Command)
def show(where: options.DeploymentFolder, round_id: RoundId, json: options.Json = False) -> None:
    """Show one round: its terms, who took part, who did not and why."""
    import msgspec
    from fedloop_server.operations import rounds

    followed = where.follow()
    state = rounds.find(followed.rounds, round_id)
    summary, detail = rounds.summarise(state, followed), rounds.detail(state, followed.rounds)
    document = documents.round_document(summary) | {
        "mechanism": detail.mechanism,
        "hyperparameters": detail.hyperparameters,
        "quorum": detail.quorum,
        "deadline_s": detail.deadline_s,
        "enough": detail.enough,
        "grace_s": detail.grace_s,
        "max_staleness": detail.max_staleness,
        "stale": detail.stale,
        "declined": detail.declined,
        "refused": [{"client": each.client_id, "reason": each.reason} for each in detail.refused],
        "replies": summary.replies,
    }
    rows = {
        name: ", ".join(value) if isinstance(value, list) else value
        for name, value in documents.metrics_shown(msgspec.to_builtins(document)).items()
        if name not in {"stale", "excluded", "refused", "declined", "mechanism", "hyperparameters"}
    }
    terms = (msgspec.to_builtins(detail.mechanism) if detail.mechanism is not None else {}) | detail.hyperparameters
    excluded = [[each.client_id, each.reason, each.detail] for each in summary.excluded]
    if detail.stale:
        rows["stale"] = ", ".join(f"{client_id} by {rounds_late}" for client_id, rounds_late in detail.stale.items())
    parts = [console.fields(rows), "", "terms", console.fields(terms) or "none", "", "excluded"]
    parts.append(console.table(["client", "reason", "detail"], excluded, empty="nobody"))
    console.show(document, "\n".join(parts), as_json=json)


@app.command(cls=options.Command)
def watch(
    where: options.DeploymentFolder,
    rounds: Annotated[int, typer.Option("--rounds", min=0, help="End after so many rounds have ended; 0: never.")] = 0,
    timeout_s: Timeout = None,
    json: options.Json = False,
) -> None:
    """Show what happens in rounds as it happens, until Ctrl-C. With --json one document, when it ends, so --rounds is needed."""
    from fedloop_events.errors import UsageError
    from fedloop_server.operations import rounds as operations

    if json and not rounds:
        raise UsageError("--json prints one document at the end, and there is none", hint="say after how many: --rounds N")
    ended: dict[str, dict[str, Any]] = {}
    lines: dict[str, str] = {}
    for each in operations.watch(where.follow(), rounds, timeout_s, config=where.config(), on_wait=waiting.Waiting().show):
        line = documents.round_line(each)
        if lines.get(each.round_id) != line:
            lines[each.round_id] = line
            console.note(line) if json else console.show({}, line, as_json=False)
        if each.over:
            ended[each.round_id] = documents.round_document(each)
    if json:
        console.show({"rounds": list(ended.values())}, "", as_json=True)


def _withdraw(writer: EventWriter, request_id: str) -> None:
    """Take back a request that nobody waits for any more; that this fails does not hide why it is given up."""
    from fedloop_events.errors import FedloopError
    from fedloop_server.operations import rounds

    try:
        left = rounds.withdraw(writer, request_id, "nobody waits for it any more")
        console.note(f"{request_id} is withdrawn: {left} not opened")
    except FedloopError as error:
        console.note(f"{request_id} is not withdrawn: {error.message}")
