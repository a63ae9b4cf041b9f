"""What is wrong with the embedded log's file, beyond its events.

The file may come from anybody, so it is opened for reading alone, checked by SQLite before it is believed, and never obeyed
(https://sqlite.org/security.html).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import apsw

from fedloop_events.envelope import Record
from fedloop_events.errors import LogError, UsageError
from fedloop_events.files import free_bytes_if_full
from fedloop_events.logs.sqlite import STREAM
from fedloop_events.logs.sqlite_file import APPLICATION_ID, FORMAT, keep_to_itself
from fedloop_events.verify.checks import LogCheck
from fedloop_events.verify.sequences import At

_COLUMNS: Final = "position, topic, id, key, source, type, time, data, signature, appended_ms"
_TYPES: Final = (int, str, bytes, str, str, str, int, bytes, str, int)


def read(path: Path, check: LogCheck) -> None:
    """Check the file and give its events to `check`.

    Raises `UsageError` if it is absent, `LogError` if it is no log or cannot be read at all.
    """
    if not path.is_file():
        raise UsageError(f"there is no log in {path.parent}", hint="name the folder that `fedloop server init` made")
    connection = _open(path)
    try:
        with connection:  # one transaction: what is appended meanwhile is for the next check
            damage = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(20)")]
            if damage != ["ok"]:
                for line in damage:
                    check.wrong(f"the database is damaged: {line}")
            _check_schema(connection, check)
            end = 0
            for row in connection.execute(f"SELECT {_COLUMNS} FROM events ORDER BY position"):
                _row(row, end, check)
                end = row[0]
    except apsw.Error as error:
        check.wrong(f"the database cannot be read on: {error}")
    finally:
        connection.close(force=True)


def _row(row: tuple[Any, ...], end: int, check: LogCheck) -> None:
    offset = row[0]
    if offset != end + 1:
        first = end + 1
        missing = f"offset {first} is" if offset == first + 1 else f"offsets {first} to {offset - 1} are"
        check.wrong(f"{missing} missing", At(STREAM, first))
    if tuple(map(type, row)) != _TYPES or len(row[2]) != 16:
        check.wrong("the row does not hold an event", At(STREAM, offset))
        return
    check.event(Record(row[1], row[3], row[2].hex(), *row[4:9], stream=STREAM, offset=offset, appended_ms=row[9]))


def _open(path: Path) -> apsw.Connection:
    try:
        try:
            connection, found = _opened(path)
        except apsw.Error:
            if free_bytes_if_full(path) is None:
                raise
            connection, found = _opened(path, shared=False)
    except apsw.Error as error:
        raise LogError(f"the log {path} cannot be opened", cause=str(error)) from None
    if found[0] != APPLICATION_ID or not 1 <= found[1] <= FORMAT:
        raise LogError(f"{path} is no Fedloop log of a format up to {FORMAT}")
    return connection


def _opened(path: Path, *, shared: bool = True) -> tuple[apsw.Connection, tuple[Any, Any]]:
    """A connection, and what the file says that it is and of which format. One that is not `shared` writes nothing either, but it
    locks, for which SQLite wants a file that it could write to."""
    flags = apsw.SQLITE_OPEN_READONLY if shared else apsw.SQLITE_OPEN_READWRITE
    connection = apsw.Connection(str(path), flags=flags)
    try:
        connection.set_busy_timeout(10_000)
        if not shared:
            keep_to_itself(connection)
        for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0", "query_only=ON"):
            connection.execute(f"PRAGMA {pragma}")
        return connection, (connection.execute("PRAGMA application_id").get, connection.execute("PRAGMA user_version").get)
    except BaseException:
        connection.close(force=True)
        raise


def _check_schema(connection: apsw.Connection, check: LogCheck) -> None:
    """Nothing may be there that computes or acts, but the two triggers that keep the log append-only. An index does neither."""
    known = {("table", "events"), ("trigger", "events_no_update"), ("trigger", "events_no_delete")}
    query = "SELECT type, name FROM sqlite_schema WHERE type != 'index'"
    found = {(str(kind), str(name)) for kind, name in connection.execute(query)}
    for kind, name in sorted(found ^ known):
        check.wrong(f"the database {'lacks the' if (kind, name) in known else 'has a foreign'} {kind} {name!r}")
    if ("table", "events") not in found:
        raise LogError("the database has no table of events")
