"""`fedloop log`: what a check finds in a log that somebody has changed, and what it lets pass."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import apsw
import pytest
from fedloop_events import ids, locations, topics, types
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.folds.rounds import RoundsView
from fedloop_events.folds.snapshots import Snapshots
from fedloop_events.logs.port import EventLog, read_all
from fedloop_events.signatures import SigningKey
from fedloop_events.verify.checks import VerifyReport
from fedloop_events.verify.log import verify as verify_log
from fedloop_events.writer import EventWriter
from fedloop_server.deployment import open_deployment
from fedloop_server.operations import clients, commands, rounds

from .conftest import Fedloop


def opened(directory: Path) -> EventLog:
    return locations.open_log(locations.locate(directory).log)


def enrol(log: EventLog, client_id: str) -> tuple[EventWriter, str]:
    identities = Identities()
    Reader(log, identities).catch_up()
    writer = EventWriter(log, SigningKey.generate())
    node_id = str(1000 + len(identities.clients))
    writer.append(
        types.ClientEnrolled(
            origin=identities.origin,
            client_id=client_id,
            seq=0,
            public_key=writer.key.public_key,
            node_id=node_id,
            epsilon=8.0,
            delta=1e-5,
        )
    )
    return writer, identities.origin


def fill(directory: Path) -> Path:
    """Two clients that were seen twice, and a request for rounds."""
    deployment = open_deployment(directory)
    for name in ("one", "two"):
        writer, origin = enrol(deployment.log, name)
        for seq in (1, 2):
            writer.append(types.ClientSeen(origin=origin, client_id=name, seq=seq, examples_at_least=4))
    rounds.request(deployment.writer, 2, "test")
    deployment.log.close()
    return directory


@pytest.fixture
def busy(deployment: Path) -> Path:
    return fill(deployment)


@pytest.fixture
def busy_anywhere(anywhere: Path) -> Path:
    return fill(anywhere)


def verify(directory: Path) -> VerifyReport:
    place = locations.locate(directory)
    return verify_log(place, lambda: locations.open_log(place.log), lambda: locations.open_blobs(place.blobs))


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


def test_a_sound_log_is_verified_and_says_what_was_not_seen(fedloop: Fedloop, busy_anywhere: Path) -> None:
    ended = fedloop("log", "verify", busy_anywhere, "--json")
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


def test_through_a_gateway_the_servers_key_sees_the_same(fedloop: Fedloop, busy_anywhere: Path) -> None:
    writer, origin = enrol(opened(busy_anywhere), "three")
    writer.append(types.TextMasked(origin=origin, client_id="three", seq=1, feedback_id="f", counts={"PERSON": 1}))
    writer.append(types.ClientSeen(origin=origin, client_id="three", seq=2, examples_at_least=4))
    command = [sys.executable, "-m", "fedloop_cli.main", "gateway", str(busy_anywhere), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as gateway:
        assert gateway.stdout is not None
        address = json.loads(gateway.stdout.readline())["address"]
        seen = fedloop("log", "verify", busy_anywhere, "--log", address, "--json").document
        replayed = fedloop("log", "replay", busy_anywhere, "--log", address, "--json").document
        stranger = fedloop("log", "verify", "--log", address)
        gateway.terminate()
    assert (seen["verified"], seen["events"], seen["clients"], seen["blobs"]) == (True, 14, 3, 1)
    assert (replayed["events"], replayed["clients"], replayed["refused"]) == (14, 3, 0)
    assert stranger.status == 2
    assert "the server's key" in stranger.err


def test_an_event_by_a_key_that_is_not_its_authors_is_found(busy_anywhere: Path) -> None:
    log = opened(busy_anywhere)
    identities = Identities()
    Reader(log, identities).catch_up()
    stranger = EventWriter(log, SigningKey.generate())
    stranger.append(types.ClientSeen(origin=identities.origin, client_id="one", seq=3, examples_at_least=1024))
    *_, said = read_all(log, (topics.CLIENTS,))
    report = verify(busy_anywhere)
    assert [(each.event_id, each.stream, each.offset) for each in report.findings] == [(said.id, said.stream, said.offset)]


def test_a_sequence_number_that_is_used_again_is_found(busy_anywhere: Path) -> None:
    writer, origin = enrol(opened(busy_anywhere), "three")
    for seq in (1, 1):
        writer.append(types.ClientSeen(origin=origin, client_id="three", seq=seq, examples_at_least=4))
    report = verify(busy_anywhere)
    assert (report.verified, report.findings) == (True, [])
    assert [finding.what for finding in report.misconduct] == ["three used its sequence number 1 for a second event"]


def test_what_an_enrolled_client_has_signed_is_its_misconduct_and_ends_with_4(fedloop: Fedloop, busy_anywhere: Path) -> None:
    log = opened(busy_anywhere)
    writer, origin = enrol(log, "three")
    thief = EventWriter(log, SigningKey.generate())
    thief.append(
        types.ClientEnrolled(
            origin=origin, client_id="three", seq=1, public_key=thief.key.public_key, node_id="77", epsilon=8.0, delta=1e-5
        )
    )
    absent = types.Content(arrays={"x": types.BlobRef("a" * 64, 10)})
    writer.append(
        types.UpdateSubmitted(origin=origin, client_id="three", seq=1, run_id="main", instruction_id="0" * 32, content=absent)
    )
    writer.append(types.ClientSeen(origin=origin, client_id="three", seq=10**9, examples_at_least=4))
    ended = fedloop("log", "verify", busy_anywhere, "--json")
    assert (ended.status, ended.document["verified"], ended.document["wrong"], ended.document["findings"]) == (4, True, 0, [])
    said = sorted(each["what"].split(" ", 2)[2] for each in ended.document["misconduct"])
    assert [each[:25] for each in said] == [
        "enrols client three a sec"[:25],
        "is not in the store"[:25],
        "out 999,999,998 sequence ",
    ]
    text = fedloop("log", "verify", busy_anywhere)
    assert text.status == 4
    assert text.out.count("CLIENT  offset ") == 3
    assert "WRONG" not in text.out
    assert "The log is intact." in text.out


def test_tampering_outweighs_misconduct(fedloop: Fedloop, busy: Path) -> None:
    writer, origin = enrol(opened(busy), "three")
    for seq in (1, 1):
        writer.append(types.ClientSeen(origin=origin, client_id="three", seq=seq, examples_at_least=4))
    change(busy, "UPDATE events SET signature = '' WHERE position = 6")
    found = fedloop("log", "verify", busy, "--json")
    assert (found.status, found.document["client_wrong"]) == (1, 1)
    assert found.document["wrong"] >= 1


def test_what_a_revoked_client_goes_on_to_sign_is_its_misconduct(busy_anywhere: Path) -> None:
    log = opened(busy_anywhere)
    writer, origin = enrol(log, "three")
    clients.revoke(open_deployment(busy_anywhere).writer, "three", "lost")
    writer.append(types.ClientSeen(origin=origin, client_id="three", seq=1, examples_at_least=4))
    report = verify(busy_anywhere)
    assert (report.verified, report.client_wrong) == (True, 1)


def test_an_event_that_is_missing_is_found_by_the_numbers_around_it(busy_anywhere: Path) -> None:
    writer, origin = enrol(opened(busy_anywhere), "three")
    for seq in (1, 4):
        writer.append(types.ClientSeen(origin=origin, client_id="three", seq=seq, examples_at_least=4))
    assert [finding.what for finding in verify(busy_anywhere).findings] == ["2 events of three before this one are missing"]


def test_two_authentic_events_under_one_id_are_counted_and_a_forged_one_is_wrong(
    fedloop: Fedloop, deployment_on_kafka: Path
) -> None:
    deployment = open_deployment(deployment_on_kafka)
    log, writer = deployment.log, deployment.writer
    origin, identifier = commands.identities(writer).origin, ids.new_id()
    one, other = (types.RoundRequested(origin=origin, run_id="main", request_id="q-1", reason=each) for each in ("one", "other"))
    for event in (writer.event(one, id=identifier), writer.event(other, id=identifier)):
        log.append([event])
    found = fedloop("log", "verify", deployment_on_kafka, "--json").document
    assert (found["verified"], found["rivals"], found["events"]) == (True, 1, 6)
    log.append([EventWriter(log, SigningKey.generate()).event(other, id=identifier)])
    ended = fedloop("log", "verify", deployment_on_kafka)
    assert ended.status == 1
    assert "WRONG  offset rounds-0:3:" in ended.out


def damage(path: Path) -> None:
    path.chmod(0o600)
    path.write_bytes(path.read_bytes()[:-1] + b"\x01")


@pytest.mark.parametrize("harm", [Path.unlink, damage])
def test_a_blob_that_is_gone_or_damaged_is_found(busy: Path, harm: Callable[[Path], None]) -> None:
    (blob,) = [path for path in (busy / locations.BLOB_FOLDER).rglob("*") if path.is_file() and not path.name.startswith(".")]
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


def test_replay_counts_and_compares_with_snapshots(fedloop: Fedloop, busy_anywhere: Path) -> None:
    log = opened(busy_anywhere)
    reader = Reader(log, RoundsView(), identities=Identities(), snapshots=Snapshots(busy_anywhere / "rounds.snapshot"))
    reader.catch_up()
    reader.save()
    ended = fedloop("log", "replay", busy_anywhere, "--json")
    assert ended.status == 0
    found = ended.document
    assert (found["events"], found["clients"], found["refused"]) == (11, 2, 0)
    assert (found["matching"], found["differing"]) == (["rounds.snapshot"], [])
    kept = Snapshots(busy_anywhere / "rounds.snapshot")
    kept.save(RoundsView.version, reader.position, RoundsView("other").to_state(), reader.standing, {})
    ended = fedloop("log", "replay", busy_anywhere)
    assert ended.status == 1
    assert "DIFFERS  rounds.snapshot" in ended.out


def test_tail_shows_the_last_events_of_all_topics_by_the_logs_clock(fedloop: Fedloop, busy_anywhere: Path) -> None:
    found = fedloop("log", "tail", busy_anywhere, "-n", "3", "--json").document["events"]
    kinds = [event["type"].removeprefix("io.fedloop.") for event in found]
    assert kinds == ["client.seen.v1", "client.seen.v1", "round.requested.v1"]
    ended = fedloop("log", "tail", busy_anywhere, "-n", "1")
    stream = found[-1]["stream"]
    assert ended.out.split()[0] == ("11" if stream == "log" else "rounds-0:1")


def test_tail_shows_the_last_events_of_the_topics_that_are_asked_for(fedloop: Fedloop, busy_anywhere: Path) -> None:
    found = fedloop("log", "tail", busy_anywhere, "-n", "2", "--topic", "clients", "--json").document["events"]
    assert [(event["data"]["seq"], event["data"]["client_id"]) for event in found] == [(1, "two"), (2, "two")]
    ended = fedloop("log", "tail", busy_anywhere, "--topic", "nonsense")
    assert ended.status == 2
    assert "the topics are clients" in ended.err
