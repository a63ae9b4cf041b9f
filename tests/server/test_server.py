"""The server's life: rounds and releases, whatever crashes, whoever misbehaves."""

from __future__ import annotations

import math
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
from devices import CONFIG, OPEN_CONFIG, PLAN, Behaviour, World, evaluation, scored
from devices import evaluate as half
from fedloop_events import ids, parts, topics, types
from fedloop_events.blobs import tensors
from fedloop_events.blobs.tensors import Array
from fedloop_events.envelope import Event
from fedloop_events.errors import FencedError
from fedloop_events.logs.port import START, Batch, EventLog, Position
from fedloop_server.config import ServerConfig
from fedloop_server.deployment import open_deployment
from fedloop_server.operations import registry
from fedloop_server.rounds import actions
from fedloop_server.rounds.loop import Server
from fedloop_server.rounds.rebuild import rebuild
from fedloop_tasks.evaluation import Measured, Scores
from msgspec.structs import replace

CLIENTS = ("ann", "bob", "cem")
fork = multiprocessing.get_context("fork")


@pytest.fixture
def world(tmp_path: Path) -> World:
    return enrolled(World(tmp_path / "deployment"))


def enrolled(world: World, **behaviours: Behaviour) -> World:
    epsilon = None if world.config is OPEN_CONFIG else 8.0
    for name in CLIENTS:
        world.device(name, epsilon=epsilon, behave=behaviours.get(name, lambda opened, arrays: arrays))
    return world


def until_idle(server: Server, limit: int = 100) -> list[actions.Action]:
    """Step until there is nothing to do; what was done."""
    done: list[actions.Action] = []
    while not isinstance(action := server.step(wait_s=0.0), actions.Wait):
        done.append(action)
        assert len(done) < limit
    return done


def outcome(world: World) -> list[tuple[str, str, list[str]]]:
    """What must not depend on crashes: each release, what became of it, and whose updates went in."""
    rounds, releases = world.rounds, world.releases
    return [
        (each.release, each.status, rounds.rounds[each.round_id].participants if each.round_id else [])
        for each in releases.releases.values()
    ]


def undisturbed(folder: Path, rounds: int = 3) -> list[tuple[str, str, list[str]]]:
    world = enrolled(World(folder))
    world.request(rounds)
    with world.serving():
        until_idle(world.server())
    return outcome(world)


# --- the main path ---------------------------------------------------------------------------------------------------


def test_private_rounds_begin_with_sums_and_end_with_the_plan(world: World) -> None:
    world.request(4)
    with world.serving():
        until_idle(world.server())
    rounds, releases = world.rounds, world.releases
    programs = [each.opened.strategy for each in rounds.rounds.values() if each.opened]
    assert programs == ["sums", "ffa", "ffa"]
    assert [each.status for each in releases.releases.values()] == ["published"] * 4
    last = rounds.rounds["r0004"]
    assert last.aborted is not None
    assert last.aborted.reason == "plan-exhausted"
    assert rounds.pending is None
    current = registry.current(releases, "default")
    assert current.evaluation is not None
    assert (current.number, current.evaluation.metrics) == (3, half({}).metrics)
    lineage = registry.lineage(rounds, releases, current.release)
    assert [[each.client_id for each in step.contributions] for step in lineage] == [list(CLIENTS)] * 3 + [[]]
    assert [step.strategy for step in lineage] == ["ffa", "ffa", "sums", None]
    assert rebuild(world.log, world.blobs, deep=True).identical


def test_each_round_starts_from_the_release_in_force_and_frozen_tensors_stay(world: World) -> None:
    world.request(3)
    with world.serving():
        until_idle(world.server())
    releases = list(world.releases.releases.values())
    assert [each.base_release for each in releases] == [None, *(each.release for each in releases[:-1])]
    first, last = (tensors.decode(world.blobs.get(releases[number].blob)) for number in (0, -1))
    assert np.array_equal(first["lora.0.query.A"], last["lora.0.query.A"])
    assert not np.array_equal(first["lora.0.query.B"], last["lora.0.query.B"])


def test_rounds_without_privacy_train_everything_from_the_first_one_on(tmp_path: Path) -> None:
    world = enrolled(World(tmp_path / "open", OPEN_CONFIG))
    world.request(2)
    with world.serving():
        until_idle(world.server())
    opened = [each.opened for each in world.rounds.rounds.values() if each.opened]
    assert [(each.strategy, each.mechanism) for each in opened] == [("fedavg", None)] * 2
    assert len(opened[0].upload) == 4
    assert rebuild(world.log, world.blobs).identical


