"""`fedloop audit`: what each client has spent of its privacy budget."""

from __future__ import annotations

from typing import Annotated

import typer

from fedloop_cli import console, options

app = options.group(help="Read the privacy ledger.")


@app.command(cls=options.Command)
def budget(
    where: options.DeploymentFolder,
    client: Annotated[str | None, typer.Option("--client", metavar="CLIENT", help="Only this client.")] = None,
    json: options.Json = False,
) -> None:
    """Recompute from the log what every client has spent over its whole life. Exit status 1 if a budget is exceeded."""
    from fedloop_server.operations.budgets import budgets

    found = budgets(where.follow(), client)
    kept = all(each.kept for each in found)
    heads = ["client", "budget", "delta", "spent", "left", "spends", "state"]
    rows = [
        [
            each.client_id,
            each.budget if each.budget is not None else "none",
            f"{each.delta:g}",
            f"{each.epsilon:.4f}",
            f"{each.budget - each.epsilon:.4f}" if each.budget is not None else None,
            each.spends,
            each.suspended or ("revoked" if each.revoked else "ok" if each.kept else "EXCEEDED"),
        ]
        for each in found
    ]
    console.show({"clients": found, "kept": kept}, lambda: console.table(heads, rows, empty="no clients"), as_json=json)
    if not kept:
        raise typer.Exit(1)
