"""`fedloop audit`: what each client has spent of its privacy budget."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from msgspec import Struct

from fedloop_cli import console, options

if TYPE_CHECKING:
    from fedloop_events.folds.identities import Client
    from fedloop_privacy.ledger import Ledger

app = options.group(help="Read the privacy ledger.")


class Budget(Struct, frozen=True):
    """A client's budget of epsilon at its delta (None: rounds without differential privacy are allowed), and what is spent."""

    client_id: str
    budget: float | None
    delta: float
    epsilon: float
    spends: int
    kept: bool
    """Whether what is spent is within the budget, along one unbroken chain."""
    suspended: str | None
    revoked: bool


@app.command(cls=options.Command)
def budget(
    where: options.Deployment,
    client: Annotated[str | None, typer.Option("--client", metavar="CLIENT", help="Only this client.")] = None,
    json: options.Json = False,
) -> None:
    """Recompute from the log what every client has spent over its whole life. Exit status 1 if a budget is exceeded."""
    from fedloop_events.errors import UsageError

    from fedloop_cli import state

    followed = state.open_state(where)
    clients = followed.identities.clients
    if client is not None and client not in clients:
        raise UsageError(f"there is no client {client!r}", hint=f"there are {', '.join(sorted(clients)) or 'none'}")
    ledger = state.open_ledger(followed.log, followed.identities)
    found = [budget_of(ledger, each) for name, each in sorted(clients.items()) if client in {None, name}]
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


def budget_of(ledger: Ledger, client: Client) -> Budget:
    spent = ledger.spent(client.client_id)
    epsilon = ledger.epsilon(client.client_id, client.delta) if spent else 0.0
    suspension = ledger.suspended(client.client_id)
    kept = suspension is None and (client.epsilon is None or epsilon <= client.epsilon)
    return Budget(
        client.client_id,
        client.epsilon,
        client.delta,
        epsilon,
        len(spent),
        kept,
        suspension.reason if suspension is not None else None,
        client.revoked,
    )
