"""The lake: its tables are a function of the log, wherever a sync was killed, and what is withdrawn is gone."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import deltalake
import duckdb
import lake_logs
import msgspec
import pytest
import samples
from fedloop_events import types
from fedloop_events.errors import FedloopError, UnreachableError, UsageError
from fedloop_events.logs.port import EventLog, Position
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_server.feedback.lake import delta, place, query, sync
from fedloop_server.feedback.lake.catalog import EVENTS, EVERY
from fedloop_server.feedback.lake.sync import Counts, Lake
from fedloop_server.feedback.lake.tables import FEEDBACK, Table


def synced(log: EventLog, lake: Path | str) -> dict[str, Counts]:
    """What one sync of the lake did."""
    with Lake(log, place.locate(None, str(lake))) as opened:
        opened.catch_up()
        return opened.counts


@pytest.fixture
def log(tmp_path: Path) -> Iterator[SqliteLog]:
    made = lake_logs.make(tmp_path / "deployment", lake_logs.history())
    yield made
    made.close()


def test_every_table_has_the_rows_of_its_events(log: SqliteLog, tmp_path: Path) -> None:
    counts = synced(log, tmp_path / "lake")
    found = lake_logs.rows(tmp_path / "lake")
    assert {name: len(rows) for name, rows in found.items() if name not in {"features"}} == {
        "feedback": 32,
        "training": 28,
        "withdrawn": 12,
        "metrics": 1,
        "drift": 1,
        "forecasts": 1,
        "rounds": 6,
        "releases": 5,
        "audit": 2,
        "quarantine": 2,
    }
    assert found["features"]
    assert not any(each.refused for each in counts.values())


def test_a_sync_in_pieces_and_one_that_is_repeated_make_the_same_rows_as_one_from_scratch(tmp_path: Path) -> None:
    payloads = lake_logs.history()
    log = lake_logs.make(tmp_path / "deployment")
    for start in range(0, len(payloads), 17):
        lake_logs.append(log, payloads[start : start + 17])
        synced(log, tmp_path / "pieces")
    repeated = synced(log, tmp_path / "pieces")
    synced(log, tmp_path / "whole")
    assert lake_logs.rows(tmp_path / "pieces") == lake_logs.rows(tmp_path / "whole")
    assert not any(each.any for each in repeated.values())
    log.close()


def test_a_lake_that_was_deleted_is_made_again_with_the_same_rows(log: SqliteLog, tmp_path: Path) -> None:
    synced(log, tmp_path / "lake")
    before = lake_logs.rows(tmp_path / "lake")
    shutil.rmtree(tmp_path / "lake")
    synced(log, tmp_path / "lake")
    assert lake_logs.rows(tmp_path / "lake") == before


class KilledError(BaseException):
    """In the place of a kill: nothing of the lake's catches it."""


