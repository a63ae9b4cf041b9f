"""A model of ten thousand labels: registered in several events, read whole by everybody, made again from the log."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import pytest
from devices import CONFIG, SPEC, World, initial_arrays
from fedloop_clients.device_view import DeviceView
from fedloop_events import types
from fedloop_events.envelope import MAX_EVENT_BYTES, Event
from fedloop_events.locations import locate
from fedloop_events.logs.port import read_all
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_events.verify.log import verify
from fedloop_server.deployment import create_deployment
from fedloop_server.operations.followed import Followed
from fedloop_server.rounds.rebuild import rebuild
from msgspec.structs import replace
from server.test_server import Killed

LABELS: Final = [f"label {number:05d} of many, ünïcode" for number in range(10_000)]
MANY: Final = replace(SPEC, labels=LABELS)


def labels_of(view: DeviceView) -> list[str]:
    spec = view.releases.models["default"]
    assert isinstance(spec, types.ClassificationSpec)
    return spec.labels


def test_ten_thousand_labels_are_registered_read_by_devices_and_rebuilt(tmp_path: Path) -> None:
    world = World(tmp_path, CONFIG, MANY)
    assert len(world.payloads(types.LabelsListed)) > 5
    assert all(len(record.data) <= MAX_EVENT_BYTES for record in read_all(world.log))
    view = DeviceView("ann", world.writer.key.public_key)
    view.catch_up(world.log)
    assert labels_of(view) == LABELS
    again = DeviceView("ann", world.writer.key.public_key, view.to_state())
    assert labels_of(again) == LABELS

    for name in ("ann", "bob"):
        world.device(name)
    world.request(1)
    with world.serving():
        world.server().run(rounds=1)
    followed = Followed(world.log)
    assert followed.releases.models["default"] == MANY
    current = followed.releases.current("default")
    assert current is not None
    assert current.number == 1
    assert rebuild(world.log, world.blobs).identical
    assert verify(locate(tmp_path), lambda: world.log, lambda: world.blobs).verified


@pytest.mark.parametrize("events", [1, 2, 5])
def test_killed_between_the_lists_it_is_made_whole_the_second_time(
    tmp_path: Path, events: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    append, left = SqliteLog.append, events

    def dying(log: SqliteLog, given: Sequence[Event]) -> None:
        nonlocal left
        append(log, given)
        left -= 1
        if left == 0:
            raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(SqliteLog, "append", dying)
        with pytest.raises(Killed):
            create_deployment(tmp_path, MANY, initial_arrays(len(LABELS)), CONFIG)
    world = World(tmp_path, CONFIG, MANY)
    assert world.releases.models["default"] == MANY
    assert [label for each in world.payloads(types.LabelsListed) for label in each.labels] == LABELS


def test_a_model_whose_labels_were_not_all_read_is_no_model(tmp_path: Path) -> None:
    world = World(tmp_path, CONFIG, MANY)
    view = DeviceView("ann", world.writer.key.public_key)
    records = list(read_all(world.log))
    lost = next(record for record in records if record.type == types.LabelsListed.type_name)
    for record in records:
        if record is not lost:
            view.apply(record)
    assert not view.releases.models