@pytest.mark.parametrize("reports", [64, 2**40])
def test_a_client_that_claims_a_vast_weight_does_not_make_the_merge_its_own(tmp_path: Path, reports: int) -> None:
    """Whether its heartbeat contradicts the claim, or claims as much."""
    world = World(tmp_path / "open", OPEN_CONFIG)
    for name in ("ann", "bob", "cem", "dan"):
        world.device(name, epsilon=None)
    mallory = world.device(
        "mallory", epsilon=None, examples=reports, behave=lambda _, arrays: {n: a + 9 for n, a in arrays.items()}
    )
    mallory.weight = 10**12
    world.request(1)
    with world.serving():
        until_idle(world.server())
    (closed,), (opened,) = world.payloads(types.RoundClosed), world.payloads(types.RoundOpened)
    weights = {each.client_id: each.weight for each in closed.accepted}
    refused = {each.client_id: each.reason for each in closed.excluded}
    assert opened.max_weight == 256
    assert {name: weights[name] for name in ("ann", "bob", "cem", "dan")} == dict.fromkeys(("ann", "bob", "cem", "dan"), 64.0)
    if reports == 64:
        assert refused == {"mallory": "refused.implausible-weight"}
    else:
        assert weights["mallory"] == 256.0
    bias = tensors.decode(world.blobs.get(registry.current(world.releases, "default").blob))["head.bias"]
    assert np.abs(bias).max() < 7  # its own update is about 9
    assert rebuild(world.log, world.blobs).identical


def test_run_ends_after_so_many_rounds_or_when_none_is_requested_or_when_it_is_told_to_stop(tmp_path: Path) -> None:
    world = enrolled(World(tmp_path / "deployment", replace(CONFIG, plan=replace(PLAN, planned_rounds=4))))
    world.request(3)
    with world.serving():
        assert world.server().run(rounds=2) == 2
        assert world.server().run(until_idle=True) == 1
    assert len(world.releases.releases) == 4
    stop, seen = threading.Event(), threading.Event()

    def watch(record: object, payload: types.Payload) -> None:
        if isinstance(payload, types.InstructionSent) and payload.round_id == "r0004":
            seen.set()

    world.request(1, "q2")

    server = Server(world.log, world.blobs, world.writer, world.config, evaluate=half, on_event=watch)
    thread = threading.Thread(target=server.run, args=(stop,))
    thread.start()
    assert seen.wait(20)  # in the middle of a round that nobody answers
    stop.set()
    thread.join(20)
    assert not thread.is_alive()
    assert world.rounds.open_round is not None


# --- crashes ---------------------------------------------------------------------------------------------------------


def test_a_new_server_for_every_step_gives_the_same_releases(world: World, tmp_path: Path) -> None:
    world.request(3)
    with world.serving():
        for _ in range(60):
            server = world.server()
            server.step(0.0)  # takes the run over
            if isinstance(server.step(0.0), actions.Wait):
                break
    assert outcome(world) == undisturbed(tmp_path / "undisturbed")
    assert rebuild(world.log, world.blobs, deep=True).identical


class Killed(BaseException):
    """In place of SIGKILL: nothing catches it."""


class Mortal:
    """A log whose user dies at its n-th append, just before or just after it is durable."""

    def __init__(self, log: EventLog, at: int, *, before: bool) -> None:
        self.log, self.left, self.before, self.dead = log, at, before, False

    def append(self, events: Sequence[Event]) -> None:
        self.left -= 1
        if self.left == 0 and self.before:
            raise Killed
        self.log.append(events)
        if self.left == 0:
            raise Killed

    def read(
        self, topics: Collection[str] = topics.ALL, after: Position = START, *, limit: int = 1000, wait_s: float = 0.0
    ) -> Batch:
        return self.log.read(topics, after, limit=limit, wait_s=wait_s)

    def end(self) -> Position:
        return self.log.end()

    def close(self) -> None:
        pass


APPENDS = 14
"""Of a server that makes two rounds: epoch, evaluation; opened, instructions, closed, proposed, evaluated, decided; twice."""


