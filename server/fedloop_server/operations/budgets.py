"""Privacy budgets: what each client has spent over its whole life."""

from __future__ import annotations

from fedloop_events.errors import UsageError
from fedloop_events.folds.identities import Client
from fedloop_privacy.dp.ledger import Ledger
from msgspec import Struct

from fedloop_server.operations.followed import Followed


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

    @property
    def share(self) -> float | None:
        """Of the budget, spent; None without one."""
        return None if self.budget is None else self.epsilon / self.budget


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


def budgets(followed: Followed, client_id: str | None = None) -> list[Budget]:
    """Every client's budget, by name, or that of one alone. Raises `UsageError` if it is not enrolled."""
    clients = followed.identities.clients
    if client_id is not None and client_id not in clients:
        raise UsageError(f"there is no client {client_id!r}", hint=f"there are {', '.join(sorted(clients)) or 'none'}")
    ledger = followed.ledger()
    return [budget_of(ledger, each) for name, each in sorted(clients.items()) if client_id in {None, name}]
