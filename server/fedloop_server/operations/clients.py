"""Clients: how many there are, and revoking one."""

from __future__ import annotations

from fedloop_events import types
from fedloop_events.errors import UsageError
from fedloop_events.folds.identities import Identities
from fedloop_events.writer import EventWriter
from fedloop_privacy.dp.ledger import Ledger
from msgspec import Struct

from fedloop_server.operations import commands


class ClientCounts(Struct, frozen=True):
    """How many clients there are of each kind; one that is revoked is not available."""

    enrolled: int
    """Ever."""
    revoked: int
    available: int
    suspended: int
    """Their record of spends was forked or torn."""


def count(identities: Identities, ledger: Ledger, seen_since_ms: float) -> ClientCounts:
    """A client that was seen at `seen_since_ms`, by the log's clock, or later is available."""
    clients = list(identities.clients.values())
    return ClientCounts(
        len(clients),
        sum(each.revoked for each in clients),
        sum(not each.revoked and each.seen_ms >= seen_since_ms for each in clients),
        sum(ledger.suspended(each.client_id) is not None for each in clients),
    )


def revoke(writer: EventWriter, client_id: str, reason: str) -> None:
    """Revoke a client: none of its later events counts. Raises `UsageError` if it is not enrolled, or revoked already."""
    known = commands.identities(writer)
    client = known.clients.get(client_id)
    if client is None:
        raise UsageError(f"there is no client {client_id!r}", hint="`fedloop audit budget` lists them")
    if client.revoked:
        raise UsageError(f"client {client_id} has been revoked already")
    writer.append(types.ClientRevoked(origin=known.origin, client_id=client_id, reason=commands.check_reason(reason)))