@pytest.mark.slow
@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("at", range(1, APPENDS + 1))
def test_a_server_killed_at_any_append_loses_nothing_and_counts_nothing_twice(
    world: World, at: int, before: bool, tmp_path_factory: pytest.TempPathFactory
) -> None:
    world.request(2)
    with world.serving():
        with pytest.raises(Killed):
            until_idle(world.server(log=Mortal(world.log, at, before=before)))
        until_idle(world.server())
    assert outcome(world) == _expected(tmp_path_factory)
    spent = [(each.client_id, each.round_id) for each in world.payloads(types.BudgetSpent)]
    assert len(spent) == len(set(spent)) == 6
    sent = [(each.client_id, each.round_id) for each in world.payloads(types.InstructionSent)]
    assert len(sent) == len(set(sent)) == 6
    assert rebuild(world.log, world.blobs, deep=True).identical


_cache: list[list[tuple[str, str, list[str]]]] = []


def _expected(factory: pytest.TempPathFactory) -> list[tuple[str, str, list[str]]]:
    if not _cache:
        _cache.append(undisturbed(factory.mktemp("undisturbed") / "deployment", rounds=2))
    return _cache[0]


def test_the_appends_of_two_rounds_are_those_that_crashes_are_tried_at(world: World) -> None:
    world.request(2)
    counting = Mortal(world.log, 0, before=False)
    with world.serving():
        until_idle(world.server(log=counting))
    assert -counting.left == APPENDS


class Torn(Mortal):
    """A log that holds no more than the first `at` events of its user, who dies of the next: batches are torn."""

    def __init__(self, log: EventLog, at: int) -> None:
        super().__init__(log, at, before=False)

    def append(self, events: Sequence[Event]) -> None:
        kept = events[: self.left]
        self.left -= len(kept)
        if kept:
            self.log.append(kept)
        if len(kept) < len(events):
            raise Killed


EVENTS = 17
"""Of a server that makes one round, where each name in a list is a part of its own: epoch, evaluation; three parts of the cohort,
one of who was left out, the opening; instructions; three parts of what counts, the closing; proposed, evaluated, decided."""


@pytest.fixture
def in_parts(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """Every list is too long for one event."""
    monkeypatch.setattr(parts, "PART_BYTES", 1)
    world.device("dan", examples=0)
    world.request(1)
    return world


def test_a_round_in_many_events_is_one_round(in_parts: World, tmp_path: Path) -> None:
    counting = Torn(in_parts.log, EVENTS)
    with in_parts.serving():
        until_idle(in_parts.server(log=counting))
    assert counting.left == 0, "these are the events that crashes are tried between"
    assert len(in_parts.payloads(types.CohortListed)) == 4
    assert len(in_parts.payloads(types.RepliesListed)) == 3
    state = in_parts.rounds.rounds["r0001"]
    assert state.opened is not None
    assert (state.opened.cohort, state.participants, state.excluded["dan"].reason) == (
        list(CLIENTS),
        list(CLIENTS),
        "too-few-examples",
    )
    assert outcome(in_parts) == undisturbed(tmp_path / "undisturbed", rounds=1)
    assert rebuild(in_parts.log, in_parts.blobs, deep=True).identical


@pytest.mark.slow
@pytest.mark.parametrize("at", range(EVENTS))
def test_a_server_killed_between_the_events_of_one_decision_has_not_decided_it(in_parts: World, at: int, tmp_path: Path) -> None:
    with in_parts.serving():
        with pytest.raises(Killed):
            until_idle(in_parts.server(log=Torn(in_parts.log, at)))
        until_idle(in_parts.server())
    assert outcome(in_parts) == undisturbed(tmp_path / "undisturbed", rounds=1)
    assert list(in_parts.rounds.rounds) == ["r0001"]
    assert sorted(each.client_id for each in in_parts.payloads(types.BudgetSpent)) == list(CLIENTS)
    assert sorted(each.client_id for each in in_parts.payloads(types.InstructionSent)) == list(CLIENTS)
    assert rebuild(in_parts.log, in_parts.blobs, deep=True).identical


def _serve_in_a_process(folder: Path, config: ServerConfig) -> None:
    deployment = open_deployment(folder)
    Server(deployment.log, deployment.blobs, deployment.writer, config, evaluate=half).run()


def test_a_server_process_killed_in_the_middle_of_a_round_is_replaced(world: World, tmp_path: Path) -> None:
    world.request(3)
    process = fork.Process(target=_serve_in_a_process, args=(world.folder, world.config))
    process.start()
    try:
        with world.serving("ann"):
            wait_for(lambda: any(each.round_id == "r0001" for each in world.payloads(types.UpdateSubmitted)))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGKILL)
    finally:
        process.kill()
        process.join()
    open_round = world.rounds.open_round
    assert open_round is not None
    assert list(open_round.replies) == ["ann"]
    with world.serving():
        until_idle(world.server())
    assert outcome(world) == undisturbed(tmp_path / "undisturbed")
    assert rebuild(world.log, world.blobs, deep=True).identical


