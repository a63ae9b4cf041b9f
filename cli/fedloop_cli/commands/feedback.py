"""`fedloop feedback`: the pipeline that reads what users say, and what came of it."""

from __future__ import annotations

from typing import Annotated, Literal

import typer

from fedloop_cli import console, options
from fedloop_cli.commands import (
    feedback_export,
    feedback_lake,
    feedback_quarantine,
    feedback_stats,
    feedback_tail,
    feedback_triggers,
)

app = options.group(help="Run the feedback pipeline, and look at what it found.")
app.add_typer(feedback_lake.app, name="lake")
app.add_typer(feedback_triggers.app, name="triggers")
app.add_typer(feedback_quarantine.app, name="quarantine")
app.command(cls=options.Command)(feedback_export.export)
app.command(cls=options.Command)(feedback_tail.tail)
app.command(cls=options.Command)(feedback_stats.stats)


@app.command(cls=options.Command)
def run(
    home: options.ServerFolder,
    until_idle: Annotated[bool, typer.Option("--until-idle", help="End when all feedback is taken in.")] = False,
    gate: Annotated[
        Literal["fast", "full"],
        typer.Option(
            help="What looks for personal values again: patterns for the worst ones, or the whole masker, which takes long."
        ),
    ] = "fast",
    metrics: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Serve /metrics (Prometheus) and /healthz there; a PORT alone is on loopback."),
    ] = None,
    json: options.Json = False,
) -> None:
    """Run the pipeline until Ctrl-C, beside the server: it checks feedback again, scores, measures and curates it, and asks for
    rounds.

    Killed at any point and started again, it goes on where it was. One runs for a folder.
    """
    import msgspec
    from fedloop_server.feedback import running

    from fedloop_cli.signals import stoppable

    with stoppable() as stop:
        ran = running.run(home.directory, home.place, stop.event, until_idle=until_idle, gate=gate, metrics=metrics)
    document = msgspec.to_builtins(ran) | {"interrupted": stop.interrupted}
    console.show(document, f"{ran.read} events read, {ran.emitted} emitted, {ran.refused} refused", as_json=json)
    if stop.interrupted:
        raise typer.Exit(130)
