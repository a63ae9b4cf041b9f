"""The release registry: the gate, the lineage, and going back."""

from __future__ import annotations

from pathlib import Path

import pytest
from devices import World
from fedloop_events import types
from fedloop_events.errors import PolicyError, UsageError
from fedloop_events.folds.releases import ReleasesView
from fedloop_events.logs.port import EventLog
from fedloop_server.operations import registry


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path / "deployment")
    for name in ("ann", "bob"):
        world.device(name)
    world.request(2)
    with world.serving():
        world.server().run(rounds=2)
    return world


def test_lineage_leads_from_a_release_to_the_clients_whose_updates_made_it(world: World) -> None:
    zero, first, second = world.releases.releases
    steps = registry.lineage(world.rounds, world.releases, second)
    assert [(step.release, step.base_release, step.round_id) for step in steps] == [
        (second, first, "r0002"),
        (first, zero, "r0001"),
        (zero, None, None),
    ]
    submitted = {record.id: payload.client_id for record, payload in world.records(types.UpdateSubmitted)}
    for step in steps[:2]:
        assert {each.update_id: each.client_id for each in step.contributions}.items() <= submitted.items()
        assert [each.client_id for each in step.contributions] == ["ann", "bob"]
    with pytest.raises(UsageError):
        registry.lineage(world.rounds, world.releases, "0009-abc")


def test_a_rollback_is_signed_counts_once_and_can_be_taken_back(world: World) -> None:
    zero, first, second = world.releases.releases
    event = registry.roll_back(world.writer, release=zero, reason="worse in the field")
    assert (event.release, event.withdrawn) == (zero, second)
    releases = world.releases
    assert registry.current(releases, "default").release == zero
    assert (releases.releases[second].withdrawn, releases.releases[second].reason) == (True, "worse in the field")
    assert not releases.releases[first].withdrawn
    with pytest.raises(UsageError, match="in force already"):
        registry.roll_back(world.writer, release=zero, reason="again")
    registry.roll_back(world.writer, release=second, reason="it was the network")
    assert registry.current(world.releases, "default").release == second
    assert not world.releases.releases[second].withdrawn


def test_a_summary_shows_where_a_release_stands_and_what_made_it(world: World) -> None:
    zero, first, second = registry.summaries(world.releases)
    assert [(each.number, each.status, each.current) for each in (zero, first, second)] == [
        (0, "published", False),
        (1, "published", False),
        (2, "published", True),
    ]
    assert (zero.round_id, zero.base_release, zero.strategy, zero.updates) == (None, None, None, 0)
    assert (second.round_id, second.base_release, second.updates) == ("r0002", first.release, 2)
    assert second.evaluation is not None
    assert second.evaluation.score == 0.5
    blob = world.releases.releases[second.release].blob
    assert (second.sha256, second.size_bytes) == (blob.sha256, blob.size_bytes)
    proposed = {payload.release: record.appended_ms for record, payload in world.records(types.ReleaseProposed)}
    assert [each.proposed_ms for each in (zero, first, second)] == list(proposed.values())
    registry.roll_back(world.writer, release=first.release, reason="worse in the field")
    after = registry.summarise(world.releases, registry.find(world.releases, second.release))
    assert (after.status, after.current, after.reason) == ("withdrawn", False, "worse in the field")


def test_only_a_published_release_comes_back(world: World) -> None:
    origin = world.devices["ann"].origin
    blob = registry.current(world.releases, "default").blob
    epoch = world.rounds.epoch
    world.writer.append(
        types.ReleaseProposed(origin, "default", epoch, "0003-bad", 3, blob),
        types.ReleaseRejected(origin, "default", epoch, "0003-bad", "less-accurate"),
    )
    with pytest.raises(UsageError, match="never published"):
        registry.roll_back(world.writer, release="0003-bad", reason="why not")
    with pytest.raises(UsageError, match="no release"):
        registry.roll_back(world.writer, release="0007-nothing", reason="why not")


def test_a_rollback_that_crosses_a_new_release_changes_nothing(world: World) -> None:
    zero, _, second = world.releases.releases
    origin, epoch = world.devices["ann"].origin, world.rounds.epoch
    blob = registry.current(world.releases, "default").blob

    class Crossing:
        """After the operator has read the log, and before the rollback is appended, a release is published."""

        def __init__(self, log: EventLog) -> None:
            self.read, self.end, self.close = log.read, log.end, log.close

        def append(self, events: object) -> None:
            world.writer.append(
                types.ReleaseProposed(origin, "default", epoch, "0003-new", 3, blob),
                types.ReleasePublished(origin, "default", epoch, "0003-new", 3, blob),
            )
            world.log.append(events)  # type: ignore[arg-type]

    writer = type(world.writer)(Crossing(world.log), world.writer.key)
    with pytest.raises(PolicyError, match="nothing was rolled back"):
        registry.roll_back(writer, release=zero, reason="worse in the field")
    assert registry.current(world.releases, "default").release == "0003-new"
    assert not world.releases.releases[second].withdrawn


def test_a_model_without_releases_is_an_error_that_says_so() -> None:
    with pytest.raises(UsageError, match="no release"):
        registry.current(ReleasesView(), "default")
    with pytest.raises(UsageError, match="registers no such model"):
        registry.task_of_model(ReleasesView(), "default")
