"""Logs and blobs of whole deployments that earlier code wrote: they replay to the same states and the same bytes, for ever."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from devices import CONFIG, OPEN_CONFIG, PLAN, World
from fedloop_events import envelope, types
from fedloop_events.blobs import tensors
from fedloop_events.logs.port import read_all
from fedloop_events.types import DEFAULT_RUN
from fedloop_server.aggregation.merging import merge
from fedloop_server.flower.grid import LogGrid
from fedloop_server.flower.instructing import instructions
from fedloop_server.flower.journal import start_epoch
from fedloop_server.rounds.rebuild import rebuild
from histories import DEPLOYMENTS, Document, Folds, counts, flower_run, open_world, read_document
from msgspec.structs import replace

EXPECTED: Final[Document] = json.loads((DEPLOYMENTS / "expected.json").read_text())
CONFIGS: Final = {"private": replace(CONFIG, plan=replace(PLAN, planned_rounds=4)), "open": OPEN_CONFIG}
"""With one more private round than were recorded."""
LATER: Final = {
    "io.fedloop.cohort.listed.v1",
    "io.fedloop.drift.detected.v1",
    "io.fedloop.event.quarantined.v2",
    "io.fedloop.example.curated.v1",
    "io.fedloop.example.withdrawn.v1",
    "io.fedloop.feedback.score.withdrawn.v1",
    "io.fedloop.feedback.scored.v1",
    "io.fedloop.feedback.retracted.v1",
    "io.fedloop.labels.listed.v1",
    "io.fedloop.metric.forecast.v1",
    "io.fedloop.metrics.windowed.v1",
    "io.fedloop.quarantine.decided.v1",
    "io.fedloop.replies.listed.v1",
    "io.fedloop.round.abort.requested.v1",
    "io.fedloop.round.closed.v2",
    "io.fedloop.round.request.withdrawn.v1",
    "io.fedloop.trigger.fired.v1",
    "io.fedloop.trigger.muted.v1",
    "io.fedloop.usage.counted.v1",
    "io.fedloop.usage.summarised.v1",
}
"""Types that there were not yet when these logs were written."""


@pytest.fixture(params=["private", "open"])
def world(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[World]:
    """A copy of the recorded deployment, opened with its server's key."""
    folder = tmp_path / request.param
    shutil.copytree(DEPLOYMENTS / request.param, folder)
    world = open_world(folder, CONFIGS[request.param])
    yield world
    world.log.close()


@pytest.fixture
def expected(world: World) -> Document:
    found: Document = EXPECTED[world.folder.name]
    return found


def plain(document: Document) -> Document:
    found: Document = json.loads(json.dumps(document))
    return found


def within(part: Document, whole: Document) -> Document:
    """What `whole` says under the keys of `part`."""
    return {key: whole[key] for key in part if key in whole}


def numbers_as_floats(data: bytes) -> str:
    """JSON in the same order; a float that its author had as an integer was written as one."""
    return json.dumps(json.loads(data, parse_int=float))


def size(world: World) -> int:
    return len(list(read_all(world.log)))


# --- states ----------------------------------------------------------------------------------------------------------


def test_every_type_that_anything_writes_is_recorded() -> None:
    recorded = {types.newest(name) for each in EXPECTED.values() for name in each["events"]}
    assert {each.type_name for each in types.CURRENT.values() if each not in recorded} == LATER


def test_recorded_events_decode_and_encode_to_the_same_json(world: World, expected: Document) -> None:
    assert counts(world.log) == expected["events"]
    for record in read_all(world.log):
        payload = envelope.decode(record)
        assert payload is not None
        if record.type == payload.type_name:
            assert numbers_as_floats(envelope.encode(payload, id=record.id, time_s=0).data) == numbers_as_floats(record.data)


def test_folds_say_of_a_recorded_log_what_they_said_when_it_was_written(world: World, expected: Document) -> None:
    said = {key: value for key, value in expected.items() if key not in ("events", "flower_result")}
    assert plain(Folds(world.log).document()) == said


def test_readers_refuse_nothing_in_a_recorded_log_and_say_the_same(world: World, expected: Document) -> None:
    document = plain(read_document(world.log))
    assert document == within(document, expected)


