"""The lake: feedback written to it, and queried by use case and day; the peer is DuckDB on Parquet of the same rows."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

import duckdb
from fedloop_events import types
from fedloop_events.ids import derived_id
from fedloop_events.logs.port import Position
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_events.signatures import SigningKey
from fedloop_events.writer import EventWriter
from fedloop_server.feedback.lake import delta, place, query
from fedloop_server.feedback.lake.sync import Lake, Taken
from fedloop_server.feedback.lake.tables import DAY_MS, FEEDBACK, Row, day_of

from benchmarks.harness import Pair, per_second, rates, scratch, seconds, timed_in_turn
from benchmarks.harness import Row as Measured

_CHUNK: Final = 50_000
_DAYS: Final = 30
_USE_CASES: Final = ("finance", "learning", "moderation", "support")
_BEGIN_MS: Final = 20_000 * DAY_MS
_TEXT: Final = "my card order payment was not sent yet please help with the transfer account <PERSON_1> thank you"
_WORDS: Final = tuple(_TEXT.split())
_QUERY: Final = """
    SELECT release, lane, count(*), avg(satisfaction), avg(sentiment), sum(masked) FROM feedback
    WHERE use_case = '{use_case}' AND day = DATE '2024-10-04' + {day} GROUP BY ALL
"""
_WHOLE: Final = "SELECT use_case, day, count(*), avg(satisfaction) FROM feedback GROUP BY ALL"


def rows(quick: bool) -> Iterator[Measured]:
    count, runs = (20_000, 1) if quick else (1_000_000, 3)
    written: list[Pair] = []
    queried: list[Pair] = []
    for run in range(runs):
        with scratch() as folder:
            written.append(_write(folder, count, first=run % 2))
            queried.append(_ask(folder, count))
    yield rates(f"lake: {count:,} feedback rows written", "DuckDB writing Parquet", per_second(count, written), "rows/s", 0.3)
    asked = _DAYS * len(_USE_CASES) + 1
    yield rates("lake: feedback by use case and day", "DuckDB on Parquet", per_second(asked, queried), "queries/s", 0.7)


def _write(folder: Path, count: int, *, first: int) -> Pair:
    """Both are given the same rows, a chunk at a time, and divide them alike; who goes first changes with each chunk.

    The lake makes Arrow of them, looks up whether it has any of them, commits and compacts; DuckDB is given the Arrow.
    """
    log = SqliteLog(folder / "log.sqlite")
    key = SigningKey.generate()
    EventWriter(log, key).append(types.DeploymentCreated(origin="bench", public_key=key.public_key))
    connection = duckdb.connect(config={"temp_directory": ""})
    made = [0.0, 0.0]
    with Lake(log, place.locate(folder, None)) as lake:
        for number, chunk in enumerate(_chunks(count)):
            taken = Taken({row[0]: row for row in chunk}, Position({"log": (number + 1) * _CHUNK}))
            batch = delta.batch_of(FEEDBACK, chunk)
            connection.register("batch", batch)
            work: list[Callable[[], object]] = [
                lambda taken=taken: lake.commit(lake.source(FEEDBACK.name), taken),  # type: ignore[misc]
                lambda: connection.execute(_copy(folder)),
            ]
            for index in (number + first, number + first + 1):
                made[index % 2] += seconds(work[index % 2])
            connection.unregister("batch")
    connection.close()
    log.close()
    return Pair(*made)


def _copy(folder: Path) -> str:
    how = "FORMAT parquet, PARTITION_BY (use_case, day), APPEND"
    return f"COPY (SELECT * FROM batch) TO '{folder}/peer' ({how})"


def _ask(folder: Path, count: int) -> Pair:
    """Each use case and day, and all of them at once, over views that are there."""
    ours, theirs = query.connect(folder / "lake"), duckdb.connect(config={"temp_directory": ""})
    parts = "hive_partitioning = true, hive_types = {'use_case': VARCHAR, 'day': DATE}"
    theirs.execute(f"CREATE VIEW feedback AS SELECT * FROM read_parquet('{folder}/peer/**/*.parquet', {parts})")
    for each in (ours, theirs):
        assert each.sql("SELECT count(*) FROM feedback").fetchall() == [(count,)]
    questions = [_QUERY.format(use_case=use_case, day=day) for use_case in _USE_CASES for day in range(_DAYS)]

    def ask(connection: duckdb.DuckDBPyConnection) -> list[Any]:
        return [sorted(connection.execute(each).fetchall(), key=repr) for each in (*questions, _WHOLE)]

    (pair,) = timed_in_turn(lambda: ask(ours), lambda: ask(theirs), runs=1)
    return pair


def _chunks(count: int) -> Iterator[list[Row]]:
    chance = random.Random(1)
    step_ms = _DAYS * DAY_MS // count
    for start in range(0, count, _CHUNK):
        yield [_row(number, step_ms, chance) for number in range(start, min(count, start + _CHUNK))]


def _row(number: int, step_ms: int, chance: random.Random) -> Row:
    at_ms = _BEGIN_MS + number * step_ms
    satisfied = chance.random() < 0.8
    values = {
        "event_id": derived_id("bench", number),
        "use_case": _USE_CASES[chance.randrange(len(_USE_CASES))],
        "day": day_of(at_ms),
        "client_id": f"device-{chance.randrange(5000)}",
        "feedback_id": derived_id("feedback", number),
        "response_id": derived_id("response", number),
        "release": f"{number * 10 // 1_000_000:04d}-0123456789ab",
        "given_at": at_ms - 1000,
        "recorded_at": at_ms,
        "text": " ".join(chance.choices(_WORDS, k=50)),
        "context": "[]",
        "predicted": _WORDS[chance.randrange(10)],
        "thumb": "up" if satisfied else "down",
        "satisfaction": float(satisfied),
        "sentiment": chance.random(),
        "priority": chance.random(),
        "lane": "normal",
        "language": "en",
        "masked": chance.randrange(3),
    }
    return tuple(values.get(name) for name in FEEDBACK.columns)
