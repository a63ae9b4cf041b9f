"""Buffered rounds: nobody waits for a slow client, and what it sends counts later, with less weight."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Mapping
from itertools import count
from pathlib import Path

import numpy as np
import pytest
from clients.conftest import clock_ahead
from devices import CONFIG, OPEN_CONFIG, World, evaluation
from fedloop_events import types
from fedloop_events.blobs import tensors
from fedloop_events.folds.releases import ReleasesView
from fedloop_server.aggregation.merging import staleness_weight
from fedloop_server.config import ServerConfig
from fedloop_server.operations import clients, registry
from fedloop_server.operations.awaiting import Awaited
from fedloop_server.rounds import actions
from fedloop_server.rounds.loop import Server
from fedloop_server.rounds.rebuild import RebuildError, rebuild
from fedloop_server.rounds.scheduler import past
from msgspec.structs import replace

NAMES = ("ann", "bob", "cem")
BUFFERED = replace(OPEN_CONFIG, cohort_size=3, buffer_size=2, max_staleness=2, grace_s=30.0)
Answers = Mapping[int, list[tuple[str, int]]]
"""While round n waits: who answers the instruction of which round, in this order."""


class Script:
    """Devices that answer when the script says so, one at each call."""

    def __init__(self, world: World, answers: Answers) -> None:
        self._world = world
        self._left = {number: list(who) for number, who in answers.items()}
        self.updates: dict[tuple[str, int], str] = {}

    def __call__(self, awaited: Awaited) -> None:
        rounds = self._world.rounds
        if (opened := rounds.open_round) is not None and (left := self._left.get(opened.number)):
            if len(opened.instructed) < len(opened.opened.cohort if opened.opened else []):
                return
            client_id, number = left.pop(0)
            self.answer(client_id, number)

    def answer(self, client_id: str, number: int) -> str:
        state, device = self._world.rounds.rounds[f"r{number:04d}"], self._world.devices[client_id]
        assert state.opened is not None
        update_id = device.submit(state.opened, state.instructed[client_id], device.trained(state.opened))
        self.updates[client_id, number] = update_id
        return update_id


def world_of(folder: Path, config: ServerConfig = BUFFERED, rounds: int = 2, names: tuple[str, ...] = NAMES) -> World:
    world = World(folder / "deployment", config)
    for name in names:
        world.device(name, epsilon=config.plan.epsilon)  # type: ignore[attr-defined]
    world.request(rounds)
    return world


def run(server: Server) -> None:
    while not isinstance(server.step(wait_s=0.0), actions.Wait):
        pass


def until_closed(world: World, script: Script) -> None:
    server = world.server(on_wait=script)
    while not world.payloads(types.RoundClosed):
        server.step(wait_s=0.0)


def accepted(world: World, number: int) -> list[str]:
    return world.rounds.rounds[f"r{number:04d}"].participants


def reasons(world: World, number: int) -> dict[str, str]:
    return {name: each.reason for name, each in world.rounds.rounds[f"r{number:04d}"].excluded.items()}


def refused(world: World) -> list[tuple[str, str | None, str]]:
    return [(each.update_id, each.round_id, each.reason) for each in world.payloads(types.UpdateRefused)]


STALE = {1: [("ann", 1), ("bob", 1)], 2: [("cem", 1), ("ann", 2)]}
"""The third answers the first round while the second is open."""


def test_a_round_ends_with_a_full_buffer_and_a_slow_update_counts_in_the_next_one(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    run(world.server(on_wait=Script(world, STALE)))
    first, second = world.payloads(types.RoundOpened)
    assert (first.cohort, first.enough, first.max_staleness) == ([*NAMES], 2, 2)
    assert (accepted(world, 1), reasons(world, 1)) == (["ann", "bob"], {"cem": "at-work"})
    # The second round asks those who are free.
    assert (second.cohort, {each.client_id: each.reason for each in second.excluded}) == (["ann", "bob"], {"cem": "at-work"})
    assert (accepted(world, 2), reasons(world, 2)) == (["ann", "cem"], {"bob": "at-work"})
    assert refused(world) == []
    assert [each.status for each in world.releases.releases.values()] == ["published"] * 3


def test_a_stale_update_counts_by_its_change_of_its_own_base_and_less(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    world.devices["cem"].weight, world.devices["cem"].examples = 96, 64
    run(world.server(on_wait=Script(world, STALE)))
    _, first, second = world.releases.releases.values()
    opened, old = (world.rounds.rounds[name].opened for name in ("r0002", "r0001"))
    assert opened is not None
    assert old is not None
    assert opened.base == first.blob

    def wide(arrays: Mapping[str, object]) -> dict[str, np.ndarray]:
        return {name: np.asarray(values, np.float64) for name, values in arrays.items()}

    base, stale_base = (wide(tensors.decode(world.blobs.get(each.base))) for each in (opened, old))
    fresh, stale = wide(world.devices["ann"].trained(opened)), wide(world.devices["cem"].trained(old))
    [_, [ann, cem]] = [each.accepted for each in world.payloads(types.RoundClosed)]
    assert (ann.weight, cem.weight) == (64, 96)
    made = tensors.decode(world.blobs.get(second.blob))
    for name, values in base.items():
        expected = values + 0.4 * (fresh[name] - values) + 0.6 * math.sqrt(0.5) * (stale[name] - stale_base[name])
        np.testing.assert_allclose(made[name], expected, rtol=0, atol=1e-5)


def test_anyone_can_make_a_buffered_release_again(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    run(world.server(on_wait=Script(world, STALE)))
    again = rebuild(world.log, world.blobs, deep=True)
    assert again.identical
    assert [each.clients for each in again.steps] == [["ann", "bob"], ["ann", "cem"]]


def test_servers_that_are_killed_again_and_again_count_the_same(tmp_path: Path) -> None:
    """Each lives for a few reads of the log, and leaves a snapshot."""
    world, other = world_of(tmp_path), world_of(tmp_path / "again")
    run(world.server(on_wait=Script(world, STALE)))
    script, snapshots = Script(other, STALE), tmp_path / "snapshots"
    snapshots.mkdir()
    lives = 0
    while len(other.releases.releases) < 3 or other.releases.candidate(types.DEFAULT_MODEL) is not None:
        stop, reads = threading.Event(), count()

        def watch(awaited: Awaited, *, stop: threading.Event = stop, reads: Iterator[int] = reads, most: int = lives % 6) -> None:
            script(awaited)
            if next(reads) == most:
                stop.set()

        server = Server(
            other.log,
            other.blobs,
            other.writer,
            BUFFERED,
            evaluate=lambda arrays: evaluation(0.5),
            on_wait=watch,
            snapshots=snapshots,
        )
        server.run(stop, until_idle=True)
        lives += 1
    assert lives > 4
    assert [*world.releases.releases] == [*other.releases.releases]
    assert accepted(other, 2) == ["ann", "cem"]


def test_an_update_that_is_too_stale_is_refused(tmp_path: Path) -> None:
    config = replace(BUFFERED, max_staleness=1)
    world = world_of(tmp_path, config, rounds=3)
    answers = {1: [("ann", 1), ("bob", 1)], 2: [("ann", 2), ("bob", 2)], 3: [("cem", 1), ("ann", 3), ("bob", 3)]}
    script = Script(world, answers)
    run(world.server(on_wait=script))
    assert [accepted(world, number) for number in (1, 2, 3)] == [["ann", "bob"]] * 3
    assert refused(world) == [(script.updates["cem", 1], "r0001", "late")]
    # Nobody waits for it any more: the third round asks it again.
    assert world.payloads(types.RoundOpened)[2].cohort == [*NAMES]


def test_an_update_that_comes_between_two_rounds_counts_in_the_next_one(tmp_path: Path) -> None:
    world = world_of(tmp_path, rounds=1)
    script = Script(world, {1: [("ann", 1), ("bob", 1)], 2: [("ann", 2)]})
    run(world.server(on_wait=script))
    script.answer("cem", 1)
    run(world.server(on_wait=script))
    assert refused(world) == []
    world.request(1, "q2")
    run(world.server(on_wait=script))
    assert accepted(world, 2) == ["ann", "cem"]


def test_a_stale_update_counts_once(tmp_path: Path) -> None:
    world = world_of(tmp_path, rounds=3)
    answers = {1: [("ann", 1), ("bob", 1)], 2: [("cem", 1), ("ann", 2)], 3: [("cem", 1), ("cem", 3), ("ann", 3)]}
    script = Script(world, answers)
    run(world.server(on_wait=script))
    assert accepted(world, 3) == ["ann", "cem"]
    [second] = [each for each in world.payloads(types.RoundClosed) if each.round_id == "r0002"]
    assert [each.update_id for each in second.accepted][1] != script.updates["cem", 1]
    assert refused(world) == [(script.updates["cem", 1], "r0001", "late")]


def test_a_stale_update_that_is_not_acceptable_is_refused_for_its_own_round(tmp_path: Path) -> None:
    world = world_of(tmp_path, rounds=3)
    script = Script(world, {**STALE, 2: [("cem", 1), ("ann", 2), ("bob", 2)], 3: [("ann", 3), ("bob", 3)]})
    cem = world.devices["cem"]
    honest = cem.trained
    cem.trained = lambda opened: {name: values * np.nan for name, values in honest(opened).items()}  # type: ignore[method-assign]
    run(world.server(on_wait=script))
    assert refused(world) == [(script.updates["cem", 1], "r0001", "not-finite")]
    assert accepted(world, 2) == ["ann", "bob"]
    assert world.payloads(types.RoundOpened)[2].cohort == [*NAMES]


def test_whoever_declines_late_is_asked_again(tmp_path: Path) -> None:
    world = world_of(tmp_path, rounds=2)
    script = Script(world, {1: [("ann", 1), ("bob", 1)], 2: [("ann", 2), ("bob", 2), ("cem", 2)]})
    until_closed(world, script)
    state, cem = world.rounds.rounds["r0001"], world.devices["cem"]
    cem.writer.append(
        types.RoundDeclined(cem.origin, "cem", cem.seq(), "main", state.instructed["cem"], "client-error", round_id="r0001")
    )
    run(world.server(on_wait=script))
    assert world.payloads(types.RoundOpened)[1].cohort == [*NAMES]


def test_after_a_rollback_nothing_counts_that_was_made_of_the_withdrawn_release(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    script = Script(world, {**STALE, 3: [("bob", 2), ("ann", 3), ("cem", 3)]})
    run(world.server(on_wait=script))
    first, *_ = world.releases.releases
    registry.roll_back(world.writer, release=first, reason="it is worse")
    world.request(1, "q2")
    run(world.server(on_wait=script))
    assert accepted(world, 3) == ["ann", "cem"]
    assert world.payloads(types.ReleaseProposed)[-1].base_release == first


def test_a_server_that_counts_an_update_of_a_withdrawn_release_is_found_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    world = world_of(tmp_path)
    script = Script(world, {**STALE, 3: [("bob", 2), ("ann", 3), ("cem", 3)]})
    run(world.server(on_wait=script))
    registry.roll_back(world.writer, release=next(iter(world.releases.releases)), reason="it is worse")
    world.request(1, "q2")
    with monkeypatch.context() as dishonest:
        dishonest.setattr(ReleasesView, "comes_from", lambda *_: True)
        run(world.server(on_wait=script))
        assert accepted(world, 3) == ["ann", "bob"]
    with pytest.raises(RebuildError, match="none of its ancestors"):
        rebuild(world.log, world.blobs)


def test_an_optimiser_on_the_server_takes_the_mean_of_a_buffered_round(tmp_path: Path) -> None:
    plan = replace(BUFFERED.plan, strategy="fedavgm", server_lr=0.5)  # type: ignore[type-var]
    world = world_of(tmp_path, replace(BUFFERED, plan=plan))
    run(world.server(on_wait=Script(world, STALE)))
    assert accepted(world, 2) == ["ann", "cem"]
    assert rebuild(world.log, world.blobs, deep=True).identical


def test_a_merge_that_needs_all_updates_of_one_base_is_not_buffered(tmp_path: Path) -> None:
    plan = replace(BUFFERED.plan, strategy="svd")  # type: ignore[type-var]
    world = world_of(tmp_path, replace(BUFFERED, plan=plan), rounds=1)
    run(world.server(on_wait=Script(world, {1: [(name, 1) for name in NAMES]})))
    assert world.payloads(types.RoundOpened)[0].max_staleness == 0
    assert accepted(world, 1) == [*NAMES]


@pytest.mark.parametrize("change", ["rate", "synchronous"])
def test_updates_that_were_made_under_other_terms_do_not_mix(tmp_path: Path, change: str) -> None:
    world = world_of(tmp_path)
    script = Script(world, {**STALE, 2: [("cem", 1), ("ann", 2), ("bob", 2)]})
    until_closed(world, script)
    rate = replace(BUFFERED, plan=replace(BUFFERED.plan, lora_lr=0.001))  # type: ignore[type-var]
    run(world.server(on_wait=script, config=rate if change == "rate" else replace(BUFFERED, buffer_size=0)))
    assert accepted(world, 2) == ["ann", "bob"]


def test_a_round_waits_for_those_at_work_where_its_own_are_too_few(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    script = Script(world, {**STALE, 2: [("bob", 2), ("cem", 1)]})
    until_closed(world, script)
    clients.revoke(world.writer, "ann", "lost")
    run(world.server(on_wait=script))
    assert world.payloads(types.RoundOpened)[1].cohort == ["bob"]
    assert accepted(world, 2) == ["bob", "cem"]


def test_no_more_are_at_work_at_the_same_time_than_a_cohort_has(tmp_path: Path) -> None:
    world = world_of(tmp_path, names=(*NAMES, "dan"))

    def fast(awaited: Awaited) -> None:
        opened = world.rounds.open_round
        if opened is not None and opened.opened is not None and len(opened.instructed) == len(opened.opened.cohort):
            for client_id in {*opened.opened.cohort[:2]} - {*opened.replies}:
                Script(world, {}).answer(client_id, opened.number)

    run(world.server(on_wait=fast))
    assert [len(each.cohort) for each in world.payloads(types.RoundOpened)] == [3, 2]


def test_whoever_is_slow_and_counts_is_asked_as_often_as_others(tmp_path: Path) -> None:
    world = world_of(tmp_path)
    run(world.server(on_wait=Script(world, STALE)))
    assert past(world.rounds, 3, 3, 20).weights == dict.fromkeys(NAMES, 1.0)


def test_what_is_at_work_for_a_round_that_is_aborted_is_refused(tmp_path: Path) -> None:
    world = world_of(tmp_path, rounds=1)
    script = Script(world, STALE)
    until_closed(world, script)
    world.writer.append(types.RoundAbortRequested(world.devices["ann"].origin, "main", "r0001"))
    run(world.server(on_wait=script))
    late = script.answer("cem", 1)
    run(world.server(on_wait=script))
    assert refused(world)[-1] == (late, "r0001", "late")


def test_a_client_that_is_at_work_has_as_long_as_its_own_round_gave_it(tmp_path: Path) -> None:
    """The second round waits for it no longer, though its own deadline is far, and the third asks it again."""
    with clock_ahead(-592.0):
        world = world_of(tmp_path, replace(BUFFERED, deadline_s=600.0))
        script = Script(world, {**STALE, 2: [("bob", 2)], 3: [("bob", 3), ("cem", 3)]})
        until_closed(world, script)
    for device in world.devices.values():
        device.seen()
    world.request(1, "q2")
    clients.revoke(world.writer, "ann", "lost")
    run(world.server(on_wait=script))
    assert world.payloads(types.RoundOpened)[1].cohort == ["bob"]
    assert world.payloads(types.RoundAborted)[0].reason == "quorum"
    assert world.payloads(types.RoundOpened)[2].cohort == ["bob", "cem"]


def test_a_round_of_sums_waits_for_everybody(tmp_path: Path) -> None:
    config = replace(CONFIG, cohort_size=3, buffer_size=2)
    world = world_of(tmp_path, config, rounds=2)
    private = {1: [("ann", 1), ("bob", 1), ("cem", 1)], 2: [("bob", 2), ("cem", 2)]}
    run(world.server(on_wait=Script(world, private)))
    first, second = world.payloads(types.RoundOpened)
    assert (first.strategy, first.enough, first.max_staleness) == ("sums", None, 0)
    assert (second.strategy, second.enough, second.max_staleness) == ("ffa", 2, 10)
    assert accepted(world, 1) == [*NAMES]
    assert accepted(world, 2) == ["bob", "cem"]


def test_a_private_update_is_paid_for_once_however_late_it_counts(tmp_path: Path) -> None:
    config = replace(CONFIG, cohort_size=3, buffer_size=2)
    world = world_of(tmp_path, config, rounds=3)
    private = {1: [(name, 1) for name in NAMES], 2: [("ann", 2), ("bob", 2)], 3: [("cem", 2), ("ann", 3)]}
    run(world.server(on_wait=Script(world, private)))
    assert accepted(world, 3) == ["ann", "cem"]
    assert [each.weight for each in world.payloads(types.RoundClosed)[2].accepted] == [1.0, 1.0]
    assert [each.round_id for each in world.payloads(types.BudgetSpent) if each.client_id == "cem"] == ["r0001", "r0002"]
    assert rebuild(world.log, world.blobs, deep=True).identical


def test_weights_fall_with_the_root_of_the_staleness() -> None:
    assert [staleness_weight(rounds) for rounds in (0, 3, 8)] == [1.0, 0.5, pytest.approx(1 / 3)]
