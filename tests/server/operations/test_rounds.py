"""What is answered about rounds on a real deployment, and asking for more."""

from __future__ import annotations

import threading
from itertools import pairwise
from pathlib import Path

import msgspec
import pytest
from devices import CONFIG, World
from fedloop_events import types
from fedloop_events.errors import FedloopError, UnreachableError, UsageError
from fedloop_server.operations import rounds
from fedloop_server.operations.followed import Followed
from fedloop_server.rounds import actions


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Two devices that answer, and one that declines."""
    world = World(tmp_path / "deployment")
    for name in ("ann", "bob"):
        world.device(name)
    world.device("cem", behave=lambda opened, arrays: "busy")
    return world


def test_a_round_that_made_a_release_is_summarised_in_numbers(world: World) -> None:
    world.request(2, reason="drift")
    with world.serving():
        world.server().run(rounds=2)
    followed = Followed(world.log)
    first, second = rounds.summaries(followed)
    zero, one, two = world.releases.releases
    assert (first.round_id, first.number, first.state, first.kind, first.over) == ("r0001", 1, "published", "sums", True)
    assert (first.base_release, first.release, second.base_release, second.release) == (zero, one, one, two)
    assert (first.cohort, first.participants) == (["ann", "bob", "cem"], ["ann", "bob"])
    assert first.evaluation is not None
    assert first.evaluation.score == 0.5
    assert [(each.client_id, each.reason) for each in first.excluded] == [("cem", "declined.busy")]
    assert (first.replies, first.decision, first.aborted) == (2, None, "")
    assert [(each.request_id, each.reason) for each in (first, second)] == [("q1", "drift")] * 2
    (opened,) = (record for record, payload in world.records(types.RoundOpened) if payload.round_id == "r0001")
    (published,) = (record for record, payload in world.records(types.ReleasePublished) if payload.release == one)
    assert (first.opened_ms, first.ended_ms) == (opened.appended_ms, published.appended_ms)
    assert first.took_ms == published.appended_ms - opened.appended_ms
    assert first.bytes_up > 0
    assert first.bytes_down > 0


def test_the_detail_of_a_round_is_its_terms_and_who_declined_them(world: World) -> None:
    world.request()
    with world.serving():
        world.server().run(rounds=1)
    (opened,) = world.payloads(types.RoundOpened)
    detail = rounds.detail(rounds.find(world.rounds, "r0001"), world.rounds)
    assert (detail.mechanism, detail.hyperparameters) == (opened.mechanism, opened.hyperparameters)
    assert (detail.quorum, detail.deadline_s) == (2, 30.0)
    assert (detail.declined, detail.refused) == ({"cem": "busy"}, [])
    with pytest.raises(UsageError, match="no round 'r0002'") as raised:
        rounds.find(world.rounds, "r0002")
    assert "r0001" in raised.value.hint


def test_a_round_that_was_given_up_has_a_reason_and_no_terms(tmp_path: Path) -> None:
    world = World(tmp_path / "deployment", msgspec.structs.replace(CONFIG, quorum_wait_s=0.001))
    world.request(3)
    world.server().run(rounds=1)
    followed = Followed(world.log)
    assert rounds.waiting(followed.rounds) == 0
    (given_up,) = rounds.summaries(followed)
    assert (given_up.state, given_up.aborted, given_up.over) == ("aborted", "quorum", True)
    assert (given_up.kind, given_up.cohort, given_up.took_ms) == (None, [], None)
    assert rounds.detail(followed.rounds.rounds["r0001"], followed.rounds).mechanism is None


def test_a_request_is_signed_by_the_server_and_waits_until_its_rounds_open(world: World) -> None:
    request_id = rounds.request(world.writer, 3, "drift")
    ((record, requested),) = world.records(types.RoundRequested)
    assert (requested.request_id, requested.rounds, requested.reason) == (request_id, 3, "drift")
    assert record.signature
    assert rounds.waiting(Followed(world.log).rounds) == 3
    with world.serving():
        world.server().run(rounds=1)
    assert rounds.waiting(Followed(world.log).rounds) == 2


@pytest.mark.parametrize("reason", ["two\nlines", "\x1b[31m", "x" * 201])
def test_a_reason_that_no_log_should_hold_is_refused_and_nothing_appended(world: World, reason: str) -> None:
    with pytest.raises(UsageError, match="one line"):
        rounds.request(world.writer, 1, reason)
    assert world.payloads(types.RoundRequested) == []


def test_waiting_for_a_request_gives_its_own_rounds_once_all_are_over(world: World) -> None:
    world.request()
    with world.serving():
        world.server().run(rounds=1)
    followed = Followed(world.log)
    request_id = rounds.request(world.writer, 1, "operator")
    with pytest.raises(UnreachableError, match="not ended in time"):
        rounds.until_ended(followed, request_id, timeout_s=0.0)
    with world.serving():
        running = threading.Thread(target=world.server().run, kwargs={"rounds": 1})
        running.start()
        ended = rounds.until_ended(followed, request_id, timeout_s=60)
        running.join()
    assert [(each.round_id, each.state) for each in ended] == [("r0002", "published")]


def test_watching_gives_each_change_of_a_round_until_enough_are_over(world: World) -> None:
    world.request()
    with world.serving():
        world.server().run(rounds=1)
    followed = Followed(world.log)
    rounds.request(world.writer, 1, "operator")
    with world.serving():
        running = threading.Thread(target=world.server().run, kwargs={"rounds": 1})
        running.start()
        seen = list(rounds.watch(followed, rounds=1, timeout_s=60))
        running.join()
    assert {each.round_id for each in seen} == {"r0002"}
    assert (seen[-1].state, seen[-1].over) == ("published", True)
    assert all(before != after for before, after in pairwise(seen))
    with pytest.raises(UnreachableError, match="not ended in time"):
        list(rounds.watch(followed, rounds=1, timeout_s=0.0))


def test_a_withdrawn_request_leaves_its_open_round_alone_and_ends_with_it(world: World) -> None:
    request_id = rounds.request(world.writer, 3, "drift")
    with world.serving():
        world.server().run(rounds=1)
    assert rounds.withdraw(world.writer, request_id, "changed my mind") == 2
    followed = Followed(world.log)
    assert (rounds.waiting(followed.rounds), followed.rounds.pending) == (0, None)
    assert [each.round_id for each in rounds.until_ended(followed, request_id, timeout_s=0.0)] == ["r0001"]
    with pytest.raises(FedloopError, match=r"nothing more is to come of request .*: it is withdrawn"):
        rounds.withdraw(world.writer, request_id, "again")
    other = rounds.request(world.writer, 1, "drift")
    with pytest.raises(UsageError, match="no request 'q'") as raised:
        rounds.withdraw(world.writer, "q", "operator")
    assert raised.value.hint == f"pending are {other}"
    assert len(world.payloads(types.RoundRequestWithdrawn)) == 1


def test_requests_withdrawn_just_as_their_round_opens_do_not_keep_the_next_one_from_opening(world: World) -> None:
    server = world.server()
    for request_id in ("q1", "q2"):
        world.request(1, request_id)
        while not isinstance(action := server._next(), actions.OpenRound):
            server.step(wait_s=0.0)
        rounds.withdraw(world.writer, request_id, "too late")
        server._decide(action)
    world.request(1, "q3")
    assert isinstance(server.step(wait_s=0.0), actions.OpenRound)
    assert {each.request_id for each in world.rounds.rounds.values()} == {"q3"}
