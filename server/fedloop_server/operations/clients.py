"""Clients: how many there are, and revoking one."""

from __future__ import annotations

from fedloop_events import types
from fedloop_events.errors import UsageError
from fedloop_events.folds.identities import Client, Identities
from fedloop_events.writer import EventWriter
from fedloop_privacy.dp.ledger import Ledger
from msgspec import Struct

from fedloop_server.config import ServerConfig
from fedloop_server.operations import commands


class ClientCounts(Struct, frozen=True):
    """How many clients there are of each kind; one that is revoked is not available."""

    enrolled: int
    """Ever."""
    revoked: int
    available: int
    suspended: int
    """Their record of spends was forked or torn."""


def seen_lately(client: Client, availability_s: float, now_ms: float) -> bool:
    """Whether a client was last seen at most `availability_s` before `now_ms` of the log's clock.

    Nor may it be seen in a future as far away: its clock is wrong, and would keep it available for as long after it is gone.
    """
    return abs(now_ms - client.seen_ms) <= availability_s * 1000


def absence(client: Client, config: ServerConfig, now_ms: int) -> str | None:
    """Why a client cannot be asked now, whatever the round: "revoked", "unavailable", "too-few-examples"; None if it can."""
    if client.revoked:
        return "revoked"
    if not seen_lately(client, config.availability_s, now_ms):
        return "unavailable"
    return "too-few-examples" if client.examples_at_least < config.min_examples else None


def count(identities: Identities, ledger: Ledger, availability_s: float, now_ms: float) -> ClientCounts:
    """A client that is not revoked and was `seen_lately` is available."""
    clients = list(identities.clients.values())
    return ClientCounts(
        len(clients),
        sum(each.revoked for each in clients),
        sum(not each.revoked and seen_lately(each, availability_s, now_ms) for each in clients),
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
