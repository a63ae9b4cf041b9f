"""When a round ends before its deadline: with enough updates, or a grace after its quorum; and that it ends so only once."""

from __future__ import annotations

import threading
import time
from pathlib import Path

import pytest
from devices import CONFIG, Behaviour, World
from fedloop_events import types
from fedloop_server.config import ServerConfig
from fedloop_server.rounds import actions
from fedloop_server.rounds.loop import Server
from fedloop_server.rounds.rebuild import rebuild
from msgspec.structs import replace

FAR_S = 120.0
"""A deadline that no test waits for."""


def world_of(folder: Path, config: ServerConfig, **behaviours: Behaviour | None) -> World:
    world = World(folder / "deployment", replace(config, deadline_s=FAR_S))
    for name, behave in behaviours.items():
        world.device(name, behave=behave or (lambda opened, arrays: arrays))
    world.request()
    return world


def silent(opened: types.RoundOpened, arrays: object) -> None:
    return None


def until_idle(server: Server) -> float:
    """Seconds until there is nothing to do."""
    began = time.monotonic()
    while not isinstance(server.step(wait_s=0.0), actions.Wait):
        assert time.monotonic() - began < FAR_S
    return time.monotonic() - began


def reasons(world: World) -> dict[str, str]:
    return {name: each.reason for name, each in world.rounds.rounds["r0001"].excluded.items()}


def test_a_frozen_device_holds_a_round_for_the_grace_after_its_quorum_and_no_longer(tmp_path: Path) -> None:
    world = world_of(tmp_path, replace(CONFIG, grace_s=0.5), ann=None, bob=None, cem=silent)
    with world.serving():
        assert 0.5 <= until_idle(world.server()) < FAR_S / 4
    [opened] = world.payloads(types.RoundOpened)
    assert (opened.grace_s, opened.enough) == (0.5, None)
    state = world.rounds.rounds["r0001"]
    assert (state.participants, reasons(world)) == (["ann", "bob"], {"cem": "slow"})
    assert rebuild(world.log, world.blobs).identical


def test_whoever_answers_within_the_grace_counts(tmp_path: Path) -> None:
    quorum = threading.Event()

    def slow(opened: types.RoundOpened, arrays: object) -> object:
        assert quorum.wait(30)
        return arrays

    world = world_of(tmp_path, replace(CONFIG, grace_s=60.0), ann=None, bob=None, cem=slow)  # type: ignore[arg-type]
    with world.serving():
        running = threading.Thread(target=until_idle, args=(world.server(),))
        running.start()
        while not {"ann", "bob"} <= {each.client_id for each in world.payloads(types.UpdateSubmitted)}:
            assert running.is_alive()
        quorum.set()
        running.join()
    assert (world.rounds.rounds["r0001"].participants, reasons(world)) == (["ann", "bob", "cem"], {})


def test_without_a_quorum_there_is_no_grace(tmp_path: Path) -> None:
    config = replace(CONFIG, grace_s=0.1, quorum=2)
    world = World(tmp_path / "deployment", replace(config, deadline_s=1.0))
    for name, behave in {"ann": None, "bob": silent, "cem": silent}.items():
        world.device(name, behave=behave or (lambda opened, arrays: arrays))
    world.request()
    with world.serving():
        assert until_idle(world.server()) >= 1.0
    assert reasons(world) == {"bob": "silent", "cem": "silent"}


def test_a_grace_as_long_as_the_deadline_is_none(tmp_path: Path) -> None:
    world = world_of(tmp_path, replace(CONFIG, grace_s=FAR_S), ann=None, bob=None)
    with world.serving():
        until_idle(world.server())
    [opened] = world.payloads(types.RoundOpened)
    assert opened.grace_s is None


def test_more_are_asked_than_are_needed_and_the_round_ends_with_enough(tmp_path: Path) -> None:
    config = replace(CONFIG, cohort_size=2, over_selection=1.5)
    world = world_of(tmp_path, config, ann=None, bob=None, cem=silent)
    with world.serving():
        assert until_idle(world.server()) < FAR_S / 4
    [opened] = world.payloads(types.RoundOpened)
    assert (opened.cohort, opened.enough, opened.quorum) == (["ann", "bob", "cem"], 2, 2)
    assert (world.rounds.rounds["r0001"].participants, reasons(world)) == (["ann", "bob"], {"cem": "not-needed"})
    assert rebuild(world.log, world.blobs).identical


def test_where_no_more_can_be_asked_than_are_needed_the_round_waits_for_all(tmp_path: Path) -> None:
    world = world_of(tmp_path, replace(CONFIG, cohort_size=2, over_selection=3.0), ann=None, bob=None)
    with world.serving():
        until_idle(world.server())
    [opened] = world.payloads(types.RoundOpened)
    assert (len(opened.cohort), opened.enough) == (2, None)


def test_an_update_to_a_round_that_has_ended_without_it_is_late_and_its_spend_stands(tmp_path: Path) -> None:
    world = world_of(tmp_path, replace(CONFIG, grace_s=0.2), ann=None, bob=None, cem=silent)
    server = world.server()
    with world.serving():
        until_idle(server)
    state, cem = world.rounds.rounds["r0001"], world.devices["cem"]
    assert state.opened is not None
    late = cem.submit(state.opened, state.instructed["cem"], cem.trained(state.opened))
    until_idle(server)
    assert [(each.update_id, each.reason) for each in world.payloads(types.UpdateRefused)] == [(late, "late")]
    assert [each.client_id for each in world.payloads(types.BudgetSpent)].count("cem") == 1
    assert world.rounds.rounds["r0001"].participants == ["ann", "bob"]


@pytest.mark.parametrize("over_selection", [1.0, 1.5], ids=["grace", "enough"])
def test_a_server_that_comes_back_ends_the_round_by_the_logs_clock_with_the_same_updates(
    tmp_path: Path, over_selection: float
) -> None:
    config = replace(CONFIG, grace_s=0.2, cohort_size=2 if over_selection > 1 else 64, over_selection=over_selection)
    world = world_of(tmp_path, config, ann=None, bob=None, cem=silent)
    stop = threading.Event()

    # Away from before the first answer until long after the grace.
    def gone(awaited: object) -> None:
        if getattr(awaited, "asked", 0) == 3:
            stop.set()

    world.server(on_wait=gone).run(stop)
    assert len(world.payloads(types.InstructionSent)) == 3
    with world.serving("ann", "bob"):
        while len(world.payloads(types.UpdateSubmitted)) < 2:
            pass
    last_ms = max(record.appended_ms for record, _ in world.records(types.UpdateSubmitted))
    while time.time() * 1000 < last_ms + 300:
        pass
    assert until_idle(world.server()) < 5
    assert world.rounds.rounds["r0001"].participants == ["ann", "bob"]
    before = [payload for _, payload in world.records(types.RoundClosed)]
    until_idle(world.server())
    assert world.payloads(types.RoundClosed) == before
    assert rebuild(world.log, world.blobs).identical
