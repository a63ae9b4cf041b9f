"""What rounds wait for, on a real deployment, at every place where they can wait."""

from __future__ import annotations

import threading
from contextlib import closing
from pathlib import Path

import pytest
from devices import CONFIG, World, step_to
from fedloop_events import types
from fedloop_events.errors import UnreachableError
from fedloop_events.locations import open_log
from fedloop_server.operations import awaiting, rounds
from fedloop_server.operations.awaiting import Awaited
from fedloop_server.operations.followed import Followed
from fedloop_server.rounds import actions
from msgspec.structs import replace


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "deployment")


def now(world: World) -> Awaited:
    return awaiting.now(Followed(world.log), world.config)


def later(world: World, ms: int) -> Awaited:
    """What is waited for so long after the last event."""
    followed = Followed(world.log)
    at_ms = max(record.appended_ms for record, _ in world.records(types.Payload)) + ms
    clients = followed.identities.clients
    return awaiting.awaited(followed.rounds, followed.releases, clients, world.config, now_ms=at_ms, excluded={})


def opened(world: World, *answer: str) -> None:
    """A round is open, its instructions are out, and these have answered; its server is gone."""
    stop = threading.Event()
    server = world.server()
    running = threading.Thread(target=server.run, args=(stop,))
    running.start()
    with world.serving(*answer):
        followed = Followed(world.log)
        for _ in range(600):
            state = followed.rounds.open_round
            asked = state is not None and len(state.instructed) == len(world.devices)
            if state is not None and asked and set(answer) <= {*state.replies, *state.declined}:
                break
            followed.wait(0.1)
    stop.set()
    running.join()


def test_before_any_server_has_started_it_is_the_server_that_is_waited_for(world: World) -> None:
    assert (now(world).what, now(world).line) == ("nothing", "no round is requested; no server has ever started")
    world.request()
    found = now(world)
    assert (found.what, found.request_id, found.epoch, found.decided_s) == ("server", "q1", 0, None)
    assert found.hint == "start it: `fedloop server run`"


def test_with_one_of_two_needed_devices_it_is_clients_that_are_waited_for(world: World) -> None:
    for name in ("ann", "bob", "cem"):
        world.device(name, examples=0 if name == "bob" else 64)
    world.writer.append(types.ClientRevoked(world.devices["ann"].origin, "cem", "lost"))
    world.request()
    world.server().step()
    found = now(world)
    assert (found.what, found.request_id, found.there, found.quorum) == ("clients", "q1", 1, 2)
    assert found.excluded == {"revoked": 1, "too-few-examples": 1}
    assert found.left_s == pytest.approx(world.config.quorum_wait_s, abs=10)
    assert "1 of the 2 needed can be asked (1 revoked, 1 too-few-examples); it is given up in" in found.line
    assert "is `fedloop server run` running" not in found.hint
    after = later(world, 130_000)
    assert after.excluded == {"revoked": 1, "unavailable": 2}
    assert after.hint == "start devices that do not run (`fedloop agent run`)"
    for name in ("ann", "bob"):
        world.devices[name].seen()
    assert "unavailable" not in now(world).excluded
    assert "start devices" not in now(world).hint


def test_a_running_server_says_who_cannot_pay_for_the_next_round(world: World) -> None:
    world.device("ann")
    world.device("bob", epsilon=1e-6)
    world.request()
    seen: list[Awaited] = []
    server = world.server(on_wait=seen.append)
    while not seen:
        server.step(wait_s=0.0)
    assert (seen[0].what, seen[0].there, seen[0].excluded) == ("clients", 1, {"budget-exceeded": 1})
    assert seen[0].hint == "enrol devices with a larger budget: `fedloop audit budget` says who has none left"
    world.device("cem")
    seen.clear()
    with world.serving("ann", "cem"):
        server.run(rounds=1)
    assert world.releases.releases.popitem()[1].status == "published"


def test_where_nobody_can_take_part_for_another_reason_the_hint_is_to_enrol(world: World) -> None:
    assert (
        Awaited("clients", quorum=2, excluded={"wants-privacy": 2}).hint
        == "enrol devices that can take part (`fedloop agent enrol`)"
    )


def test_a_round_names_who_has_not_answered_until_its_deadline_and_then_it_is_the_server(world: World) -> None:
    for name in ("ann", "bob", "cem"):
        world.device(name)
    world.devices["cem"].behave = lambda opened, arrays: "busy"
    world.request()
    opened(world, "ann", "cem")
    found = later(world, 1_000)
    assert (found.what, found.round_id, found.missing) == ("updates", "r0001", ["bob"])
    assert (found.there, found.asked, found.quorum) == (2, 3, 2)
    assert (found.hint, replace(found, decided_s=31.0).hint[:21]) == ("", "look at these devices")
    assert found.left_s is not None
    assert 0 < found.left_s <= world.config.deadline_s
    assert "r0001 waits for bob: 2 of 3 have answered, the quorum is 2; it ends in" in found.line
    after = later(world, 60_000)
    assert (after.what, after.round_id, after.left_s) == ("server", "r0001", None)
    assert after.hint.startswith("is `fedloop server run` running?")
    assert later(world, 31_000).epoch == 1


