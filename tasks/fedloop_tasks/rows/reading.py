"""Opens a file of rows as what it is, whatever its name says."""

from __future__ import annotations

from pathlib import Path

from fedloop_tasks.rows.content import text_of
from fedloop_tasks.rows.delimited import DelimitedRows
from fedloop_tasks.rows.json_objects import LOOKS_SO, ObjectRows
from fedloop_tasks.rows.parquet import ParquetRows
from fedloop_tasks.rows.rows import Rows


def rows_of(path: Path) -> Rows:
    """The rows of the file at `path`: Parquet, or, compressed with gzip or not, JSON Lines, a JSON array or CSV.

    Raises `UsageError` for anything else, with what it is.
    """
    text = text_of(path)
    if text is None:
        return ParquetRows(path)
    return ObjectRows(path, text) if LOOKS_SO.match(text) else DelimitedRows(path, text)
