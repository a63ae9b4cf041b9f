"""`fedloop log`: what a check finds in a log that somebody has changed, and what it lets pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import apsw
import pytest
from fedloop_cli import requests, verification
from fedloop_cli.options import Where
from fedloop_events import locations, types
from fedloop_events.author import Author
from fedloop_events.identities import Identities
from fedloop_events.projections import Reader, Snapshots
from fedloop_events.signatures import SigningKey
from fedloop_events.views import RoundsView
from fedloop_server.setup import open_deployment

from .conftest import Fedloop


def enrol(directory: Path, client_id: str) -> tuple[Author, str]:
    log = locations.open_log(directory)
    identities = Identities()
    Reader(log, identities).catch_up()
    author = Author(log, SigningKey.generate())
    node_id = str(1000 + len(identities.clients))
    author.say(
        types.ClientEnrolled(
            origin=identities.origin,
            client_id=client_id,
            seq=0,
            public_key=author.key.public_key,
            node_id=node_id,
            epsilon=8.0,
            delta=1e-5,
        )
    )
    return author, identities.origin


@pytest.fixture
def busy(deployment: Path) -> Path:
    """Two clients that were seen twice, and a request for rounds."""
    for name in ("one", "two"):
        author, origin = enrol(deployment, name)
        for seq in (1, 2):
            author.say(types.ClientSeen(origin=origin, client_id=name, seq=seq, examples_at_least=4))
    opened = open_deployment(deployment)
    requests.request_rounds(opened.author, 2, "test")
    opened.log.close()
    return deployment


def verify(directory: Path) -> verification.Report:
    return verification.verify(Where(directory, locations.locate(directory)))


def change(directory: Path, *statements: str) -> None:
    """What somebody with the file and a SQLite of his own can do."""
    connection = apsw.Connection(str(directory / locations.LOG_FILE))
    connection.execute("DROP TRIGGER IF EXISTS events_no_update; DROP TRIGGER IF EXISTS events_no_delete")
    for statement in statements:
        connection.execute(statement)
    for verb in ("update", "delete"):
        body = "BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END"
        connection.execute(f"CREATE TRIGGER events_no_{verb} BEFORE {verb.upper()} ON events {body}")
    connection.close()


def test_a_sound_log_is_verified_and_says_what_was_not_seen(fedloop: Fedloop, busy: Path) -> None:
    ended = fedloop("log", "verify", busy, "--json")
    assert ended.status == 0
    found = ended.document
    assert (found["verified"], found["events"], found["clients"], found["wrong"], found["blobs"]) == (True, 11, 2, 0, 1)
    assert "cut off at the end" in found["not_seen"]


@pytest.mark.parametrize(
    ("statements", "offset", "said"),
    [
        (
            ["UPDATE events SET data = CAST(replace(CAST(data AS TEXT), 'least\":4', 'least\":8') AS BLOB) WHERE position = 6"],
            6,
            "changed",
        ),
        (["UPDATE events SET key = 'two' WHERE position = 6"], 6, "another topic, key or source"),
        (["UPDATE events SET signature = '' WHERE position = 6"], 6, "not signed"),
        (["DELETE FROM events WHERE position = 6"], 6, "missing"),
        (
            ["DELETE FROM events WHERE position = 6", "UPDATE events SET position = position - 1 WHERE position > 6"],
            6,
            "before this one",
        ),
        (
            ["UPDATE events SET position = 99 WHERE position = 6", "UPDATE events SET position = 6 WHERE position = 7"],
            99,
            "changed places",
        ),
        (["UPDATE events SET data = x'7b' WHERE position = 11"], 11, "not a valid"),
        (["UPDATE events SET type = 'io.fedloop.client.seen.v1' WHERE position = 11"], 11, "not a valid"),
        (["CREATE TABLE mine (x)"], None, "foreign table 'mine'"),
        (["CREATE VIEW mine AS SELECT 1"], None, "foreign view 'mine'"),
    ],
)
def test_what_was_changed_by_hand_is_found_at_its_offset(
    busy: Path, statements: list[str], offset: int | None, said: str
) -> None:
    change(busy, *statements)
    report = verify(busy)
    assert not report.verified
    assert offset in {finding.offset for finding in report.findings}
    assert any(said in finding.what for finding in report.findings), report.findings


def test_a_check_that_fails_ends_with_1_and_names_the_offset(fedloop: Fedloop, busy: Path) -> None:
    change(busy, "DELETE FROM events WHERE position = 6")
    ended = fedloop("log", "verify", busy)
    assert ended.status == 1
    assert "offset 6" in ended.out
    assert fedloop("log", "verify", busy, "--json").status == 1


def test_an_event_by_a_key_that_is_not_its_authors_is_found(busy: Path) -> None:
    log = locations.open_log(busy)
    identities = Identities()
    Reader(log, identities).catch_up()
    stranger = Author(log, SigningKey.generate())
    stranger.say(types.ClientSeen(origin=identities.origin, client_id="one", seq=3, examples_at_least=1024))
    report = verify(busy)
    assert [finding.offset for finding in report.findings] == [12]


def test_a_sequence_number_that_is_used_again_is_found(busy: Path) -> None:
    author, origin = enrol(busy, "three")
    for seq in (1, 1):
        author.say(types.ClientSeen(origin=origin, client_id="three", seq=seq, examples_at_least=4))
    assert [finding.what for finding in verify(busy).findings] == [
        "three used its sequence number 1 again, or events changed places"
    ]


def damage(path: Path) -> None:
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


@pytest.mark.parametrize("harm", [Path.unlink, damage])
def test_a_blob_that_is_gone_or_damaged_is_found(busy: Path, harm: Callable[[Path], None]) -> None:
    (blob,) = [path for path in (busy / locations.BLOB_FOLDER).rglob("*") if path.is_file()]
    harm(blob)
    report = verify(busy)
    assert report.wrong == 1
    assert report.findings[0].offset == 3


def test_a_file_that_is_no_log_is_refused(fedloop: Fedloop, tmp_path: Path) -> None:
    (tmp_path / locations.LOG_FILE).write_bytes(b"x" * 5000)
    ended = fedloop("log", "verify", tmp_path)
    assert ended.status == 1
    assert "Traceback" not in ended.err
    connection = apsw.Connection(str(tmp_path / "other.sqlite"))
    connection.execute("CREATE TABLE events (x)")
    connection.close()
    (tmp_path / "other.sqlite").replace(tmp_path / locations.LOG_FILE)
    assert fedloop("log", "verify", tmp_path).status == 1


def test_a_damaged_database_is_found_and_not_believed(busy: Path) -> None:
    path = busy / locations.LOG_FILE
    connection = apsw.Connection(str(path))
    connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    connection.close()
    data = bytearray(path.read_bytes())
    middle = len(data) // 2
    data[middle : middle + 2000] = bytes(2000)
    path.write_bytes(data)
    report = verify(busy)
    assert not report.verified


def test_replay_counts_and_compares_with_snapshots(fedloop: Fedloop, busy: Path) -> None:
    log = locations.open_log(busy)
    reader = Reader(log, RoundsView(), identities=Identities(), snapshots=Snapshots(busy / "rounds.snapshot"))
    reader.catch_up()
    reader.save()
    ended = fedloop("log", "replay", busy, "--json")
    assert ended.status == 0
    found = ended.document
    assert (found["events"], found["clients"], found["refused"]) == (11, 2, 0)
    assert (found["matching"], found["differing"]) == (["rounds.snapshot"], [])
    Snapshots(busy / "rounds.snapshot").save(RoundsView.version, reader.position, RoundsView("other").to_state())
    ended = fedloop("log", "replay", busy)
    assert ended.status == 1
    assert "DIFFERS  rounds.snapshot" in ended.out


def test_tail_shows_the_last_events_of_the_topics_that_are_asked_for(fedloop: Fedloop, busy: Path) -> None:
    found = fedloop("log", "tail", busy, "-n", "2", "--topic", "clients", "--json").document["events"]
    assert [(event["offset"], event["data"]["client_id"]) for event in found] == [(9, "two"), (10, "two")]
    ended = fedloop("log", "tail", busy, "--topic", "nonsense")
    assert ended.status == 2
    assert "the topics are clients" in ended.err
