"""Reading a deployment's log: its end, every fold over it, and opening it where only the server sees it whole."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
import samples
from devices import World
from fedloop_events import topics, types
from fedloop_events.envelope import encode
from fedloop_events.errors import UsageError
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.folds.rounds import RoundsView
from fedloop_events.folds.snapshots import Snapshots
from fedloop_events.ids import new_id
from fedloop_events.locations import DeploymentLocation, locate
from fedloop_events.logs.port import read_all
from fedloop_server.operations import opening, tail
from fedloop_server.operations.replaying import MOST_REFUSED, replay
from gateway.harness import serving


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Two devices after a round, whose server has kept its snapshots."""
    world = World(tmp_path / "deployment")
    for name in ("ann", "bob"):
        world.device(name)
    world.request()
    with world.serving():
        world.server().run(rounds=1)
    return world


def test_the_last_events_are_those_of_the_topics_asked_for(world: World) -> None:
    everything = list(read_all(world.log))
    end = tail.last(world.log, 3)
    assert list(end.records) == everything[-3:]
    assert end.position == world.log.end()
    rounds = [record for record in everything if record.topic == topics.ROUNDS]
    assert list(tail.last(world.log, 2, (topics.ROUNDS,)).records) == rounds[-2:]
    assert list(tail.last(world.log, 0).records) == []
    assert len(tail.last(world.log, 10_000).records) == len(everything)
    with pytest.raises(UsageError, match="no topic 'nonsense'"):
        tail.last(world.log, 1, ("nonsense",))


def test_following_gives_what_is_appended_after_the_position(world: World) -> None:
    end = tail.last(world.log, 1)
    followed = tail.follow(world.log, end.position)
    world.request(request_id="q2")
    world.devices["ann"].seen()
    first = list(islice(followed, 2))
    world.request(request_id="q3")
    assert [*first, next(followed)] == list(read_all(world.log, after=end.position))


def test_replaying_counts_what_the_folds_have(world: World) -> None:
    origin = world.devices["ann"].origin
    world.log.append([encode(types.RoundRequested(origin, "main", f"forged-{n}"), id=new_id(), time_s=0) for n in range(25)])
    found = replay(world.log, None)
    assert found.events == sum(found.types.values()) == len(list(read_all(world.log)))
    assert (found.clients, found.revoked, found.epoch, found.spends, found.suspended) == (2, 0, 1, 2, [])
    assert (found.rounds, found.releases) == ({"closed": 1}, {"published": 2})
    assert found.current == list(world.releases.releases)[-1]
    assert (found.refused, len(found.first_refused), found.unknown) == (25, MOST_REFUSED, 0)
    assert {each.type for each in found.first_refused} == {"io.fedloop.round.requested.v1"}
    assert (found.matching, found.differing) == ([], [])


def test_a_snapshot_that_is_not_the_logs_state_is_named(world: World) -> None:
    reader = Reader(world.log, RoundsView(), identities=Identities(), snapshots=Snapshots(world.folder / "rounds.snapshot"))
    reader.catch_up()
    reader.save()
    assert replay(world.log, world.folder).matching == ["rounds.snapshot"]
    kept = Snapshots(world.folder / "rounds.snapshot")
    kept.save(RoundsView.version, reader.position, RoundsView("other").to_state(), reader.standing, {})
    found = replay(world.log, world.folder)
    assert (found.matching, found.differing) == ([], ["rounds.snapshot"])


def test_a_log_in_a_folder_needs_no_key(world: World) -> None:
    place = locate(world.folder)
    with pytest.raises(UsageError):
        opening.open_log(DeploymentLocation(str(world.folder / "nowhere"), None), None)
    log = opening.open_log(place, None)
    assert log.end() == world.log.end()
    log.close()
    current = list(world.releases.releases.values())[-1]
    assert opening.open_blobs(place, None).exists(current.blob)


def test_a_gateway_shows_log_and_blobs_to_whoever_has_the_servers_key(tmp_path: Path) -> None:
    key_file = tmp_path / "deployment" / "server" / "key.pem"
    key_file.parent.mkdir(parents=True)
    samples.key("server").save(key_file)
    with serving(tmp_path, "device-1") as served:
        blob = served.blobs.put([b"tensors"])
        place = DeploymentLocation(served.url, served.url)
        log = opening.open_log(place, tmp_path / "deployment")
        assert len(list(read_all(log))) == 2
        log.close()
        assert opening.open_blobs(place, tmp_path / "deployment").get(blob) == b"tensors"
        for directory in (None, tmp_path):
            with pytest.raises(UsageError, match="to the server alone"):
                opening.open_log(place, directory)