def wait_for(condition: Callable[[], bool], timeout_s: float = 30.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        threading.Event().wait(0.02)


def test_a_server_that_another_one_replaced_stops_and_what_it_still_says_counts_for_nothing(world: World) -> None:
    world.request(1)
    old, new = world.server(), world.server()
    old.step()
    old.step()
    assert isinstance(old.step(), actions.OpenRound)
    new.step()
    with pytest.raises(FencedError, match="epoch 2"):
        old.step()
    # What it had on its way when it was fenced, under the very id that the new one will need.
    origin = world.payloads(types.DeploymentCreated)[0].origin
    aborted = types.RoundAborted(origin, old.epoch, "main", "r0001", "operator")
    world.log.append([world.writer.event(aborted, id=ids.derived_id(origin, "main", "r0001", "aborted"))])
    [opened] = world.payloads(types.RoundOpened)
    again = replace(opened, round_id="r0002", number=2)
    world.log.append([world.writer.event(again, id=ids.derived_id(origin, "main", "round", 2))])
    assert world.stale == 2
    with world.serving():
        until_idle(new)
        world.request(1, "q2")
        until_idle(new)
    assert [(each.state, each.participants) for each in world.rounds.rounds.values()] == [("closed", list(CLIENTS))] * 2
    assert [each.status for each in world.releases.releases.values()] == ["published"] * 3


def test_two_servers_that_start_at_once_get_an_epoch_each(world: World) -> None:
    one, other = world.server(), world.server()
    one.step()
    other.step()
    assert (one.epoch, other.epoch) == (1, 2)
    with pytest.raises(FencedError):
        one.step()
    other.step()


# --- who counts ------------------------------------------------------------------------------------------------------


def test_a_round_that_lacks_its_quorum_is_aborted_and_makes_no_release(tmp_path: Path) -> None:
    config = replace(CONFIG, deadline_s=0.3)
    world = enrolled(World(tmp_path / "deployment", config), bob=lambda opened, arrays: None, cem=lambda *_: "battery-low")
    world.request(1)
    with world.serving():
        until_idle(world.server())
    state = world.rounds.rounds["r0001"]
    assert state.aborted is not None
    assert (state.aborted.reason, state.aborted.detail) == ("quorum", "1 of 3 updates were accepted, and the quorum is 2")
    assert {name: each.reason for name, each in state.excluded.items()} == {"bob": "silent", "cem": "declined.battery-low"}
    assert (state.participants, list(world.releases.by_round)) == ([], [])


def test_a_request_waits_for_enough_clients_and_is_then_given_up(tmp_path: Path) -> None:
    world = World(tmp_path / "deployment", replace(CONFIG, quorum_wait_s=0.2))
    world.device("ann")
    world.request(5)
    server = world.server()
    until_idle(server)
    wait_for(lambda: not isinstance(server.step(0.05), actions.Wait))
    aborted = world.payloads(types.RoundAborted)
    assert [(each.reason, each.detail) for each in aborted] == [("quorum", "1 clients can take part, and the quorum is 2")]
    assert isinstance(server.step(0.0), actions.Wait)
    assert world.rounds.pending is None
    world.device("bob")
    world.request(1, "q2")
    with world.serving():
        until_idle(server)
    assert world.rounds.rounds["r0002"].participants == ["ann", "bob"]


def test_who_cannot_take_part_is_left_out_with_the_reason(tmp_path: Path) -> None:
    world = World(tmp_path / "deployment")
    for name, epsilon, examples in (("ann", 8.0, 64), ("bob", 8.0, 64), ("cem", 8.0, 0), ("dan", 0.5, 64), ("eve", 8.0, 64)):
        world.device(name, epsilon=epsilon, examples=examples)
    origin = world.devices["ann"].origin
    world.writer.append(types.ClientRevoked(origin, "eve", "lost"))
    world.request(1)
    with world.serving():
        until_idle(world.server())
    state = world.rounds.rounds["r0001"]
    assert state.participants == ["ann", "bob"]
    assert {name: each.reason for name, each in state.excluded.items()} == {
        "cem": "too-few-examples",
        "dan": "budget-exceeded",
        "eve": "revoked",
    }


def test_a_client_whose_ledger_was_forked_is_left_out(world: World) -> None:
    world.request(1)
    with world.serving():
        until_idle(world.server())
    spent = next(each for each in world.payloads(types.BudgetSpent) if each.client_id == "ann")
    world.devices["ann"].writer.append(replace(spent, seq=99, instruction_id="f" * 32))
    world.request(1, "q2")
    with world.serving():
        until_idle(world.server())
    state = world.rounds.rounds["r0002"]
    assert state.participants == ["bob", "cem"]
    assert state.excluded["ann"].reason == "client-suspended"


POISON: dict[str, tuple[Callable[[dict[str, Array]], dict[str, Array]], str]] = {
    "nan": (lambda arrays: {name: values * np.float32(np.nan) for name, values in arrays.items()}, "refused.not-finite"),
    "boosted": (lambda arrays: {name: values * np.float32(1e6) for name, values in arrays.items()}, "refused.norm"),
    "shape": (lambda arrays: {name: values.reshape(-1) for name, values in arrays.items()}, "refused.wrong-tensors"),
    "names": (lambda arrays: {f"{name}x": values for name, values in arrays.items()}, "refused.wrong-tensors"),
}


@pytest.mark.parametrize("kind", POISON)
def test_a_poisoned_update_is_refused_and_the_round_goes_on_without_it(tmp_path: Path, kind: str) -> None:
    poison, reason = POISON[kind]
    world = enrolled(World(tmp_path / "deployment"), bob=lambda opened, arrays: poison(arrays))
    world.request(1)
    with world.serving():
        until_idle(world.server())
    state = world.rounds.rounds["r0001"]
    assert state.participants == ["ann", "cem"]
    assert state.excluded["bob"].reason == reason
    assert [each.client_id for each in state.refused.values()] == ["bob"]
    assert registry.current(world.releases, "default").number == 1
    assert rebuild(world.log, world.blobs).identical


def test_an_update_that_comes_after_its_round_has_closed_is_refused_as_late(tmp_path: Path) -> None:
    config = replace(CONFIG, deadline_s=0.3)
    world = enrolled(World(tmp_path / "deployment", config), bob=lambda opened, arrays: None)
    world.request(1)
    server = world.server()
    with world.serving():
        until_idle(server)
    before = outcome(world)
    state = world.rounds.rounds["r0001"]
    bob = world.devices["bob"]
    assert state.opened is not None
    late = bob.submit(state.opened, state.instructed["bob"], bob.trained(state.opened))
    until_idle(server)
    refused = world.rounds.rounds["r0001"].refused
    assert {update: each.reason for update, each in refused.items()} == {late: "late"}
    assert outcome(world) == before
    until_idle(world.server())
    assert len(world.payloads(types.UpdateRefused)) == 1


# --- the gate and the registry ---------------------------------------------------------------------------------------


def in_turn(*found: Measured) -> Callable[[Mapping[str, Array]], Measured]:
    left = iter(found)
    return lambda arrays: next(left)


def test_a_release_that_is_less_accurate_than_the_margin_allows_is_rejected(world: World) -> None:
    world.request(3)
    with world.serving():
        until_idle(world.server(evaluate=in_turn(*map(evaluation, (0.5, 0.9, 0.8, 0.89)))))
    releases = list(world.releases.releases.values())
    assert [each.status for each in releases] == ["published", "published", "rejected", "published"]
    assert releases[2].reason == "worse"
    assert releases[3].base_release == releases[1].release


RIGHT = [1] * 80 + [0] * 20
"""Of the release in force."""
BY_CHANCE = [1] * 74 + [0] * 24 + [1] * 2
"""Worse on 6 examples and better on 2: as good for all that is known."""
WORSE = [0] * 30 + [1] * 50 + [0] * 20


def test_chance_rejects_no_release_and_what_is_worse_beyond_it_is_rejected_with_both_values(world: World) -> None:
    world.request(3)
    with world.serving():
        until_idle(world.server(evaluate=in_turn(scored(*RIGHT), scored(*RIGHT), scored(*BY_CHANCE), scored(*WORSE))))
    assert [each.status for each in world.releases.releases.values()] == ["published"] * 3 + ["rejected"]
    [rejected] = world.payloads(types.ReleaseRejected)
    assert rejected.reason == "worse"
    assert re.fullmatch(
        r"accuracy 0\.5, in force 0\.76: a gain of -0\.26 \(90 % interval -0\.3\d* to -0\.\d+\), at least -0\.02 is needed",
        rejected.detail,
    )
    stored = {each.scores for each in world.payloads(types.ReleaseEvaluated)}
    assert len(stored) == 4, "two releases that are right on the same examples have files of their own"
    assert all(each is not None and world.blobs.exists(each) for each in stored)


def test_where_scores_are_gone_or_broken_the_bare_difference_decides_and_the_server_goes_on(world: World) -> None:
    evaluate = in_turn(scored(*RIGHT), scored(*RIGHT), scored(*BY_CHANCE), scored(*RIGHT))
    world.request(3)
    with world.serving():
        world.server(evaluate=evaluate).run(rounds=1)
        for path in _scores_of(world):
            path.unlink()
        world.server(evaluate=evaluate).run(rounds=1)
        for path in _scores_of(world):
            path.chmod(0o600)
            path.write_bytes(b"broken")
        world.server(evaluate=evaluate).run(rounds=1)
    assert [each.status for each in world.releases.releases.values()] == ["published", "published", "rejected", "published"]
    assert "no scores by example" in world.payloads(types.ReleaseRejected)[0].detail


def _scores_of(world: World) -> list[Path]:
    """The files of scores that are there."""
    names = {each.scores.sha256 for each in world.payloads(types.ReleaseEvaluated) if each.scores is not None}
    return [path for name in names if (path := world.folder / "blobs" / name[:2] / name[2:]).exists()]


def test_a_release_without_a_finite_metric_is_recorded_and_rejected_and_the_first_one_gives_way(world: World) -> None:
    def ruined(leading: float) -> Measured:
        scores = Scores.of([leading, 1.0], [1, 1])
        return Measured({"loss": leading, "accuracy": 0.5}, "loss", 2, "e" * 64, higher_is_better=False, scores=scores)

    world.request(3)
    with world.serving():
        until_idle(world.server(evaluate=in_turn(ruined(math.nan), ruined(1.0), ruined(math.inf), ruined(math.nan))))
    releases = list(world.releases.releases.values())
    assert [each.status for each in releases] == ["published", "published", "rejected", "rejected"]
    assert [each.evaluation.metrics for each in releases if each.evaluation] == [
        {"loss": value, "accuracy": 0.5} for value in (None, 1.0, None, None)
    ]
    assert {each.reason for each in releases[2:]} == {"not-finite"}
    assert all(each.higher_is_better is False for each in world.payloads(types.ReleaseEvaluated))


def test_less_of_a_loss_is_better(world: World) -> None:
    def loss(value: float) -> Measured:
        return Measured({"loss": value}, "loss", 100, "e" * 64, higher_is_better=False)

    world.request(3)
    with world.serving():
        until_idle(world.server(evaluate=in_turn(loss(3.0), loss(2.0), loss(2.5), loss(1.0))))
    assert [each.status for each in world.releases.releases.values()] == ["published", "published", "rejected", "published"]


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_a_server_killed_while_it_records_an_evaluation_leaves_the_same_bytes(world: World, before: bool) -> None:
    def evaluate(arrays: Mapping[str, Array]) -> Measured:
        return scored(*RIGHT)

    world.request(1)
    with world.serving():
        with pytest.raises(Killed):
            until_idle(world.server(log=Mortal(world.log, 2, before=before), evaluate=evaluate))
        put = set(world.blobs.all())
        until_idle(world.server(evaluate=evaluate))
    first, second = world.payloads(types.ReleaseEvaluated)
    assert first.scores is not None
    assert second.scores is not None
    assert first.scores.sha256 in put, "the file comes before the event"
    made = {each.blob.sha256 for each in world.payloads(types.ReleaseProposed)}
    assert {first.scores.sha256, second.scores.sha256} == set(world.blobs.all()) - made - {
        ref.sha256 for each in world.payloads(types.UpdateSubmitted) for ref in each.content.arrays.values()
    }, "no other file of scores is left behind"


def test_a_new_held_out_set_measures_the_release_in_force_again(world: World) -> None:
    world.request(2)
    with world.serving():
        server = world.server(evaluate=lambda arrays: evaluation(0.9, "a"))
        server.run(rounds=1)
        until_idle(world.server(evaluate=lambda arrays: evaluation(0.5, "b")))
    assert [each.status for each in world.releases.releases.values()] == ["published"] * 3
    assert list(list(world.releases.releases.values())[1].evaluations) == ["a" * 64, "b" * 64]


def test_after_a_rollback_the_next_round_starts_from_the_release_in_force(world: World) -> None:
    world.request(2)
    with world.serving():
        until_idle(world.server())
        _, first, second = world.releases.releases
        registry.roll_back(world.writer, release=first, reason="worse in the field")
        assert registry.current(world.releases, "default").release == first
        world.request(1, "q2")
        until_idle(world.server())
    third = registry.current(world.releases, "default")
    assert (third.number, third.base_release) == (3, first)
    assert world.releases.releases[second].withdrawn


def test_a_round_whose_base_was_rolled_back_meanwhile_makes_no_release(world: World) -> None:
    world.request(1)
    with world.serving():
        until_idle(world.server())
    world.request(1, "q2")
    server = world.server()
    zero = next(iter(world.releases.releases))
    while not isinstance(server.step(), actions.OpenRound):
        pass
    registry.roll_back(world.writer, release=zero, reason="worse in the field")
    with world.serving():
        until_idle(server)
    aborted = world.rounds.rounds["r0002"].aborted
    assert aborted is not None
    assert aborted.reason == "stale-base"
    assert registry.current(world.releases, "default").release == zero


def test_a_candidate_whose_base_was_rolled_back_is_rejected(world: World) -> None:
    world.request(2)
    server = world.server()
    with world.serving():
        server.run(rounds=1)
        while not isinstance(server.step(), actions.ProposeRelease):
            pass
    registry.roll_back(world.writer, release=next(iter(world.releases.releases)), reason="worse in the field")
    until_idle(server)
    assert [each.reason for each in world.releases.releases.values() if each.status == "rejected"] == ["stale-base"]


def test_a_round_whose_blobs_are_gone_is_aborted_in_place_of_a_server_that_can_never_go_on(world: World) -> None:
    world.request(1)
    server = world.server()
    with world.serving():
        while not isinstance(server.step(), actions.CollectUpdates):
            pass
    closed = world.rounds.rounds["r0001"].closed
    assert closed is not None
    blob = closed.accepted[0].blob
    assert blob is not None
    for path in world.folder.rglob(f"*{blob.sha256[2:]}"):
        path.unlink()
    until_idle(server)
    aborted = world.rounds.rounds["r0001"].aborted
    assert aborted is not None
    assert (aborted.reason, aborted.detail) == ("unmergeable", "BlobError")


def test_a_request_by_a_clock_that_is_ahead_is_given_up_in_time_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    world = World(tmp_path / "deployment", replace(CONFIG, quorum_wait_s=0.2))
    with monkeypatch.context() as wrong:
        right = time.time_ns
        wrong.setattr(time, "time_ns", lambda: right() + 3 * 86_400 * 10**9)
        world.device("ann")
        world.request(1)
    server = world.server()
    wait_for(lambda: bool(server.step(0.05)) and bool(world.payloads(types.RoundAborted)))
    (aborted,) = world.payloads(types.RoundAborted)
    assert aborted.detail == "0 clients can take part, and the quorum is 2"


def test_a_reply_by_a_clock_that_is_ahead_ends_no_round(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that goes on with a round counts what has passed by what servers have decided."""
    world = World(tmp_path / "deployment")
    ann, bob = world.device("ann"), world.device("bob")
    world.request(1)
    stop, server = threading.Event(), world.server()
    running = threading.Thread(target=server.run, args=(stop,))
    running.start()
    wait_for(lambda: len(world.payloads(types.InstructionSent)) == 2)
    stop.set()
    running.join(30)
    with monkeypatch.context() as wrong:
        right = time.time_ns
        wrong.setattr(time, "time_ns", lambda: right() + 3 * 86_400 * 10**9)
        ann.step()
    stop.clear()
    running = threading.Thread(target=world.server().run, args=(stop, 1))
    running.start()
    wait_for(lambda: len(world.payloads(types.EpochStarted)) == 2)
    bob.step()
    running.join(30)
    assert not running.is_alive()
    assert [each.client_id for each in world.payloads(types.RoundClosed)[0].accepted] == ["ann", "bob"]
