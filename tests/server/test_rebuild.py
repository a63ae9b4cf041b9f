"""A release can be made again from the log by anyone, and what does not add up is found."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from devices import World
from fedloop_events import locations, types
from fedloop_events.envelope import Record, decode
from fedloop_events.errors import BlobError, UsageError
from fedloop_events.logs.port import read_all
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_events.signatures import SigningKey
from fedloop_events.types import BlobRef
from fedloop_events.writer import EventWriter
from fedloop_server.operations import registry
from fedloop_server.rounds.rebuild import RebuildError, rebuild
from msgspec.structs import replace


@pytest.fixture
def world(tmp_path: Path) -> World:
    """Two published releases of three clients."""
    world = World(tmp_path / "deployment")
    for name in ("ann", "bob", "cem"):
        world.device(name)
    world.request(2)
    with world.serving():
        world.server().run(rounds=2)
    return world


def test_from_a_read_only_copy_without_the_servers_folder_the_bytes_are_the_same(world: World, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    copy.mkdir()
    shutil.copytree(world.folder / "blobs", copy / "blobs")
    for path in world.folder.glob("log.sqlite*"):
        shutil.copy(path, copy)
    log, blobs = locations.open_log(copy), locations.open_blobs(copy / locations.BLOB_FOLDER)
    shallow, deep = rebuild(log, blobs), rebuild(log, blobs, deep=True)
    assert shallow.identical
    assert deep.identical
    names = list(world.releases.releases)
    assert ([each.release for each in shallow.steps], [each.release for each in deep.steps]) == (names[2:], names[1:])
    assert deep.rebuilt_sha256 == world.releases.releases[names[2]].blob.sha256
    assert deep.steps[0].clients == ["ann", "bob", "cem"]


def test_deep_needs_only_the_first_release_and_the_updates(world: World) -> None:
    _, first, _ = world.releases.releases.values()
    remove(world, first.blob)
    assert rebuild(world.log, world.blobs, deep=True).identical
    with pytest.raises(BlobError):
        rebuild(world.log, world.blobs)


def remove(world: World, blob: BlobRef) -> None:
    for path in world.folder.rglob(f"*{blob.sha256[2:]}"):
        path.unlink()


def rewritten(world: World, folder: Path, change: Callable[[Record], Record | None]) -> SqliteLog:
    """A copy of the log in which events are changed, or left out."""
    copy = SqliteLog(folder / "log.sqlite")
    copy.append([changed for record in read_all(world.log) if (changed := change(record)) is not None])
    return copy


@pytest.mark.parametrize(
    ("kind", "damage"),
    [
        (types.ReleaseProposed, "signature"),
        (types.ReleaseProposed, "data"),
        (types.ReleaseProposed, "absent"),
        (types.ReleasePublished, "signature"),
        (types.ReleasePublished, "data"),
    ],
)
def test_a_later_release_that_is_broken_in_the_log_is_not_passed_over_in_silence(
    world: World, tmp_path: Path, kind: type[types.ReleaseDecision], damage: str
) -> None:
    *_, first, last = world.releases.releases

    def change(record: Record) -> Record | None:
        payload = decode(record)
        if not isinstance(payload, kind) or getattr(payload, "release", "") != last:
            return record
        if damage == "absent":
            return None
        return replace(record, data=record.data[:-1]) if damage == "data" else replace(record, signature=record.signature[::-1])

    log = rewritten(world, tmp_path, change)
    with pytest.raises(RebuildError, match=f"release {last} is broken in the log"):
        rebuild(log, world.blobs)
    assert rebuild(log, world.blobs, first, deep=True).identical
    log.close()


def test_a_round_that_is_broken_in_the_log_is_named(world: World, tmp_path: Path) -> None:
    def change(record: Record) -> Record:
        payload = decode(record)
        closed = isinstance(payload, types.RoundClosed) and payload.round_id == "r0002"
        return replace(record, signature=record.signature[::-1]) if closed else record

    log = rewritten(world, tmp_path, change)
    with pytest.raises(RebuildError, match=f"release {list(world.releases.releases)[-1]} names a round that is not in the log"):
        rebuild(log, world.blobs)
    log.close()


def test_what_is_broken_and_older_than_the_release_in_force_changes_nothing(world: World, tmp_path: Path) -> None:
    zero, *_ = world.releases.releases

    def change(record: Record) -> Record:
        evaluated = isinstance(payload := decode(record), types.ReleaseEvaluated) and payload.release == zero
        return replace(record, data=b"{}") if evaluated else record

    log = rewritten(world, tmp_path, change)
    assert rebuild(log, world.blobs, deep=True).identical
    log.close()


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_a_stored_file_that_is_not_what_was_published_is_named(world: World, damage: str) -> None:
    last = list(world.releases.releases.values())[-1]
    if damage == "gone":
        remove(world, last.blob)
    for path in world.folder.rglob(f"*{last.blob.sha256[2:]}"):
        path.chmod(0o600)
        path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    for deep in (True, False):
        with pytest.raises(RebuildError, match=f"stored file of release {last.release} is damaged or gone"):
            rebuild(world.log, world.blobs, deep=deep)


def test_an_older_release_can_be_named_and_others_are_refused(world: World) -> None:
    zero, first, _ = world.releases.releases
    assert rebuild(world.log, world.blobs, first).release == first
    with pytest.raises(UsageError, match="made by no round"):
        rebuild(world.log, world.blobs, zero)
    with pytest.raises(UsageError, match="no release"):
        rebuild(world.log, world.blobs, "0009-abcdef")


def test_a_changed_update_is_found(world: World) -> None:
    accepted = world.rounds.rounds["r0002"].closed
    assert accepted is not None
    blob = accepted.accepted[0].blob
    assert blob is not None
    for path in world.folder.rglob(f"*{blob.sha256[2:]}"):
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.chmod(0o600)
        path.write_bytes(data)
    with pytest.raises(BlobError):
        rebuild(world.log, world.blobs)


def made_up(world: World, change: Callable[[types.RoundClosed], types.RoundClosed]) -> World:
    """A third round in which the server says that something else was accepted than what clients signed, and merges that."""
    world.request(1, "q2")
    server = world.server()
    with world.serving():
        while world.rounds.open_round is None:
            server.step()
        origin, opened = world.devices["ann"].origin, world.rounds.open_round.opened
        assert opened is not None
        accepted = world.rounds.rounds["r0002"].closed
        assert accepted is not None
        closed = change(replace(accepted, round_id="r0003", step=99, epoch=server.epoch))
    world.writer.append(closed)
    blob = accepted.accepted[0].blob
    assert blob is not None
    proposed = types.ReleaseProposed(
        origin, "default", server.epoch, "0003-made-up", 3, blob, "r0003", opened.base_release, "ffa",
        [each.update_id for each in closed.accepted],
    )  # fmt: skip
    world.writer.append(proposed, types.ReleasePublished(origin, "default", server.epoch, "0003-made-up", 3, blob))
    assert registry.current(world.releases, "default").release == "0003-made-up"
    return world


def test_updates_of_another_round_are_no_proof(world: World) -> None:
    with pytest.raises(RebuildError, match="not what ann signed for round r0003"):
        rebuild(world.log, world.blobs, made_up(world, lambda closed: closed).releases.current("default").release)  # type: ignore[union-attr]


def test_an_update_that_no_client_signed_is_no_proof(world: World) -> None:
    stranger = EventWriter(world.log, SigningKey.generate())
    forged = replace(world.payloads(types.UpdateSubmitted)[0], round_id="r0003", seq=77)
    update_id = stranger.append(forged)[0].id
    changed = made_up(
        world, lambda closed: replace(closed, accepted=[replace(closed.accepted[0], update_id=update_id), *closed.accepted[1:]])
    )
    with pytest.raises(RebuildError, match="not in the log as ann signed it"):
        rebuild(changed.log, changed.blobs)


def test_other_bytes_than_the_merge_gives_are_not_identical(world: World) -> None:
    """The server signed a release that is not what its round makes."""
    world.request(1, "q2")
    server = world.server()
    with world.serving():
        while (last := world.rounds.last) is None or last.number != 3 or last.closed is None:
            server.step()
    opened, closed = last.opened, last.closed
    assert opened is not None
    other = opened.base
    origin = world.devices["ann"].origin
    world.writer.append(
        types.ReleaseProposed(
            origin, "default", server.epoch, "0003-swapped", 3, other, "r0003", opened.base_release, "ffa",
            [each.update_id for each in closed.accepted],
        ),
        types.ReleasePublished(origin, "default", server.epoch, "0003-swapped", 3, other),
    )  # fmt: skip
    rebuilt = rebuild(world.log, world.blobs, deep=True)
    assert [each.identical for each in rebuilt.steps] == [True, True, False]
    assert not rebuilt.identical
    assert rebuilt.published_sha256 == other.sha256
