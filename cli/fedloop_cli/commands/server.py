"""`fedloop server`: make a deployment, run its server, revoke a client."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloop_cli import console, documents, options, task_options
from fedloop_cli.waiting import Waiting

if TYPE_CHECKING:
    from fedloop_events.envelope import Record
    from fedloop_events.types import Payload

app = options.group(help="Make a deployment, run its server, revoke a client.")


@app.command(cls=task_options.FilesCommand)
def init(
    home: options.ServerFolder,
    as_is: Annotated[
        bool,
        typer.Option(
            "--held-out-as-is",
            help="Mask no held-out message: they are masked already, or the figures may be of texts that no device sees.",
        ),
    ] = False,
    epsilon: Annotated[float, typer.Option(help="Privacy budget of each client for its whole life.")] = 8.0,
    delta: Annotated[float, typer.Option(help="The delta of that budget.")] = 1e-5,
    no_dp: Annotated[bool, typer.Option("--no-dp", help="Rounds without differential privacy.")] = False,
    strategy: Annotated[
        str,
        typer.Option(
            metavar="ffa|fedavg|svd|stack|residual|fedavgm|fedadam",
            help="How adapters are merged; default: ffa (for chat fedadam), without privacy fedavg.",
        ),
    ] = "default",
    rounds: Annotated[int, typer.Option(help="How many rounds the budget is planned for.")] = 8,
    examples: Annotated[int, typer.Option(help="How many examples a device is assumed to have, from public knowledge.")] = 1000,
    quorum: Annotated[int, typer.Option(help="Fewest clients that make a round.")] = 2,
    model: Annotated[
        str | None, typer.Option(metavar="NAME", help="Package or folder of the base model.", show_default="the task's")
    ] = None,
    model_dir: Annotated[Path | None, typer.Option(metavar="DIR", help="Where base models lie.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the first release's tensors.")] = 0,
    json: options.Json = False,
) -> None:
    """Make a deployment in a new folder DIR. Started again after a crash, it ends what it began.

    Its log and blobs are in DIR, or where --log and --blobs say; DIR/deployment.toml remembers that for every other command.
    All other settings stand, each explained, in DIR/server/server.toml, which the server reads when it starts. Settings with
    which no round can ever run are refused.
    """
    from fedloop_server.config import COHORT, MAX_COHORT

    from fedloop_cli import deploying

    task = task_options.chosen()
    settings: dict[str, Any] = {
        "epsilon": "none" if no_dp else epsilon,
        "delta": delta,
        "strategy": strategy,
        "planned_rounds": rounds,
        "nominal_examples": examples,
        "quorum": quorum,
        "cohort_size": min(max(quorum, COHORT), MAX_COHORT),
        "model_dir": str(model_dir.absolute()) if model_dir is not None else "",
    }
    material = task.material(task_options.of_task(task.files), task_options.of_task(task.columns))
    made = deploying.deploy(home.directory, home.place, task, material, settings, base_model=model, seed=seed, as_is=as_is)
    for note in material.notes:
        console.note(f"warning: {console.printable(note)}")
    skipped = material.skipped | made.skipped
    for what, count in skipped.items():
        console.note(f"warning: {count} rows skipped: {what}")
    if as_is:
        console.note("warning: the held-out messages are taken as they are: unmasked, they measure what no device sees")
    rows = {
        "deployment": made.origin,
        "release": made.release,
        **made.model,
        "held out": made.held_out,
        "settings": made.settings,
    }
    console.show(deploying.as_document(made) | {"skipped": skipped}, lambda: console.fields(rows), as_json=json)


@app.command(cls=options.Command)
def run(
    home: options.ServerFolder,
    rounds: Annotated[int | None, typer.Option("--rounds", min=1, help="End after so many rounds.")] = None,
    until_idle: Annotated[bool, typer.Option("--until-idle", help="End when no round is requested.")] = False,
    metrics: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="Serve /metrics (Prometheus) and /healthz there; a PORT alone is on loopback."),
    ] = None,
    accept_loss: Annotated[
        bool,
        typer.Option("--accept-loss", help="Go on though the log has lost events that this server has read; say which."),
    ] = False,
    json: options.Json = False,
) -> None:
    """Run the server until Ctrl-C. It prints on standard error what it decides, and what it waits for.

    Killed at any point and started again, it goes on where it was; a second one takes over from the first.
    """
    from fedloop_server import serving

    from fedloop_cli.signals import stoppable

    with stoppable() as stop:
        ended = serving.serve(
            home.directory,
            home.place,
            stop.event,
            rounds=rounds,
            until_idle=until_idle,
            on_event=_note,
            on_wait=Waiting().show,
            metrics=metrics,
            accept_loss=accept_loss,
        )
    console.show({"rounds": ended, "interrupted": stop.interrupted}, f"{ended} rounds", as_json=json)
    if stop.interrupted:
        raise typer.Exit(130)


@app.command(cls=options.Command)
def revoke(
    home: options.ServerFolder,
    client: Annotated[str, typer.Argument(metavar="CLIENT")],
    reason: Annotated[str, typer.Option(help="Why, for whoever reads the log.")] = "operator",
    json: options.Json = False,
) -> None:
    """Revoke a client: none of its later events counts."""
    from fedloop_server.deployment import open_deployment
    from fedloop_server.operations import clients

    clients.revoke(open_deployment(home.directory, home.place).writer, client, reason)
    console.show({"client_id": client, "reason": reason}, f"{client} is revoked", as_json=json)


def _note(record: Record, payload: Payload) -> None:
    line = documents.event_line(payload)
    if line:
        console.note(f"{console.moment(record.appended_ms)}  {console.printable(line)}")
