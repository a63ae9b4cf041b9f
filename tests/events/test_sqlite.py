"""What the SQLite log promises beyond the contract: its file, its durability, and what it refuses."""

from __future__ import annotations

import multiprocessing
import os
import stat
import threading
from pathlib import Path

import apsw
import pytest
import samples
from fedloop_events import topics
from fedloop_events.errors import LogChangedError, LogError, UnreachableError, UsageError
from fedloop_events.locations import open_blobs, open_log
from fedloop_events.logs.port import START, Position, read_all
from fedloop_events.logs.sqlite import SqliteLog


def fill(path: Path, count: int = 3) -> SqliteLog:
    log = SqliteLog(path)
    log.append([samples.event(samples.feedback(number)) for number in range(count)])
    return log


def test_offsets_are_dense_and_a_dropped_duplicate_leaves_no_hole(tmp_path: Path) -> None:
    log = fill(tmp_path / "log")
    duplicate = samples.event(samples.feedback(), number=1)
    for number in range(3):
        log.append([duplicate, samples.event(samples.epoch(number)), duplicate])
    log.append([samples.event(samples.feedback(number), number=number // 2) for number in range(200)])
    assert [record.offset for record in read_all(log)] == list(range(1, 107))
    assert log.check() == 106
    log.close()


def test_rows_can_be_neither_changed_nor_deleted(tmp_path: Path) -> None:
    fill(tmp_path / "log").close()
    connection = apsw.Connection(str(tmp_path / "log"))
    for statement in ("UPDATE events SET data = x'00'", "DELETE FROM events WHERE position = 2"):
        with pytest.raises(apsw.ConstraintError, match="append-only"):
            connection.execute(statement)
    connection.close()


def test_a_deleted_row_is_found(tmp_path: Path) -> None:
    log = fill(tmp_path / "log")
    connection = apsw.Connection(str(tmp_path / "log"))
    trigger = connection.execute("SELECT sql FROM sqlite_schema WHERE name = 'events_no_delete'").get
    connection.execute("DROP TRIGGER events_no_delete")
    connection.execute("DELETE FROM events WHERE position = 2")
    connection.execute(trigger)
    connection.close()
    with pytest.raises(LogError, match="lacks 1 of its 3 events"):
        log.check()
    log.close()


def test_a_damaged_page_is_found(tmp_path: Path) -> None:
    path = tmp_path / "log"
    fill(path, 400).close()
    content = bytearray(path.read_bytes())
    middle = len(content) // 2 // 8192 * 8192
    content[middle : middle + 100] = bytes(100)
    path.write_bytes(content)
    log = SqliteLog(path)
    with pytest.raises(LogError, match=r"damaged|cannot be used"):
        log.check()
    log.close()


def test_a_full_disk_acknowledges_nothing_and_readers_go_on(tmp_path: Path) -> None:
    log = fill(tmp_path / "log")
    with log._writing() as connection:
        pages = connection.execute("PRAGMA page_count").get
        connection.execute(f"PRAGMA max_page_count = {pages}")
    with pytest.raises(LogError, match="full"):
        log.append([samples.event(samples.feedback(number)) for number in range(10, 1000)])
    assert len(list(read_all(log))) == 3
    with log._writing() as connection:
        connection.execute("PRAGMA max_page_count = 100000")
    log.append([samples.event(samples.feedback(4))])
    assert log.check() == 4
    log.close()


def test_a_locked_file_is_an_error_after_the_bounded_wait_and_readers_go_on(tmp_path: Path) -> None:
    fill(tmp_path / "log").close()
    log = SqliteLog(tmp_path / "log", busy_timeout_s=0.05)
    other = apsw.Connection(str(tmp_path / "log"))
    other.execute("BEGIN IMMEDIATE")
    event = samples.event(samples.feedback(9))
    with pytest.raises(UnreachableError, match="locked"):
        log.append([event])
    assert len(list(read_all(log))) == 3
    other.execute("ROLLBACK")
    other.close()
    log.append([event])
    assert len(list(read_all(log))) == 4
    log.close()


def test_commits_are_synced(tmp_path: Path) -> None:
    log = fill(tmp_path / "log")
    with log._writing() as connection:
        assert connection.execute("PRAGMA synchronous").get == 2
        assert connection.execute("PRAGMA journal_mode").get == "wal"
    log.close()


def _other_database(path: Path) -> None:
    connection = apsw.Connection(str(path))
    connection.execute("CREATE TABLE notes (text)")
    connection.close()


def _text(path: Path) -> None:
    path.write_text("not a database at all " * 100)


def _newer(path: Path) -> None:
    fill(path).close()
    connection = apsw.Connection(str(path))
    connection.execute("PRAGMA user_version = 2")
    connection.close()


def _extra_trigger(path: Path) -> None:
    fill(path).close()
    connection = apsw.Connection(str(path))
    connection.execute("CREATE TRIGGER evil AFTER INSERT ON events BEGIN SELECT 1; END")
    connection.close()


@pytest.mark.parametrize(
    ("make", "message"),
    [(_other_database, "no Fedloop log"), (_text, "no Fedloop log"), (_newer, "format 2"), (_extra_trigger, "altered")],
)
def test_what_is_not_exactly_a_log_is_refused_and_left_as_it_is(tmp_path: Path, make: object, message: str) -> None:
    path = tmp_path / "log"
    assert callable(make)
    make(path)
    before = path.read_bytes()
    with pytest.raises(LogError, match=message):
        SqliteLog(path)
    assert path.read_bytes() == before


def test_a_folder_that_is_absent_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(LogError, match="cannot be used"):
        SqliteLog(tmp_path / "no" / "log")


def test_a_closed_log_says_so(tmp_path: Path) -> None:
    log = fill(tmp_path / "log")
    log.close()
    with pytest.raises(LogError, match="closed"):
        log.read()


def _in_a_forked_child(log: SqliteLog) -> None:
    log.append([samples.event(samples.epoch())])
    os._exit(0 if len(list(read_all(log))) == 4 else 1)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_child_opens_the_file_anew(tmp_path: Path) -> None:
    log = fill(tmp_path / "log")
    child = multiprocessing.get_context("fork").Process(target=_in_a_forked_child, args=(log,))
    child.start()
    child.join(30)
    assert child.exitcode == 0
    assert len(list(read_all(log))) == 4
    log.close()


def test_small_topics_are_read_through_the_index(tmp_path: Path) -> None:
    from fedloop_events.logs.sqlite import _query

    log = fill(tmp_path / "log")
    with log._reading() as connection:
        for wanted in ((topics.ROUNDS,), (topics.ROUNDS, topics.CLIENTS)):
            plan = [str(row[3]) for row in connection.execute(f"EXPLAIN QUERY PLAN {_query(wanted)}", (0, 10))]
            assert sum("events_sparse (topic=? AND rowid>?)" in step for step in plan) == len(wanted)
            assert not any("SCAN events" in step or "TEMP B-TREE" in step for step in plan)
    log.close()


def test_a_location_without_a_deployment_is_an_error_that_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no deployment") as caught:
        open_log(tmp_path / "nowhere")
    assert "server init" in caught.value.hint
    assert not (tmp_path / "nowhere").exists()
    open_log(tmp_path / "here", create=True).close()
    log = open_log(tmp_path / "here")
    assert log.read(after=START).records == []
    log.close()
    assert list(open_blobs(tmp_path / "here" / "blobs").all()) == []


def test_the_file_and_what_sqlite_puts_beside_it_are_their_owners_alone(tmp_path: Path) -> None:
    log = SqliteLog(tmp_path / "log.sqlite")
    log.append([samples.event(samples.feedback())])
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert found == dict.fromkeys(["log.sqlite", "log.sqlite-wal", "log.sqlite-shm"], 0o600)
    log.close()
    (tmp_path / "log.sqlite").chmod(0o640)
    SqliteLog(tmp_path / "log.sqlite").close()
    assert stat.S_IMODE((tmp_path / "log.sqlite").stat().st_mode) == 0o640, "what the operator has changed stays"


def cut(path: Path, count: int) -> None:
    """Remove the last events from the file, as no program of ours does."""
    connection = apsw.Connection(str(path))
    trigger = connection.execute("SELECT sql FROM sqlite_schema WHERE name = 'events_no_delete'").get
    with connection:
        connection.execute("DROP TRIGGER events_no_delete")
        connection.execute("DELETE FROM events WHERE position > (SELECT max(position) FROM events) - ?", (count,))
        connection.execute(trigger)
    connection.close()


def test_a_reader_notices_at_once_that_the_log_was_cut_below_what_it_has_read(tmp_path: Path) -> None:
    log, found = fill(tmp_path / "log", 4), list[str]()

    def wait() -> None:
        try:
            log.read(after=Position({"log": 4}), wait_s=30.0)
        except LogChangedError as error:
            found.append(error.message)

    waiting = threading.Thread(target=wait)
    waiting.start()
    cut(tmp_path / "log", 2)
    waiting.join(20)
    assert found == ["the log ends before event 4 of stream 'log', which was read: it has 2"]
    with pytest.raises(LogChangedError, match="it has 2"):
        log.read((topics.ROUNDS,), Position({"log": 4}))
    assert len(log.read().records) == 2
    log.close()
