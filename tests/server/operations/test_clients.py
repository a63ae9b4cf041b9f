"""Counting clients, what they have spent, and revoking one, on a real deployment."""

from __future__ import annotations

from pathlib import Path

import pytest
from devices import World
from fedloop_events import types
from fedloop_events.errors import UsageError
from fedloop_server.operations import clients
from fedloop_server.operations.budgets import budgets
from fedloop_server.operations.clients import ClientCounts
from fedloop_server.operations.followed import Followed

EVER_S = 1_000_000_000_000
"""So that now is later than any stamp."""


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Two devices with a budget that have taken part in a round, and a third that came later."""
    world = World(tmp_path / "deployment")
    for name in ("ann", "bob"):
        world.device(name)
    world.request()
    with world.serving():
        world.server().run(rounds=1)
    world.device("cem", epsilon=None)
    return world


def count(world: World, seen_since_ms: float) -> ClientCounts:
    followed = Followed(world.log)
    return clients.count(followed.identities, followed.ledger(), EVER_S, seen_since_ms + EVER_S * 1000)


def test_clients_are_counted_by_what_they_are(world: World) -> None:
    clients.revoke(world.writer, "bob", "lost")
    *_, (last, _) = world.records(types.ClientSeen)
    assert count(world, 0) == ClientCounts(enrolled=3, revoked=1, available=2, suspended=0)
    assert count(world, last.appended_ms).available >= 1
    assert count(world, last.appended_ms + 1).available == 0


def test_a_client_whose_spends_are_forked_is_suspended_and_its_budget_not_kept(world: World) -> None:
    mechanism = world.payloads(types.BudgetSpent)[0].mechanism
    cem = world.devices["cem"]
    for instruction in ("e" * 32, "f" * 32):
        cem.writer.append(types.BudgetSpent(cem.origin, "cem", cem.seq(), 0, "", "main", instruction, mechanism))
    assert count(world, 0).suspended == 1
    (found,) = budgets(Followed(world.log), "cem")
    assert (found.suspended, found.kept) == ("spend-reused", False)


def test_a_budget_is_what_the_log_says_was_spent(world: World) -> None:
    ann, bob, cem = budgets(Followed(world.log))
    assert [each.client_id for each in (ann, bob, cem)] == ["ann", "bob", "cem"]
    assert (ann.budget, ann.delta, ann.spends, ann.kept, ann.suspended, ann.revoked) == (8.0, 1e-5, 1, True, None, False)
    assert 0 < ann.epsilon == bob.epsilon <= 8.0
    assert ann.share == ann.epsilon / 8.0
    assert (cem.budget, cem.epsilon, cem.spends, cem.share, cem.kept) == (None, 0.0, 0, None, True)
    assert budgets(Followed(world.log), "bob") == [bob]
    with pytest.raises(UsageError, match="no client 'dan'"):
        budgets(Followed(world.log), "dan")


def test_a_revocation_is_signed_with_its_reason_and_made_once(world: World) -> None:
    clients.revoke(world.writer, "bob", "lost")
    ((record, revoked),) = world.records(types.ClientRevoked)
    assert (revoked.client_id, revoked.reason) == ("bob", "lost")
    assert record.signature
    assert Followed(world.log).identities.clients["bob"].revoked
    with pytest.raises(UsageError, match="revoked already"):
        clients.revoke(world.writer, "bob", "again")
    with pytest.raises(UsageError, match="no client"):
        clients.revoke(world.writer, "dan", "lost")
    with pytest.raises(UsageError, match="one line"):
        clients.revoke(world.writer, "ann", "a\nb")
    assert len(world.payloads(types.ClientRevoked)) == 1
