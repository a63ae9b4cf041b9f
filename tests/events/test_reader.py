"""The reader: every state is the fold of the log, with or without snapshots, whatever stands in the log."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest
import samples
from fedloop_events import topics
from fedloop_events.envelope import Record
from fedloop_events.errors import InvalidEventError, LogChangedError
from fedloop_events.folds.admit import Standing
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.marks import Marks, check, remember
from fedloop_events.folds.reader import Reader
from fedloop_events.folds.snapshots import Snapshots
from fedloop_events.logs.port import START, Batch, EventLog, Position
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_events.types import FeedbackRecorded, NodesListed, Payload
from fedloop_events.writer import EventWriter


class Offsets:
    """The offsets of the feedback that counted."""

    topics = (topics.FEEDBACK,)
    version = 1

    def __init__(self) -> None:
        self.seen: list[int] = []

    def apply(self, record: Record, payload: Payload) -> None:
        if isinstance(payload, FeedbackRecorded) and payload.thumb == "down":
            raise InvalidEventError("no")
        self.seen.append(record.offset)

    def to_state(self) -> bytes:
        return msgspec.json.encode(self.seen)

    @classmethod
    def from_state(cls, state: bytes) -> Offsets:
        fold = cls()
        fold.seen = msgspec.json.decode(state)
        return fold


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    log = SqliteLog(tmp_path / "log.sqlite")
    yield log
    log.close()


def fill(log: EventLog, count: int = 3) -> None:
    log.append([samples.event(samples.feedback(number)) for number in range(count)])


def test_a_reader_catches_up_and_goes_on(log: EventLog) -> None:
    fill(log)
    reader = Reader(log, Offsets())
    assert (reader.catch_up(), reader.catch_up()) == (3, 0)
    fill(log, 2500)
    assert reader.catch_up() == 2500
    assert reader.fold.seen == list(range(1, 2504))
    assert reader.position == log.end()


def test_waiting_reads_what_comes(log: EventLog) -> None:
    reader = Reader(log, Offsets())
    assert reader.wait(0.01) == 0
    fill(log, 5)
    assert reader.wait(5) == 5


def test_bad_events_are_counted_and_skipped(log: EventLog) -> None:
    good, other = samples.event(samples.feedback(1)), samples.event(samples.feedback(2))
    thumbs_down = samples.event(msgspec.structs.replace(samples.feedback(3), thumb="down"))
    log.append(
        [
            msgspec.structs.replace(other, id="0" * 31 + "1", data=b"{}"),
            msgspec.structs.replace(other, id="0" * 31 + "2", data=b"\xff\x00"),
            msgspec.structs.replace(other, id="0" * 31 + "3", data=b"[" * 50_000),
            msgspec.structs.replace(other, id="0" * 31 + "4", type="io.fedloop.feedback.recorded.v99"),
            thumbs_down,
            good,
        ]
    )
    refused: list[tuple[int, str]] = []
    reader = Reader(log, Offsets(), on_refused=lambda record, error: refused.append((record.offset, str(error))))
    reader.catch_up()
    assert (reader.fold.seen, reader.refused, reader.unknown) == ([6], 4, 1)
    assert [offset for offset, _ in refused] == [1, 2, 3, 5]


def test_with_identities_only_what_its_author_said_counts(log: EventLog) -> None:
    log.append([samples.signed(samples.created()), samples.signed(samples.enrolled())])
    log.append([samples.event(samples.feedback(1)), samples.signed(samples.feedback(2), by="device-2")])
    log.append([samples.signed(samples.feedback(3)), samples.signed(samples.revoked()), samples.signed(samples.feedback(4))])
    reader = Reader(log, Offsets(), identities=Identities())
    reader.catch_up()
    assert (reader.fold.seen, reader.refused) == ([5], 3)


def test_identities_are_shared_and_caught_up_before_each_batch(log: EventLog) -> None:
    identities = Identities()
    readers = [Reader(log, Offsets(), identities=identities) for _ in range(2)]
    server, device = EventWriter(log, samples.key("server")), EventWriter(log, samples.key("device-1"))
    server.append(samples.created())
    device.append(samples.enrolled(), samples.feedback(1))
    assert [reader.catch_up() for reader in readers] == [1, 1]
    device.append(samples.feedback(2))
    assert [reader.catch_up() for reader in readers] == [1, 1]
    assert [reader.fold.seen for reader in readers] == [[3, 4], [3, 4]]


def test_a_snapshot_saves_the_reading_and_changes_nothing(log: EventLog, tmp_path: Path) -> None:
    fill(log, 10)
    first = Reader(log, Offsets(), snapshots=Snapshots(tmp_path / "snapshot"))
    first.catch_up()
    first.save()
    fill(log, 2)
    second = Reader(log, Offsets(), snapshots=Snapshots(tmp_path / "snapshot"))
    assert second.fold.seen == list(range(1, 11))
    assert second.catch_up() == 2
    assert second.fold.seen == list(range(1, 13))


def test_a_snapshot_is_written_by_itself_after_many_events(
    log: EventLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloop_events.folds.reader.SNAPSHOT_EVERY", 5)
    fill(log, 5)
    Reader(log, Offsets(), snapshots=Snapshots(tmp_path / "snapshot")).catch_up()
    assert Snapshots(tmp_path / "snapshot").load(1) is not None


@pytest.mark.parametrize("damage", ["cut", "flip", "empty"])
def test_a_snapshot_that_does_not_fit_is_rebuilt_from_the_log(
    log: EventLog, tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    fill(log, 10)
    path = tmp_path / "snapshot"
    reader = Reader(log, Offsets(), snapshots=Snapshots(path))
    reader.catch_up()
    reader.save()
    content = path.read_bytes()
    damaged = {"cut": content[:-1], "flip": content[:40] + bytes([content[40] ^ 1]) + content[41:], "empty": b""}
    path.write_bytes(damaged[damage])
    with caplog.at_level(logging.WARNING):
        again = Reader(log, Offsets(), snapshots=Snapshots(path))
    assert "rebuilt" in caplog.text
    again.catch_up()
    assert again.fold.seen == list(range(1, 11))


def backup(log: EventLog, path: Path, count: int) -> SqliteLog:
    """The log as it was when it had so many events."""
    restored = SqliteLog(path)
    restored.append(log.read(limit=count).records)
    return restored


@pytest.mark.parametrize(
    ("grown", "message"), [(0, "ends before event 10 .*: it has 4"), (6, "event 10 of .* is not the one"), (20, "event 10 of")]
)
def test_a_log_that_lost_what_a_snapshot_has_read_is_refused_however_far_it_has_grown(
    log: EventLog, tmp_path: Path, caplog: pytest.LogCaptureFixture, grown: int, message: str
) -> None:
    fill(log, 10)
    kept = Snapshots(tmp_path / "snapshot")
    first = Reader(log, Offsets(), snapshots=kept)
    first.catch_up()
    first.save()
    restored = backup(log, tmp_path / "restored.sqlite", 4)
    fill(restored, grown)
    for _ in range(2):
        with pytest.raises(LogChangedError, match=message):
            Reader(restored, Offsets(), snapshots=kept)
    with caplog.at_level(logging.WARNING):
        accepted = Reader(restored, Offsets(), snapshots=kept, accept_loss=True)
    assert "event 10 of stream 'log'" in caplog.text
    accepted.catch_up()
    assert accepted.fold.seen == list(range(1, 5 + grown))
    assert Reader(restored, Offsets(), snapshots=kept).position == START, "the snapshot is gone"
    restored.close()


def test_marks_outlast_what_comes_after_them_and_what_may_expire_is_missed_by_nobody(log: EventLog, tmp_path: Path) -> None:
    kept: Marks = {}
    log.append([samples.signed(samples.created()), samples.signed(samples.epoch())])
    remember(kept, log.read().records)
    fill(log, 3)
    remember(kept, log.read(after=Position({"log": 2})).records)
    assert [(mark.offset, mark.lasting) for mark in kept["log"]] == [(2, True), (5, False)]

    def read(after: Position) -> Batch:
        """As after retention has removed all feedback."""
        return log.read((topics.CLIENTS, topics.ROUNDS), after, limit=1)

    check(log.end(), read, log.end(), kept)
    with pytest.raises(LogChangedError, match="event 2 of"):
        check(log.end(), lambda after: log.read((topics.CLIENTS,), after, limit=1), log.end(), kept)


def test_a_snapshot_that_was_kept_before_there_were_marks_is_accepted_once(log: EventLog, tmp_path: Path) -> None:
    fill(log, 3)
    kept = Snapshots(tmp_path / "snapshot")
    kept.save(1, log.end(), b"[1,2,3]", Standing(), {})
    reader = Reader(log, Offsets(), snapshots=kept)
    assert (reader.fold.seen, reader.catch_up()) == ([1, 2, 3], 0)


def test_a_snapshot_of_another_version_is_rebuilt(
    log: EventLog, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    fill(log, 3)
    first = Reader(log, Offsets(), snapshots=Snapshots(tmp_path / "snapshot"))
    first.catch_up()
    first.save()
    monkeypatch.setattr(Offsets, "version", 2)
    with caplog.at_level(logging.WARNING):
        second = Reader(log, Offsets(), snapshots=Snapshots(tmp_path / "snapshot"))
    assert "version 1" in caplog.text
    assert second.catch_up() == 3


def test_a_snapshot_that_cannot_be_written_stops_nobody(log: EventLog, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    fill(log)
    reader = Reader(log, Offsets(), snapshots=Snapshots(tmp_path / "absent" / "snapshot"))
    reader.catch_up()
    with caplog.at_level(logging.WARNING):
        reader.save()
    assert "cannot be written" in caplog.text


def test_an_author_signs_what_it_says_and_says_all_or_nothing(log: EventLog) -> None:
    writer = EventWriter(log, samples.key("server"), clock=lambda: 1_800_000_000.9)
    event = writer.event(samples.created(), id="0" * 32)
    assert (event.id, event.time_s) == ("0" * 32, 1_800_000_000)
    said = writer.append(samples.created(), samples.epoch())
    assert [record.id for record in log.read().records] == [event.id for event in said]
    too_large = NodesListed(origin=samples.ORIGIN, epoch=1, run_id="main", step=0, node_ids=["1" * 20] * 3000)
    with pytest.raises(InvalidEventError):
        writer.append(samples.epoch(2), too_large)
    assert len(log.read().records) == 2
