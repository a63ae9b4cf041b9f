"""Parquet, read by DuckDB, the extra `fedloop[parquet]`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from fedloop_events.errors import UsageError

from fedloop_tasks.rows.rows import MAX_FILE_BYTES, Row

if TYPE_CHECKING:
    from duckdb import DuckDBPyConnection

_BATCH_ROWS: Final = 1000
_SETTINGS: Final[dict[str, str | bool | int | float | list[str]]] = {
    "autoinstall_known_extensions": False,
    "autoload_known_extensions": False,
    # Nothing of what users wrote is spilled to a disk unencrypted.
    "temp_directory": "",
    "memory_limit": "512MB",
    "threads": 1,
}
_FROM: Final = "FROM read_parquet(?, hive_partitioning=false)"


class ParquetRows:
    """See `Rows`. Only the columns that are asked for are read, a batch at a time."""

    unit: Literal["row"] = "row"

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            import duckdb
        except ImportError:
            raise UsageError(
                f"{path} is a Parquet file, and what reads those is not installed",
                hint="pip install 'fedloop[parquet]', or save it as CSV in UTF-8 or as JSON Lines",
            ) from None
        self._error = duckdb.Error
        self._connection: DuckDBPyConnection = duckdb.connect(":memory:", config=_SETTINGS)
        self.heads = [str(name) for (name,) in self._rows(f"SELECT column_name FROM (DESCRIBE SELECT * {_FROM})")]

    def cells(self, wanted: Sequence[int]) -> Iterator[Row]:
        names = ", ".join('"' + self.heads[at].replace('"', '""') + '"' for at in wanted)
        size = 0
        for number, cells in enumerate(self._rows(f"SELECT {names} {_FROM}"), 1):
            size += sum(len(each) for each in cells if isinstance(each, str | bytes))
            if size > MAX_FILE_BYTES:
                raise UsageError(f"{self._path} unpacks to more than {MAX_FILE_BYTES:,} characters", hint="divide it")
            yield Row(number, cells)

    def _rows(self, query: str) -> Iterator[tuple[object, ...]]:
        try:
            result = self._connection.execute(query, [str(self._path.absolute())])
            while rows := result.fetchmany(_BATCH_ROWS):
                yield from rows
        except self._error:
            # DuckDB's own words quote the values that it cannot read.
            raise UsageError(
                f"{self._path} is a Parquet file that cannot be read", hint="is it cut off or damaged? copy it again"
            ) from None
