"""What is in a lake, read by DuckDB: the files that a Delta table has now, without DuckDB's own extension for Delta, which it
would download."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Final

import duckdb
from arro3.core import Array, DataType
from arro3.core import Table as Batch
from fedloop_events.errors import FedloopError

from fedloop_server.feedback.lake.place import LakePlace
from fedloop_server.feedback.lake.tables import Table

if TYPE_CHECKING:
    from fedloop_server.feedback.lake.delta import LakeTable

_SETTINGS: Final[dict[str, str | bool | int | float | list[str]]] = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    # Nothing of what users wrote is spilled to a disk where nobody looks for it.
    "temp_directory": "",
}
_TYPES: Final = {
    "id": "VARCHAR",
    "text": "VARCHAR",
    "int": "BIGINT",
    "float": "DOUBLE",
    "bool": "BOOLEAN",
    "time": "TIMESTAMPTZ",
    "day": "DATE",
}


def connect(place: LakePlace) -> duckdb.DuckDBPyConnection:
    """A DuckDB that reaches the lake's files: those in S3 through fsspec, as the blob store does."""
    connection = duckdb.connect(":memory:", config=_SETTINGS)
    connection.execute("SET TimeZone = 'UTC'")
    if place.scheme:
        import fsspec

        connection.register_filesystem(fsspec.filesystem(place.scheme))
    return connection


def source(table: Table, files: Sequence[str]) -> str:
    """What stands after FROM for the rows that are in `files`."""
    columns = ", ".join(f'"{name}"' for name in table.columns)
    if not files:
        nothing = ", ".join(f'NULL::{_TYPES[kind]} AS "{name}"' for name, kind in table.columns.items())
        return f"(SELECT {nothing} WHERE false)"
    listed = ", ".join("'" + each.replace("'", "''") + "'" for each in files)
    parts = ", ".join(f"'{name}': {_TYPES[table.columns[name]]}" for name in table.divided_by)
    how = f", hive_partitioning = true, hive_types = {{{parts}}}" if parts else ", hive_partitioning = false"
    return f"(SELECT {columns} FROM read_parquet([{listed}]{how}))"


def present(
    connection: duckdb.DuckDBPyConnection,
    table: LakeTable,
    columns: Sequence[str],
    values: Sequence[tuple[str, ...]],
    files: Sequence[str],
) -> set[tuple[str, ...]]:
    """Those of `values` that the table has in its `columns`, as far as it is in `files`."""
    if not files or not values:
        return set()
    by_column = zip(columns, zip(*values, strict=True), strict=True)
    looked_up = Batch.from_pydict({name: Array(list(each), type=DataType.string()) for name, each in by_column})
    names = ", ".join(f'"{name}"' for name in columns)
    query = f"SELECT DISTINCT {names} FROM {source(table.table, files)} SEMI JOIN looked_up USING ({names})"
    with translated():
        connection.register("looked_up", looked_up)
        found = connection.execute(query).fetchall()
        connection.unregister("looked_up")
    return {tuple(each) for each in found}


@contextmanager
def translated() -> Iterator[None]:
    """DuckDB's errors as the project's; its words can quote what is in a row, and are left out."""
    try:
        yield
    except duckdb.Error as error:
        raise FedloopError("the lake cannot be read", cause=type(error).__name__, hint="sync it again") from None