def test_once_the_quorum_has_answered_the_seconds_left_are_those_of_the_grace(tmp_path: Path) -> None:
    world = World(tmp_path / "deployment", replace(CONFIG, grace_s=20.0, deadline_s=500.0))
    for name in ("ann", "bob", "cem"):
        world.device(name)
    world.request()
    opened(world, "ann", "bob")
    found = later(world, 1_000)
    assert (found.what, found.missing, found.there) == ("updates", ["cem"], 2)
    assert found.left_s is not None
    assert 0 < found.left_s < 20
    assert later(world, 30_000).what == "server"


def test_a_server_that_has_just_decided_is_not_asked_about(world: World) -> None:
    for name in ("ann", "bob"):
        world.device(name)
    world.request()
    world.server().step()
    found = later(world, 1_000)
    assert (found.what, found.hint) == ("server", "")
    assert found.decided_s == pytest.approx(1.0, abs=0.1)
    assert "the server of epoch 1 has last decided 1 s ago" in found.line


def test_until_all_are_asked_and_once_it_is_to_be_aborted_a_round_waits_for_the_server(world: World) -> None:
    for name in ("ann", "bob", "cem"):
        world.device(name)
    world.request()
    step_to(world.server(), actions.CollectUpdates)
    found = later(world, 1_000)
    assert (found.what, found.round_id, found.asked) == ("server", "r0001", 0)
    opened(world, "ann")
    assert later(world, 1_000).what == "updates"
    rounds.abort(world.writer, "r0001", "wrong terms")
    assert later(world, 1_000).what == "server"


def test_a_round_that_has_closed_waits_for_the_server_until_its_release_is_decided(world: World) -> None:
    for name in ("ann", "bob"):
        world.device(name)
    world.request()
    server = world.server()
    with world.serving():
        step_to(server, actions.ProposeRelease)
        assert (now(world).what, now(world).round_id) == ("server", "r0001")
        server.step()
        assert (now(world).what, now(world).round_id) == ("server", "r0001")
        step_to(server, actions.Wait)
    assert now(world).what == "nothing"


def test_what_is_waited_for_is_the_same_whatever_the_seconds(world: World) -> None:
    world.device("ann")
    world.request()
    world.server().step()
    one, other = later(world, 1_000), later(world, 2_000)
    assert one != other
    assert one.subject == other.subject
    world.device("bob")
    assert later(world, 1_000).subject != one.subject


def test_without_the_servers_configuration_the_quorum_is_the_last_rounds(tmp_path: Path) -> None:
    world = World(tmp_path / "deployment", replace(CONFIG, quorum=3))
    for name in ("ann", "bob", "cem"):
        world.device(name)
    world.request(2)
    with world.serving():
        world.server().run(rounds=1)
    assert awaiting.now(Followed(world.log), None).quorum == 3


def test_of_a_log_without_a_model_nothing_is_awaited(tmp_path: Path) -> None:
    with closing(open_log(tmp_path, create=True)) as log:
        assert awaiting.now(Followed(log), None).what == "nothing"


def test_whoever_waits_for_a_request_is_told_for_what_also_when_the_time_is_over(world: World) -> None:
    world.device("ann")
    request_id = rounds.request(world.writer, 1, "drift")
    world.server().step()
    seen: list[Awaited] = []
    with pytest.raises(UnreachableError, match="not ended in time") as raised:
        rounds.until_ended(Followed(world.log), request_id, 0.2, config=world.config, on_wait=seen.append)
    assert {(each.what, each.there, each.request_id) for each in seen} == {("clients", 1, request_id)}
    assert "1 of the 2 needed" in raised.value.cause
    assert "server run" not in raised.value.hint


def test_a_running_server_says_what_it_waits_for_in_every_state(world: World) -> None:
    for name in ("ann", "bob"):
        world.device(name)
    world.devices["bob"].behave = lambda opened, arrays: None
    seen: list[Awaited] = []
    stop = threading.Event()

    def heard(awaited: Awaited) -> None:
        seen.append(awaited)
        if awaited.what == "nothing":
            world.request()
        if awaited.missing == ["bob"]:
            stop.set()

    server = world.server(on_wait=heard)
    with world.serving():
        server.run(stop)
    assert seen[0].what == "nothing"
    assert (seen[-1].what, seen[-1].there, seen[-1].round_id) == ("updates", 1, "r0001")
