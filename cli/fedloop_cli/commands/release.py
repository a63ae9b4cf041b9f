"""`fedloop release`: which releases there are, where they came from, whether the log still makes them, and going back."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final

import typer

from fedloop_cli import console, documents, options

app = options.group(help="Look at releases, rebuild them from the log, roll back.")

_FORMATS: Final = (
    "peft; of a chat model also merged (the whole model's safetensors), gguf (an adapter for llama.cpp) and merged-gguf (one "
    "file that llama.cpp runs alone)."
)
Release = Annotated[str, typer.Argument(metavar="RELEASE")]


@app.command("list", cls=options.Command)
def list_(where: options.DeploymentFolder, json: options.Json = False) -> None:
    """List the releases, oldest first; `*` marks the one in force."""
    from fedloop_server.operations import registry

    summaries = registry.summaries(where.follow().releases)
    found = [documents.release_document(each) for each in summaries]
    current = next((each.release for each in summaries if each.current), None)
    console.show({"current": current, "releases": found}, lambda: documents.releases_table(summaries), as_json=json)


@app.command(cls=options.Command)
def show(where: options.DeploymentFolder, release: Release, json: options.Json = False) -> None:
    """Show one release and its lineage: back to release 0, with each update that went in."""
    from fedloop_server.operations import registry

    followed = where.follow()
    found = documents.release_document(registry.summarise(followed.releases, registry.find(followed.releases, release)))
    lineage = registry.lineage(followed.rounds, followed.releases, release)
    heads = ["release", "round", "strategy", "base", "client", "update", "weight"]
    rows = [
        [step.release, step.round_id, step.strategy, step.base_release, each.client_id, each.update_id, each.weight]
        for step in lineage
        for each in step.contributions
    ]
    shown = console.fields(documents.metrics_shown(found))
    text = f"{shown}\n\nlineage\n{console.table(heads, rows, empty='the first release: no updates went in')}"
    console.show(found | {"lineage": lineage}, text, as_json=json)


@app.command(cls=options.Command)
def rebuild(
    where: options.DeploymentFolder,
    release: Annotated[str | None, typer.Argument(metavar="[RELEASE]")] = None,
    shallow: Annotated[bool, typer.Option("--shallow", help="Only the last round, on its base as it is stored.")] = False,
    json: options.Json = False,
) -> None:
    """Merge a release (the one in force, unless another is named) again from release 0 and the updates in the log, and compare
    the bytes. Exit status 1 if they differ.
    """
    from fedloop_server.rounds.rebuild import rebuild as rebuild_release

    rebuilt = rebuild_release(where.open_log(), where.open_blobs(), release, deep=not shallow)
    document = {
        "release": rebuilt.release,
        "identical": rebuilt.identical,
        "published_sha256": rebuilt.published_sha256,
        "rebuilt_sha256": rebuilt.rebuilt_sha256,
        "steps": rebuilt.steps,
    }
    rows = [
        [each.release, len(each.clients), each.published_sha256, each.rebuilt_sha256, "yes" if each.identical else "NO"]
        for each in rebuilt.steps
    ]
    outcome = "has the same bytes" if rebuilt.identical else "HAS OTHER BYTES"
    heads = ["release", "updates", "published SHA-256", "rebuilt SHA-256", "same"]
    console.show(document, f"{console.table(heads, rows)}\n{rebuilt.release}, rebuilt from the log, {outcome}.", as_json=json)
    if not rebuilt.identical:
        raise typer.Exit(1)


@app.command(cls=options.Command)
def export(
    where: options.DeploymentAndRelease,
    out: Annotated[Path, typer.Argument(metavar="OUT")],
    form: Annotated[
        str | None,
        typer.Option("--format", metavar="FORMAT", help=_FORMATS, show_default="the first that the model has"),
    ] = None,
    model_dir: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Where the base model lies.", show_default="as the server's, where its folder is"),
    ] = None,
    json: options.Json = False,
) -> None:
    """Write a release (the one in force, unless another is named) as a new folder OUT for other programs, with a model card: how
    to use it, its lineage, its evaluation and its epsilon.
    """
    from fedloop_server.operations import exporting

    if model_dir is None and (config := where.config()) is not None and config.model_dir:
        model_dir = Path(config.model_dir)
    exported = exporting.export(where.follow(), where.open_blobs(), where.release, form, model_dir=model_dir)
    written = exporting.write(exported, out)
    notes = exported.export.notes
    for each in notes:
        console.note(f"note: {each}")
    document = {"release": exported.release, "format": exported.form, "folder": str(out), "files": written, "notes": notes}
    console.show(document, f"release {exported.release} is in {out}: README.md says how to use it", as_json=json)


@app.command(cls=options.Command)
def rollback(
    home: options.ServerFolder,
    release: Release,
    reason: Annotated[str, typer.Option(help="Why, for whoever reads the log.")] = "operator",
    json: options.Json = False,
) -> None:
    """Put an earlier release in force again."""
    from fedloop_server.deployment import open_deployment
    from fedloop_server.operations import registry

    event = registry.roll_back(open_deployment(home.directory, home.place).writer, release=release, reason=reason)
    text = f"{event.release} is in force again; {event.withdrawn} is withdrawn"
    console.show({"release": event.release, "withdrawn": event.withdrawn, "reason": event.reason}, text, as_json=json)
