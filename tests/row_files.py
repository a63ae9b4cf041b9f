"""The same rows as files of every format that is read."""

from __future__ import annotations

import csv
import gzip
import io
import json
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Final

import duckdb

Pairs = Sequence[tuple[str, str]]


def delimited(pairs: Pairs, separator: str = ",", end: str = "\n", encoding: str = "utf-8") -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, delimiter=separator, lineterminator=end).writerows([("text", "label"), *pairs])
    return text.getvalue().encode(encoding)


def json_lines(pairs: Pairs) -> bytes:
    return "".join(f"{json.dumps({'text': text, 'label': label})}\n" for text, label in pairs).encode()


def json_array(pairs: Pairs) -> bytes:
    return json.dumps([{"label": label, "text": text} for text, label in pairs], indent=1).encode()


def parquet(pairs: Pairs) -> bytes:
    with duckdb.connect() as database:
        database.execute("CREATE TABLE pairs (text VARCHAR, label VARCHAR)")
        database.executemany("INSERT INTO pairs VALUES (?, ?)", pairs)
        return parquet_of(database, "FROM pairs")


def parquet_of(database: duckdb.DuckDBPyConnection, query: str, options: str = "COMPRESSION snappy") -> bytes:
    """What a query finds, as a Parquet file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.parquet"
        database.execute(f"COPY ({query}) TO '{path}' (FORMAT parquet, {options})")
        return path.read_bytes()


FORMATS: Final[Mapping[str, Callable[[Pairs], bytes]]] = {
    "csv": delimited,
    "csv, as Excel writes it": lambda pairs: delimited(pairs, ";", "\r\n", "utf-8-sig"),
    "tabs in UTF-16": lambda pairs: delimited(pairs, "\t", "\r\n", "utf-16"),
    "JSON Lines": json_lines,
    "JSON Lines, gzip": lambda pairs: gzip.compress(json_lines(pairs)),
    "JSON array": json_array,
    "csv, gzip": lambda pairs: gzip.compress(delimited(pairs)),
    "Parquet": parquet,
}
