"""`fedloop feedback export`: the curated examples as a file for other trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from fedloop_cli import console, options


def export(
    where: options.DeploymentFolder,
    form: Annotated[
        Literal["trl-sft", "trl-kto", "trl-dpo", "jsonl"],
        typer.Option("--format", help="What TRL's trainer of that name reads, or everything there is."),
    ],
    out: Annotated[Path, typer.Option(metavar="FILE", help="File to write, in JSON Lines.")],
    use_case: Annotated[str | None, typer.Option(metavar="NAME", help="Only this use case's examples.")] = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is there.")] = False,
    json: options.Json = False,
) -> None:
    """Write the curated examples that count as a file to train on. All texts in it are masked.

    Feedback that is retracted later stays in the file: write it anew before each training.
    """
    import msgspec
    from fedloop_server.operations import examples

    found = examples.curated(where.open_log())
    chosen = examples.of_format(found, form, use_case)
    examples.write(chosen, form, out, replace=force)
    balances = examples.balances(chosen)
    rows = [
        [each.use_case, each.kind, name, count]
        for each in balances
        for name, count in (each.classes.items() or [(None, each.examples)])
    ]
    table = console.table(["use case", "kind", "class", "examples"], rows)
    document = {"file": str(out), "format": form, "examples": len(chosen), "balance": msgspec.to_builtins(balances)}
    console.show(document, f"{table}\n\n{len(chosen)} examples are in {out}", as_json=json)