@contextmanager
def killed_before(number: int, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """End the sync before the Delta write of this number, which is after the one before it."""
    made = [0]

    def wrap(write: Callable[..., Any]) -> Callable[..., Any]:
        def written(*arguments: Any, **named: Any) -> Any:
            made[0] += 1
            if made[0] == number:
                raise KilledError
            return write(*arguments, **named)

        return written

    with monkeypatch.context() as patch:
        patch.setattr(f"{delta.__name__}.write_deltalake", wrap(deltalake.write_deltalake))
        for name in ("create", "delete", "vacuum", "create_write_transaction"):
            patch.setattr(deltalake.DeltaTable, name, wrap(getattr(deltalake.DeltaTable, name)))
        patch.setattr(delta.LakeTable, "compact", wrap(delta.LakeTable.compact))
        yield


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_sync_that_ends_before_any_write_is_gone_on_with_to_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = lake_logs.make(tmp_path / "deployment", lake_logs.history(16))
    monkeypatch.setattr(sync, "MAX_ROWS", 8)
    monkeypatch.setattr(delta, "FILES_A_PART", 2)
    synced(log, tmp_path / "whole")
    expected = lake_logs.rows(tmp_path / "whole")
    lake, number, ended = tmp_path / "lake", 0, False
    while not ended:
        number += 1
        with killed_before(number, monkeypatch), suppress(KilledError):
            synced(log, lake)
            ended = True
        if not ended:
            synced(log, lake)
            assert lake_logs.rows(lake) == expected, f"ended before write {number}"
            check_nothing_is_left(lake)
            shutil.rmtree(lake)
    assert number > 30
    log.close()


@pytest.mark.slow
def test_a_process_that_is_killed_at_its_writes_again_and_again_ends_with_the_same_rows(log: SqliteLog, tmp_path: Path) -> None:
    """The same with SIGKILL, each process going on where the one before was killed at its third commit."""
    synced(log, tmp_path / "whole")
    script = f"""
import os, signal, sys
sys.path[:0] = {sys.path!r}
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_server.feedback.lake import delta, place, query, sync
sync.MAX_ROWS = 15
write, left = delta.write_deltalake, [3]
def killed(*arguments, **named):
    left[0] -= 1
    if left[0] == 0:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*arguments, **named)
delta.write_deltalake = killed
log = SqliteLog({str(tmp_path / "deployment" / "log.sqlite")!r})
with sync.Lake(log, place.locate(None, {str(tmp_path / "lake")!r})) as lake:
    lake.catch_up()
"""
    kills = 0
    while (status := subprocess.run([sys.executable, "-c", script], timeout=120, check=False).returncode) == -signal.SIGKILL:
        kills += 1
        assert kills < 30
    assert status == 0
    assert kills >= 5
    assert lake_logs.rows(tmp_path / "lake") == lake_logs.rows(tmp_path / "whole")


def test_an_event_that_stands_in_the_log_twice_is_one_row(tmp_path: Path) -> None:
    """The pipeline's next version scores the same feedback again, under another event id."""
    log = lake_logs.make(tmp_path / "deployment", [lake_logs.scored(1)])
    synced(log, tmp_path / "lake")
    lake_logs.append(log, [lake_logs.scored(1), lake_logs.scored(2), lake_logs.scored(2)])
    assert synced(log, tmp_path / "lake")["feedback"].added == 1
    assert len(lake_logs.rows(tmp_path / "lake")["feedback"]) == 2
    log.close()


def test_what_its_author_did_not_sign_is_no_row_and_is_counted(tmp_path: Path) -> None:
    log = lake_logs.make(tmp_path / "deployment", [lake_logs.scored(1), lake_logs.retracted(1)])
    log.append(
        [
            samples.event(lake_logs.scored(2)),
            samples.signed(lake_logs.scored(3), by=lake_logs.CLIENTS[0]),
            samples.signed(lake_logs.retracted(1, lake_logs.CLIENTS[1]), by=lake_logs.CLIENTS[0]),
        ]
    )
    counts = synced(log, tmp_path / "lake")
    assert (counts["feedback"].added, counts["feedback"].refused) == (0, 2)
    assert counts["withdrawn"].refused == 1
    log.close()


def test_a_table_knows_up_to_where_the_log_has_made_it(log: SqliteLog, tmp_path: Path) -> None:
    synced(log, tmp_path / "lake")
    where, end = place.locate(None, str(tmp_path / "lake")), log.end()
    for table in EVENTS:
        position = delta.LakeTable(where, table, samples.ORIGIN).position(end)
        assert not log.read(table.topics, position).records, table.name


def test_what_a_fenced_server_decides_is_no_row_and_what_the_new_one_does_is_in_whatever_sync_reads_it(tmp_path: Path) -> None:
    def opened(epoch: int) -> types.Payload:
        (found,) = (each for each in lake_logs.decisions() if isinstance(each, types.RoundOpened))
        return msgspec.structs.replace(found, epoch=epoch, round_id=f"r000{epoch}")

    log = lake_logs.make(tmp_path / "deployment", [samples.epoch(1), opened(1)])
    for payload in (samples.epoch(2), opened(1), opened(2)):
        synced(log, tmp_path / "lake")
        lake_logs.append(log, [payload])
    synced(log, tmp_path / "lake")
    assert len(lake_logs.rows(tmp_path / "lake")["rounds"]) == 2
    log.close()


# --- withdrawing ---


def check_nothing_is_left(lake: Path) -> None:
    """No file of the lake holds text of withdrawn feedback: neither Delta's log, nor a Parquet file of any version."""
    numbers = {row[5].removeprefix("f") for row in lake_logs.rows(lake)["withdrawn"] if row[5] is not None}
    assert numbers
    for path in lake.rglob("*"):
        if path.suffix == ".parquet" and "_delta_log" not in path.parts:
            found = duckdb.execute("SELECT * FROM read_parquet(?, hive_partitioning = false)", [str(path)]).fetchall()
            for cell in (cell for row in found for cell in row if isinstance(cell, str) and cell.startswith("secret")):
                assert cell.split()[-1] not in numbers, path
        elif path.is_file():
            assert b"secret" not in path.read_bytes(), path


def test_no_byte_of_what_was_withdrawn_is_left_in_the_lake_when_the_sync_ends(tmp_path: Path) -> None:
    log = lake_logs.make(tmp_path / "deployment")
    lake_logs.append(log, [each(number) for number in range(20) for each in (lake_logs.scored, lake_logs.curated)])
    synced(log, tmp_path / "lake")
    lake_logs.append(log, [lake_logs.retracted(3), lake_logs.score_withdrawn(4), lake_logs.example_withdrawn(5)])
    counts = synced(log, tmp_path / "lake")
    assert (counts["feedback"].removed, counts["training"].removed) == (2, 3)
    check_nothing_is_left(tmp_path / "lake")
    features = lake_logs.rows(tmp_path / "lake")["features"]
    assert max(row[4] for row in features) == 18
    log.close()


def test_feedback_that_was_taken_back_does_not_come_back_when_it_is_read_after_that(tmp_path: Path) -> None:
    log = lake_logs.make(tmp_path / "deployment", [lake_logs.retracted(1), lake_logs.example_withdrawn(2)])
    synced(log, tmp_path / "lake")
    lake_logs.append(log, [lake_logs.scored(1), lake_logs.curated(1), lake_logs.curated(2), lake_logs.scored(2)])
    synced(log, tmp_path / "lake")
    found = lake_logs.rows(tmp_path / "lake")
    assert [row[4] for row in found["feedback"]] == ["f2"]
    assert not found["training"]
    log.close()


def test_a_client_withdraws_its_own_feedback_alone(tmp_path: Path) -> None:
    one, two, _ = lake_logs.CLIENTS
    log = lake_logs.make(tmp_path / "deployment", [lake_logs.scored(1, one), lake_logs.retracted(1, two)])
    synced(log, tmp_path / "lake")
    assert len(lake_logs.rows(tmp_path / "lake")["feedback"]) == 1
    log.close()


def test_what_a_killed_sync_left_is_removed_by_the_next(log: SqliteLog, tmp_path: Path) -> None:
    synced(log, tmp_path / "lake")
    orphan = tmp_path / "lake" / "feedback" / "part-of-nothing.parquet"
    orphan.write_text("secret words 3")
    synced(log, tmp_path / "lake")
    assert not orphan.exists()


# --- one writer ---


def test_a_second_writer_is_refused_and_the_error_says_who_writes(log: SqliteLog, tmp_path: Path) -> None:
    where = place.locate(None, str(tmp_path / "lake"))
    with Lake(log, where), pytest.raises(UnreachableError, match=f"process {os.getpid()} on"), Lake(log, where):
        pass
    with Lake(log, where):
        pass


def test_a_writer_that_no_lock_keeps_away_is_stopped_when_it_commits_the_same_events(log: SqliteLog, tmp_path: Path) -> None:
    """As two machines are that write to one bucket."""
    where = place.locate(None, str(tmp_path / "lake"))
    synced(log, tmp_path / "lake")
    one, two = (delta.LakeTable(where, FEEDBACK, samples.ORIGIN) for _ in range(2))
    scored = lake_logs.scored(100)
    row = FEEDBACK.rows[type(scored)](samples.record(samples.signed(scored), 999), scored)
    one.append([row], Position({"log": 999}))
    with pytest.raises(FedloopError, match="cannot be written"):
        two.append([row], Position({"log": 999}))
    assert len(lake_logs.rows(tmp_path / "lake")["feedback"]) == 33


def test_a_query_that_meets_a_file_that_a_sync_has_just_removed_is_asked_again(
    log: SqliteLog, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced(log, tmp_path / "lake")
    where, listed = place.locate(None, str(tmp_path / "lake")), delta.files
    left = [1]

    def files(lake: place.LakePlace, table: Table) -> list[str] | None:
        found = listed(lake, table)
        if table is FEEDBACK and left:
            left.pop()
            return [f"{each}.gone" for each in found or []]
        return found

    monkeypatch.setattr(delta, "files", files)
    assert list(query.query(where, "SELECT count(*) FROM feedback").rows) == [(32,)]


def test_a_lake_of_another_deployment_is_refused(log: SqliteLog, tmp_path: Path) -> None:
    synced(log, tmp_path / "lake")
    other = SqliteLog(tmp_path / "other.sqlite")
    other.append([samples.signed(samples.created("elsewhere"))])
    with pytest.raises(UsageError, match="is of the deployment demo, and the log is of elsewhere"):
        synced(other, tmp_path / "lake")
    other.close()


def test_many_small_files_are_made_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(delta, "FILES_A_PART", 4)
    log = lake_logs.make(tmp_path / "deployment")
    for number in range(10):
        lake_logs.append(log, [lake_logs.scored(number)])
        synced(log, tmp_path / "lake")
    assert len(list((tmp_path / "lake" / "feedback").rglob("use_case=*/**/*.parquet"))) < 5
    assert len(lake_logs.rows(tmp_path / "lake")["feedback"]) == 10
    log.close()


def test_a_folder_may_have_any_name_that_the_libraries_can_read_and_another_is_refused(tmp_path: Path) -> None:
    log = lake_logs.make(tmp_path / "deployment", [lake_logs.scored(1)])
    lake = tmp_path / "it's a {lake}: #1, \u00e9 & co"
    synced(log, lake)
    lake_logs.append(log, [lake_logs.scored(1), lake_logs.scored(2)])
    synced(log, lake)
    assert len(lake_logs.rows(lake)["feedback"]) == 2
    for wrong in "%[]*?\\\n":
        with pytest.raises(UsageError, match="in its name"):
            synced(log, tmp_path / f"a{wrong}25")
    log.close()


def test_the_columns_of_every_table_have_names_that_need_no_quotes() -> None:
    for table in EVERY:
        assert all(name.isidentifier() for name in (table.name, *table.columns)), table.name


def test_without_the_extra_the_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "deltalake", None)
    with pytest.raises(UsageError, match="needs the package deltalake") as error:
        place.locate(tmp_path, None)
    assert error.value.hint == "pip install 'fedloop[lake]'"
