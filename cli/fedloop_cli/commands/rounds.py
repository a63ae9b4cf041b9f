"""`fedloop round`: ask for rounds, and look at them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Annotated

import typer

from fedloop_cli import console, options

if TYPE_CHECKING:
    from fedloop_cli.state import Followed, RoundSummary

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
    """Ask the server for rounds. It opens them when it runs and enough clients are there."""
    from fedloop_server.deployment import open_deployment

    from fedloop_cli.requests import request_rounds

    deployment = open_deployment(home.directory, home.place)
    request_id = request_rounds(deployment.writer, rounds, reason)
    if wait:
        console.note(f"requested {rounds} as {request_id}; waiting")
        _wait(home, request_id, json, timeout_s)
        return
    document = {"request_id": request_id, "rounds": rounds}
    console.show(document, f"requested {rounds} {'round' if rounds == 1 else 'rounds'}: {request_id}", as_json=json)


@app.command("list", cls=options.Command)
def list_(where: options.Deployment, json: options.Json = False) -> None:
    """List the rounds, oldest first, and what is still to come."""
    from fedloop_cli import state

    followed = state.open_state(where)
    found = _summaries(followed)
    pending = sum(request.rounds - len(request.numbers) for request in followed.rounds.requests.values() if request.pending)
    document = {"rounds": found, "requested": pending, "epoch": followed.rounds.epoch}
    text = state.rounds_table(found) + (f"\n{pending} requested and not opened yet" if pending else "")
    console.show(document, text, as_json=json)


@app.command(cls=options.Command)
def show(where: options.Deployment, round_id: RoundId, json: options.Json = False) -> None:
    """Show one round: its terms, who took part, who did not and why."""
    import msgspec

    from fedloop_cli import state

    followed = state.open_state(where)
    found = followed.round(round_id)
    summary = state.summarise(followed, found)
    opened = found.opened
    document = msgspec.to_builtins(summary) | {
        "mechanism": opened.mechanism if opened is not None else None,
        "hyperparameters": opened.hyperparameters if opened is not None else {},
        "quorum": opened.quorum if opened is not None else None,
        "deadline_s": opened.deadline_s if opened is not None else None,
        "declined": found.declined,
        "refused": [{"client": each.client_id, "reason": each.reason} for each in found.refused.values()],
        "replies": len(found.replies),
    }
    rows = {
        name: ", ".join(value) if isinstance(value, list) else value
        for name, value in msgspec.to_builtins(document).items()
        if name not in {"excluded", "refused", "declined", "mechanism", "hyperparameters"}
    }
    terms = {
        **(msgspec.to_builtins(opened.mechanism) if opened is not None and opened.mechanism is not None else {}),
        **(opened.hyperparameters if opened is not None else {}),
    }
    parts = [console.fields(rows), "", "terms", console.fields(terms) or "none", "", "excluded"]
    parts.append(
        console.table(["client", "reason", "detail"], [list(each.values()) for each in summary.excluded], empty="nobody")
    )
    console.show(document, "\n".join(parts), as_json=json)


@app.command(cls=options.Command)
def watch(
    where: options.Deployment,
    rounds: Annotated[int, typer.Option("--rounds", min=0, help="End after so many rounds have ended; 0: never.")] = 0,
    timeout_s: Timeout = None,
    json: options.Json = False,
) -> None:
    """Say what happens in rounds as it happens, until Ctrl-C. With --json one document, when it ends, so --rounds is needed."""
    from fedloop_events.errors import UnreachableError, UsageError

    from fedloop_cli import state

    if json and not rounds:
        raise UsageError("--json prints one document at the end, and there is none", hint="say after how many: --rounds N")
    followed = state.open_state(where)
    said: dict[str, str] = {}
    before = {each.round_id for each in _summaries(followed) if _over(each)}
    deadline = time.monotonic() + timeout_s if timeout_s is not None else None
    while True:
        found = _summaries(followed)
        for each in found:
            line = _progress(followed, each)
            if said.get(each.round_id) != line and each.round_id not in before:
                said[each.round_id] = line
                console.note(line) if json else console.show({}, line, as_json=False)
        ended = [each for each in found if _over(each) and each.round_id not in before]
        if rounds and len(ended) >= rounds:
            if json:
                console.show({"rounds": ended}, "", as_json=True)
            return
        if deadline is not None and time.monotonic() > deadline:
            raise UnreachableError("the rounds have not ended in time", hint="is `fedloop server run` running?")
        _pause(followed)


def _wait(where: options.Where, request_id: str, json: bool, timeout_s: float | None) -> None:
    from fedloop_events.errors import UnreachableError

    from fedloop_cli import state

    followed = state.open_state(where)
    deadline = time.monotonic() + timeout_s if timeout_s is not None else None
    while True:
        request = followed.rounds.requests.get(request_id)
        numbers = request.numbers if request is not None else []
        found = [each for each in _summaries(followed) if each.number in numbers]
        if request is not None and not request.pending and all(map(_over, found)):
            console.show({"request_id": request_id, "rounds": found}, state.rounds_table(found), as_json=json)
            if any(each.release is None for each in found) or len(found) < request.rounds:
                raise typer.Exit(1)
            return
        if deadline is not None and time.monotonic() > deadline:
            raise UnreachableError("the rounds have not ended in time", hint="is `fedloop server run` running?")
        _pause(followed)


def _summaries(followed: Followed) -> list[RoundSummary]:
    from fedloop_cli import state

    return [state.summarise(followed, each) for each in followed.rounds.rounds.values()]


def _over(each: RoundSummary) -> bool:
    from fedloop_cli import state

    return each.state in state.OVER


def _progress(followed: Followed, each: RoundSummary) -> str:
    line = f"{each.round_id} {each.state}"
    if each.kind is not None and not _over(each):
        replies = len(followed.rounds.rounds[each.round_id].replies)
        line += f": {each.kind} on {each.base_release}, {replies} of {len(each.cohort)} have replied"
    if each.accuracy is not None:
        line += f", accuracy {each.accuracy:.4f}"
    if each.seconds is not None:
        line += f", {each.seconds:.1f} s"
    why = each.reason or each.decision
    return console.printable(line + (f" ({why})" if why else ""))


def _pause(followed: Followed) -> None:
    """Until something is appended, for a short while at most."""
    followed.log.read(after=followed.log.end(), limit=1, wait_s=1.0)
    followed.catch_up()
