"""Asking a lake: SQL over its tables as they are, by DuckDB, without a network (but to the bucket that a lake is in)."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import duckdb
from fedloop_events.errors import UsageError
from msgspec import Struct

from fedloop_server.feedback.lake import delta, place, reading
from fedloop_server.feedback.lake.catalog import EVERY
from fedloop_server.feedback.lake.place import LakePlace

_ROWS: Final = 1000
"""At a time."""


class Answer(Struct, frozen=True):
    """The columns that a query asked for, and the rows, each read when it is asked for."""

    columns: list[str]
    rows: Iterator[tuple[Any, ...]]


def connect(location: str | Path) -> duckdb.DuckDBPyConnection:
    """A DuckDB with a view for each table of the lake in a folder or at `s3://BUCKET/PREFIX`, as the tables are now.

    Raises `UsageError` if there is no lake.
    """
    return _connect(place.locate(None, str(location)))


def query(lake: LakePlace, sql: str) -> Answer:
    """What the lake answers. A sync may take away files meanwhile: then it is asked again, of the tables as they are then.

    Raises `UsageError` if there is no lake, or for SQL that DuckDB refuses.
    """
    try:
        try:
            return _answer(lake, sql)
        except duckdb.IOException:
            return _answer(lake, sql)
    except duckdb.Error as error:
        message = str(error).strip().partition("\n")[0]
        hint = "`SHOW TABLES` names the tables, `DESCRIBE feedback` the columns of one"
        raise UsageError("the query cannot be answered", cause=message, hint=hint) from None


def _answer(lake: LakePlace, sql: str) -> Answer:
    connection = _connect(lake)
    done = connection.execute(sql)
    first = done.fetchmany(_ROWS)
    return Answer([str(each[0]) for each in done.description or ()], _rows(done, first))


def _rows(done: duckdb.DuckDBPyConnection, found: list[tuple[Any, ...]]) -> Iterator[tuple[Any, ...]]:
    while found:
        yield from found
        found = done.fetchmany(_ROWS)


def _connect(lake: LakePlace) -> duckdb.DuckDBPyConnection:
    connection = reading.connect(lake)
    for table in EVERY:
        files = delta.files(lake, table)
        if files is None:
            raise UsageError(
                f"there is no lake in {lake.location}", hint="`fedloop feedback lake sync` makes it, or name another with --lake"
            )
        connection.execute(f'CREATE VIEW "{table.name}" AS SELECT * FROM {reading.source(table, files)}')
    return connection