def test_folds_restored_from_their_states_after_every_event_say_the_same(world: World, expected: Document) -> None:
    document = plain(Folds(world.log, restore_each=True).document())
    assert document == within(document, expected)


# --- bytes -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("deep", [False, True], ids=["shallow", "deep"])
def test_every_recorded_release_is_rebuilt_byte_for_byte(world: World, expected: Document, deep: bool) -> None:
    made = {name: each for name, each in expected["releases"].items() if each["round"]}
    assert len(made) == 3
    for name, release in made.items():
        rebuilt = rebuild(world.log, world.blobs, name, deep=deep)
        assert rebuilt.identical
        assert rebuilt.rebuilt_sha256 == release["sha256"]
        assert [step.release for step in rebuilt.steps][-1] == name
        clients = expected["runs"][DEFAULT_RUN]["rounds"][release["round"]]["participants"]
        assert rebuilt.steps[-1].clients == clients


def test_recorded_rounds_replay_to_the_same_release_and_send_nothing_twice(world: World, expected: Document) -> None:
    epoch = start_epoch(world.log, world.writer, run_id=DEFAULT_RUN, server_id="replaying")
    before = size(world)
    for round_id, recorded in expected["runs"][DEFAULT_RUN]["rounds"].items():
        opened = world.rounds.rounds[round_id].opened
        if opened is None:
            continue
        grid = LogGrid(world.log, world.blobs, world.writer, run_id=DEFAULT_RUN, epoch=epoch, round=opened)
        replies = grid.close_round(instructions(grid, opened, world.blobs), timeout=0.0)
        answered = [each for each in replies if each.has_content()]
        assert len(replies) == len(recorded["terms"]["cohort"])
        assert len(answered) == len(recorded["accepted"])
        assert grid.collected is not None
        if len(grid.collected.accepted) < opened.quorum:
            assert recorded["aborted"]
            continue
        release = expected["releases"][expected["release_of_round"][round_id]]
        base = tensors.decode(world.blobs.get(opened.base))
        merged = b"".join(tensors.encode(merge(world.blobs, opened, base, grid.collected.accepted)))
        assert hashlib.sha256(merged).hexdigest() == release["sha256"]
    assert size(world) == before


@pytest.mark.parametrize("world", ["open"], indirect=True)
def test_a_recorded_run_of_flowers_own_replays_to_the_same_arrays(world: World, expected: Document) -> None:
    before = size(world)
    assert flower_run(world.log, world.blobs, world.writer) == expected["flower_result"]
    assert size(world) == before + 1, "a replay appends nothing but its epoch"


# --- going on --------------------------------------------------------------------------------------------------------


def test_a_server_goes_on_after_a_recorded_past_and_decides_nothing_of_it_again(world: World, expected: Document) -> None:
    # By the log's clock, which this machine's may be behind: so that nobody counts as away, and nobody recorded is asked.
    config = replace(world.config, availability_s=1e12)
    origin, before = world.payloads(types.DeploymentCreated)[0].origin, size(world)
    server = world.server(config=config)
    assert server.run(until_idle=True) == 0
    [started] = list(read_all(world.log))[before:]
    assert started.type == types.EpochStarted.type_name
    assert server.epoch == expected["runs"][DEFAULT_RUN]["epoch"][0] + 1
    assert server.refused == 0

    kept = [name for name, each in expected["clients"].items() if not each["revoked_at"]]
    world.writer.append(*(types.ClientRevoked(origin, name, "its key is lost") for name in kept))
    for name in ("new-1", "new-2"):
        world.device(name, epsilon=20.0 if world.folder.name == "private" else None)
    world.request(1, "next")
    with world.serving():
        assert server.run(rounds=1) == 1
    document = plain(read_document(world.log))
    recorded, rounds = expected["runs"][DEFAULT_RUN]["rounds"], document["runs"][DEFAULT_RUN]["rounds"]
    [added] = [each for name, each in rounds.items() if name not in recorded]
    assert (added["number"], added["terms"]["base"][0]) == (len(recorded) + 1, expected["in_force"])
    assert added["participants"] == ["new-1", "new-2"]
    assert within(recorded, rounds) == recorded
    assert rebuild(world.log, world.blobs, deep=True).identical
