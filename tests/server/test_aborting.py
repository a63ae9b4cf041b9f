"""Rounds that the operator aborts: whenever that is asked for, and whether a server runs or not."""

from __future__ import annotations

import threading
from pathlib import Path

import pytest
from devices import CONFIG, World, step_to
from fedloop_events import types
from fedloop_events.errors import FedloopError, UsageError
from fedloop_server.operations import rounds
from fedloop_server.operations.awaiting import Awaited
from fedloop_server.rounds import actions
from fedloop_server.rounds.loop import Server
from msgspec.structs import replace


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A round is requested; two devices answer, and the third is silent, with a deadline that no test waits for."""
    world = World(tmp_path / "deployment", replace(CONFIG, quorum=3, deadline_s=250.0))
    for name in ("ann", "bob"):
        world.device(name)
    world.device("cem", behave=lambda opened, arrays: None)
    world.request()
    return world


def until_idle(server: Server) -> None:
    step_to(server, actions.Wait)


def test_a_round_is_aborted_while_the_server_collects_and_the_next_one_opens(world: World) -> None:
    asked = threading.Event()

    def operator(awaited: Awaited) -> None:
        if awaited.missing == ["cem"] and not asked.is_set():
            asked.set()
            rounds.abort(world.writer, awaited.round_id, "wrong terms")

    server = world.server(on_wait=operator)
    with world.serving():
        assert server.run(rounds=1) == 1
    assert asked.is_set()
    [aborted] = world.payloads(types.RoundAborted)
    assert (aborted.round_id, aborted.reason, aborted.detail) == ("r0001", "operator", "wrong terms")
    assert world.payloads(types.RoundClosed) == []
    until_idle(server)
    late = {each.client_id: each.reason for each in world.payloads(types.UpdateRefused)}
    assert late == {"ann": "late", "bob": "late"}
    assert {each.client_id for each in world.payloads(types.BudgetSpent)} == {"ann", "bob"}, "what is spent is spent"
    for name in ("dan", "eve"):  # in place of those who have spent
        world.device(name)
    world.request(1, "q2")
    step_to(server, actions.CollectUpdates)
    assert world.rounds.open_round is not None
    assert world.rounds.open_round.round_id == "r0002"


def test_a_server_that_does_not_run_aborts_the_round_when_it_starts(world: World) -> None:
    step_to(world.server(), actions.CollectUpdates)
    rounds.abort(world.writer, "r0001", "wrong terms")
    rounds.abort(world.writer, "r0001", "again")
    assert len(world.payloads(types.RoundAbortRequested)) == 1
    until_idle(world.server())
    [aborted] = world.payloads(types.RoundAborted)
    assert (aborted.reason, aborted.detail) == ("operator", "wrong terms")
    assert world.payloads(types.InstructionSent) == [], "nobody is asked for a round that is to be aborted"


@pytest.fixture
def asked(tmp_path: Path) -> World:
    """Two devices, and a round that is requested."""
    world = World(tmp_path / "deployment")
    for name in ("ann", "bob"):
        world.device(name)
    world.request()
    return world


def test_a_round_that_has_closed_is_aborted_before_its_release_is_proposed(asked: World) -> None:
    world, server = asked, asked.server()
    with world.serving():
        step_to(server, actions.ProposeRelease)
    rounds.abort(world.writer, "r0001", "wrong terms")
    until_idle(server)
    state = world.rounds.rounds["r0001"]
    assert (state.state, state.participants, list(world.releases.by_round)) == ("aborted", [], [])


def test_a_round_that_is_over_cannot_be_aborted_and_what_it_came_to_is_said(asked: World) -> None:
    world, server = asked, asked.server()
    with world.serving():
        step_to(server, actions.EvaluateRelease)
        server.step()
        step_to(server, actions.EvaluateRelease)
        with pytest.raises(FedloopError, match=r"r0001 cannot be aborted any more: its release 0001-\w+ is proposed"):
            rounds.abort(world.writer, "r0001", "too late")
        until_idle(server)
    with pytest.raises(FedloopError, match=r"its release 0001-\w+ is published") as raised:
        rounds.abort(world.writer, "r0001", "too late")
    assert (raised.value.exit_status, raised.value.hint) == (
        1,
        "put an earlier release in force again: `fedloop release rollback`",
    )
    with pytest.raises(UsageError, match="no round 'r0002'"):
        rounds.abort(world.writer, "r0002", "never was")
    assert world.payloads(types.RoundAbortRequested) == []


def test_a_request_to_abort_that_comes_just_as_the_release_is_proposed_changes_nothing(asked: World) -> None:
    world, server = asked, asked.server()
    with world.serving():
        step_to(server, actions.ProposeRelease)
        server.step()
        origin = world.devices["ann"].origin
        world.writer.append(types.RoundAbortRequested(origin, "main", "r0001", "raced"))
        until_idle(server)
    assert world.payloads(types.RoundAborted) == []
    [made] = world.releases.by_round.values()
    assert world.releases.releases[made].status == "published"


def test_an_aborted_round_is_over_and_says_so(world: World) -> None:
    step_to(world.server(), actions.CollectUpdates)
    rounds.abort(world.writer, "r0001", "wrong terms")
    until_idle(world.server())
    with pytest.raises(FedloopError, match=r"r0001 is over: it was aborted \(operator\)"):
        rounds.abort(world.writer, "r0001", "again")
