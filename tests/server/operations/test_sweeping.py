"""Sweeping the blob store: what no event names goes once it is old, and nothing else, whatever goes on beside it."""

from __future__ import annotations

import hashlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import pytest
import samples
from fedloop_events import types
from fedloop_events.blobs.store import BlobStore
from fedloop_events.errors import LogChangedError, LogError, UsageError
from fedloop_events.locations import DeploymentLocation, locate, open_blobs, open_log
from fedloop_events.logs.port import START, Batch, EventLog, Position
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_events.types import BlobRef, Content
from fedloop_events.verify.log import verify
from fedloop_server.operations.sweeping import DAY_S, Swept, sweep
from fedloop_server.state import IDENTITIES_FILE
from s3_store import s3_store

DEPLOYMENTS = Path(__file__).parents[2] / "events" / "recorded" / "deployments"


class Place:
    """A log of the samples' deployment, and a blob store, whose blobs can be made old."""

    def __init__(self, folder: Path, url: str, log: str = "") -> None:
        self.folder, self.blobs = folder, BlobStore(url)
        self.at = DeploymentLocation(log or str(folder), url)
        self.log: EventLog = open_log(self.at.log, create=True)
        self.days = 0.0
        self.log.append([samples.signed(samples.created(), by="server"), samples.signed(samples.enrolled())])

    def sweep(self, days: float, **settings: Any) -> Swept:
        """After so many days."""
        now = time.time() + days * DAY_S
        return sweep(self.at, self.log, self.blobs, None, older_than_s=7 * DAY_S, now=lambda: now, **settings)

    def name(self, ref: BlobRef) -> None:
        content = Content(arrays={"arrays": ref})
        update = types.UpdateSubmitted(samples.ORIGIN, "device-1", 1, "main", "0" * 32, content)
        self.log.append([samples.signed(update)])


@pytest.fixture(scope="module")
def s3_server() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch, s3_store(patch, "sweeping"):
        yield


@pytest.fixture
def s3(s3_server: None, tmp_path: Path) -> str:
    return f"s3://sweeping/{tmp_path.name}"


