"""`fedloop demo`: everything at once, on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedloop_cli import console, options, task_options


def demo(
    data: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Messages of the users, each with the right answer: CSV, JSON Lines or Parquet."),
    ] = None,
    test: Annotated[Path | None, typer.Option(metavar="FILE", help="Held-out messages, with --data.")] = None,
    clients: Annotated[
        int | None, typer.Option(min=1, max=64, help="Devices, each a process; default: 8, or 4 whose models write answers.")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, max=1000, help="Rounds.")] = 3,
    epsilon: Annotated[float, typer.Option(help="Privacy budget of each device for its whole life.")] = 8.0,
    no_dp: Annotated[bool, typer.Option("--no-dp", help="Without differential privacy.")] = False,
    strategy: Annotated[
        Literal["default", "ffa", "fedavg", "svd", "stack", "residual", "fedavgm", "fedadam"],
        typer.Option(help="How adapters are merged; default: ffa (for chat fedadam), without privacy fedavg."),
    ] = "default",
    seed: Annotated[int, typer.Option(min=0, help="Of who writes what, and of the first release. Noise has none.")] = 0,
    directory: Annotated[
        Path | None, typer.Option("--dir", metavar="DIR", help="Keep everything here, in place of a new folder.")
    ] = None,
    gateway: Annotated[bool, typer.Option("--gateway", help="Let devices reach the log through an HTTPS gateway alone.")] = False,
    json: options.Json = False,
) -> None:
    """Run a whole deployment here: devices with invented users, a server, rounds; then check what it promises.

    --log kafka://HOST:PORT runs it on Kafka. Every device and the server is a process; kill any of them, and it is started again
    and goes on. Exit status 1 if a round made no release or a check failed; personal values that passed the masker are counted
    and shown.
    """
    from fedloop_events.errors import UsageError

    task = task_options.chosen()
    if (data is None) != (test is None):
        raise UsageError("--data and --test go together", hint="one file of messages to learn from, one to measure with")

    task_options.check_columns(data)

    from fedloop_tasks.models import registry

    from fedloop_cli.demo import live, play, report, users

    if registry.to_add(task.base_model):
        console.note(f"making the base model {task.base_model} of its package, once for this user")
        registry.add(task.base_model)

    clients = clients or (4 if task.speaks else 8)
    chosen = play.Options(clients, rounds, None if no_dp else epsilon, strategy, seed, gateway)
    if data is None or test is None:
        given = users.invented(task, clients, seed)
    else:
        columns = task_options.of_task(task.columns)
        given = users.from_files(task, task.read(data, columns), task.read(test, columns), clients, seed)
    for note in given.material.notes:
        console.note(f"warning: {console.printable(note)}")
    for what, count in given.skipped.items():
        console.note(f"warning: {count} rows skipped: {console.printable(what)}")
    scene = play.Scene(play.stage(directory, *options.given()), task, chosen, given)
    with live.view(scene) as refresh:
        refresh()
        play.play(scene, refresh)
        scene.doing = "checking"
        refresh()
    found = report.report(scene)
    console.show(report.as_document(found), lambda: report.as_text(found), as_json=json)
    if not found.good:
        raise typer.Exit(1)