@pytest.fixture(params=["folder", "s3"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    made = Place(tmp_path / "d", request.getfixturevalue("s3") if request.param == "s3" else str(tmp_path / "blobs"))
    yield made
    made.log.close()


def test_what_no_event_names_goes_once_it_is_old(place: Place) -> None:
    named, orphan = place.blobs.put([b"named"]), place.blobs.put([b"an orphan"])
    place.name(named)
    assert place.sweep(6.9) == Swept(blobs=2, named=1, young=1, removed=0, freed_bytes=0, dry_run=False)
    assert place.sweep(7.1, dry_run=True) == Swept(2, 1, 0, 1, 9, dry_run=True)
    assert place.blobs.exists(orphan)
    assert place.sweep(7.1) == Swept(2, 1, 0, 1, 9, dry_run=False)
    assert list(place.blobs.all()) == [named.sha256]
    assert place.sweep(7.1) == Swept(1, 1, 0, 0, 0, dry_run=False)


def test_what_an_evaluation_is_made_of_stays(place: Place) -> None:
    scores, orphan = place.blobs.put([b"scores"]), place.blobs.put([b"orphan"])
    metrics: dict[str, float | None] = {"accuracy": 0.5}
    named = types.ReleaseEvaluated(samples.ORIGIN, "default", 1, "0001-x", metrics, "accuracy", 2, "e" * 64, scores=scores)
    place.log.append([samples.signed(named)])
    assert place.sweep(100) == Swept(2, 1, 0, 1, 6, dry_run=False)
    assert (place.blobs.exists(scores), place.blobs.exists(orphan)) == (True, False)


@pytest.mark.kafka
def test_a_log_on_kafka_is_read_whole_from_every_partition(kafka_url: str, tmp_path: Path) -> None:
    place = Place(tmp_path / "d", str(tmp_path / "blobs"), kafka_url)
    place.blobs.put([b"orphan"])
    for number in range(3):
        place.name(place.blobs.put([b"named %d" % number]))
    assert place.sweep(100) == Swept(4, 3, 0, 1, 6, dry_run=False)
    place.log.close()


def test_a_blob_that_is_put_again_is_young_again(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    """The writer comes after the sweep has read the log, and before it removes anything."""
    from fedloop_events.blobs import filesystem

    monkeypatch.setattr(filesystem, "REFRESH_AFTER_S", 0.0)  # moto keeps the true time of a write
    again, refreshed, orphan = (place.blobs.put([each]) for each in (b"again", b"refreshed", b"orphan"))
    before = max(each.written_s for each in place.blobs.stored())
    while time.time() < before + 1.1:  # S3 keeps whole seconds
        threading.Event().wait(0.05)
    assert place.blobs.put([b"again"]) == again
    assert place.blobs.refresh(refreshed)
    assert not place.blobs.refresh(BlobRef(orphan.sha256, 7))
    assert not place.blobs.refresh(BlobRef("0" * 64, 7))
    freed = [place.blobs.remove(each.sha256, before + 0.5) for each in (again, refreshed, orphan, BlobRef("0" * 64, 1))]
    assert freed == [0, 0, 6, 0]
    assert place.blobs.get(again) == b"again"


def test_every_event_type_and_version_keeps_what_it_names(tmp_path: Path) -> None:
    """Also those that this program does not know, or cannot verify."""
    place = Place(tmp_path / "d", str(tmp_path / "blobs"))
    refs = [place.blobs.put([f"blob {number}".encode()]) for number in range(3)]
    newer = samples.signed(samples.feedback(1))
    document = msgspec.json.encode({"of": {"a newer": ["kind", refs[0].sha256]}})
    escaped = msgspec.json.encode({"x": refs[1].sha256}).replace(
        refs[1].sha256[0].encode(), b"\\u00%02x" % ord(refs[1].sha256[0])
    )
    place.log.append(
        [
            msgspec.structs.replace(newer, type="io.fedloop.something.newer.v9", data=document),
            msgspec.structs.replace(newer, id="0" * 32, data=escaped),
            msgspec.structs.replace(newer, id="1" * 32, data=b"\xff\x00 " + refs[2].sha256.encode()),
        ]
    )
    assert place.sweep(100).named == 3


@pytest.mark.parametrize("recorded", sorted(path.name for path in DEPLOYMENTS.iterdir() if path.is_dir()))
def test_a_recorded_deployment_stays_whole(recorded: str, tmp_path: Path) -> None:
    shutil.copytree(DEPLOYMENTS / recorded, tmp_path / "d")
    at = locate(tmp_path / "d")
    with closing(open_log(at.log)) as log:
        blobs = open_blobs(at.blobs)
        before, orphan = verify(at, lambda: log, lambda: blobs), blobs.put([b"orphan"])
        assert before.blobs > 3
        swept = sweep(at, log, blobs, tmp_path / "d", older_than_s=0, now=lambda: time.time() + DAY_S)
        assert swept.named >= before.blobs
        assert not blobs.exists(orphan)
        assert verify(at, lambda: log, lambda: blobs) == before


class Short(SqliteLog):
    """A log that cannot be read to its end, or not from its beginning."""

    most, first = 10**9, 0

    def read(self, topics: Collection[str] = (), after: Position = START, *, limit: int = 1000, wait_s: float = 0.0) -> Batch:
        batch = super().read(topics, after, limit=limit, wait_s=wait_s)
        records = [each for each in batch.records if self.first <= each.offset <= self.most]
        return Batch(records, Position({"log": records[-1].offset}) if records else after)


def test_a_log_that_cannot_be_read_whole_removes_nothing(tmp_path: Path) -> None:
    place = Place(tmp_path / "d", str(tmp_path / "blobs"))
    place.blobs.put([b"orphan"])
    place.name(place.blobs.put([b"named"]))
    whole = place.log
    short = Short(tmp_path / "d" / "log.sqlite")
    place.log = short
    short.most = 2
    with pytest.raises(LogError, match="to its end"):
        place.sweep(100)
    short.most, short.first = 10**9, 2
    with pytest.raises(UsageError, match="does not begin with its first event"):
        place.sweep(100)
    place.log = SqliteLog(tmp_path / "empty.sqlite")
    with pytest.raises(UsageError, match="belongs to no deployment"):
        place.sweep(100)
    place.at, place.log = DeploymentLocation("https://gateway.example", "/blobs"), whole
    with pytest.raises(UsageError, match="a gateway may hold back"):
        place.sweep(100)
    assert len(list(place.blobs.all())) == 2


def test_a_log_from_an_old_backup_removes_nothing(tmp_path: Path) -> None:
    from fedloop_events.folds.identities import Identities
    from fedloop_events.folds.reader import Reader
    from fedloop_events.folds.snapshots import Snapshots

    place = Place(tmp_path / "d", str(tmp_path / "blobs"))
    place.log.append([samples.signed(samples.enrolled("device-2", "12"))])
    server = tmp_path / "d" / "server"
    server.mkdir()
    people = Reader(place.log, Identities(), snapshots=Snapshots(server / IDENTITIES_FILE))
    people.catch_up()
    people.save()
    older = Place(tmp_path / "older", str(tmp_path / "blobs"))
    older.blobs.put([b"named by what was lost"])
    with pytest.raises(LogChangedError):
        sweep(older.at, older.log, older.blobs, tmp_path / "d", older_than_s=0, now=lambda: time.time() + 100)
    assert len(list(older.blobs.all())) == 1


def test_a_writer_that_finds_the_blob_while_it_is_being_removed_has_it_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = BlobStore(tmp_path)
    ref = store.put([b"old"])
    os.utime(tmp_path / ref.sha256[:2] / ref.sha256[2:], (1, 1))
    writer, look = threading.Thread(target=lambda: store.put([b"old"])), Path.lstat

    def look_and_let_the_writer_in(path: Path) -> os.stat_result:
        found = look(path)
        if path.name == ref.sha256[2:] and writer.ident is None:
            writer.start()
            writer.join(0.5)  # which it needs if nothing holds it up
        return found

    monkeypatch.setattr(Path, "lstat", look_and_let_the_writer_in)
    assert store.remove(ref.sha256, 2) == 3
    writer.join(20)
    assert store.get(ref) == b"old"


_WRITER = """
import os
import sys
from fedloop_events.blobs.store import BlobStore
store = BlobStore(sys.argv[1])
print("begun", flush=True)
while True:
    for number in range(3):
        ref = store.put([b"%d" % number])
        assert store.get(ref) == b"%d" % number
        os.utime(os.path.join(sys.argv[1], ref.sha256[:2], ref.sha256[2:]), (1, 1))  # days pass
"""
_SWEEPER = """
import sys
from fedloop_events.blobs.store import BlobStore
store = BlobStore(sys.argv[1])
print("begun", flush=True)
while True:
    for each in store.stored():
        store.remove(each.sha256, 4e9 if each.size_bytes > 2 else 2)
"""


def test_writers_beside_a_sweep_never_miss_what_they_have_put_and_kills_harm_nothing(tmp_path: Path) -> None:
    """Sweepers are killed at any moment; what is old goes, what is young stays whole."""
    folder = tmp_path / "blobs"
    store = BlobStore(folder)
    with subprocess.Popen([sys.executable, "-c", _WRITER, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        assert writer.stdout.readline()
        for number in range(4):
            old = [store.put([b"old %d %d" % (number, each)]) for each in range(50)]
            with subprocess.Popen([sys.executable, "-c", _SWEEPER, str(folder)], stdout=subprocess.PIPE) as sweeper:
                assert sweeper.stdout is not None
                assert sweeper.stdout.readline()
                _until(lambda: not store.exists(old[-1]) or not store.exists(old[0]))  # noqa: B023
                sweeper.send_signal(signal.SIGKILL)
        assert writer.poll() is None, writer.stderr and writer.stderr.read()
        writer.kill()
    for each in store.stored():
        assert hashlib.sha256(store.get(BlobRef(each.sha256, each.size_bytes))).hexdigest() == each.sha256


def test_a_blob_of_another_user_can_be_made_young(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store = BlobStore(tmp_path)
    ref = store.put([b"theirs"])
    path = tmp_path / ref.sha256[:2] / ref.sha256[2:]
    os.utime(path, (1, 1))

    def refused(*given: object, **named: object) -> None:
        raise PermissionError(1, "not the owner")

    monkeypatch.setattr(os, "utime", refused)
    assert store.refresh(ref)
    assert path.stat().st_mtime > 1
    assert store.get(ref) == b"theirs"


def _until(condition: Callable[[], object], deadline_s: float = 20) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.002)
