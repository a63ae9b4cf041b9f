"""The embedded `EventLog`: one SQLite file, many processes, no server.

Through `apsw`, whose own SQLite has the fix for the WAL-reset race (sqlite.org/wal.html#walresetbug) that Python's may lack.
Offsets are dense from 1: a hole is evidence that somebody deleted a row.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Final

import apsw

from fedloop_events import envelope
from fedloop_events import topics as all_topics
from fedloop_events.envelope import Event, Record
from fedloop_events.errors import LogError
from fedloop_events.files import free_bytes_if_full
from fedloop_events.logs.port import START, Batch, Position, check_reaches
from fedloop_events.logs.sqlite_file import open_connection, pragma, transaction, translated_errors

STREAM: Final = "log"
_LONGEST_PAUSE_S: Final = 0.02

_COLUMNS: Final = "topic, key, id, source, type, time, data, signature, position, appended_ms"
_ROWS_AT_ONCE: Final = 50
"""One statement for many rows saves a tenth of an append."""
_VALUES: Final = "(?, ?, ?, ?, ?, ?, ?, ?, ?)"
_INSERT: Final = (
    "INSERT INTO events (topic, key, id, source, type, time, data, signature, appended_ms) VALUES {} ON CONFLICT (id) DO NOTHING"
)
_INSERT_ONE: Final = _INSERT.format(_VALUES)
_INSERT_MANY: Final = _INSERT.format(", ".join([_VALUES] * _ROWS_AT_ONCE))

_Row = tuple[str, str, bytes, str, str, int, bytes, str, int]


class _Handle:
    """One process's connections. A forked child must not touch its parent's, not even to close them."""

    def __init__(self) -> None:
        self.pid = os.getpid()
        self.write_lock, self.read_lock = threading.Lock(), threading.Lock()
        self.appended = threading.Condition()
        self.writer: apsw.Connection | None = None
        self.reader: apsw.Connection | None = None


_inherited: list[_Handle] = []


class SqliteLog:
    """An `EventLog` in the file `path`, which is made if it is absent.

    Safe to share between threads; a forked child opens the file anew. Raises `LogError` if the file is something else or of a
    newer format, `UnreachableError` if it stays locked for `busy_timeout_s`.
    """

    def __init__(self, path: Path | str, *, busy_timeout_s: float = 10.0) -> None:
        self.path = Path(path)
        self._busy_timeout_s = busy_timeout_s
        self._handle = _Handle()
        self._closed = False
        with self._reading():
            pass

    def append(self, events: Sequence[Event]) -> None:
        """See `EventLog.append`. Raises `LogError` if the disk is full or fails: nothing is appended, and readers go on."""
        appended_ms = time.time_ns() // 1_000_000
        rows = [_row(event, appended_ms) for event in events]
        if not rows:
            return
        with self._writing() as connection, transaction(connection):
            _insert(connection, rows)
        appended = self._handle.appended
        with appended:
            appended.notify_all()

    def read(
        self, topics: Collection[str] = all_topics.ALL, after: Position = START, *, limit: int = 1000, wait_s: float = 0.0
    ) -> Batch:
        """See `EventLog.read`."""
        deadline = time.monotonic() + wait_s
        offset = after.offsets.get(STREAM, 0)
        while True:
            with self._reading() as connection:
                # Read before the events: what is appended after them changes it, and so is never waited for in vain.
                version = _data_version(connection)
                records, offset = _select(connection, topics, offset, limit)
            if records or not self._wait(version, deadline):
                return Batch(records, Position({STREAM: offset}))

    def end(self) -> Position:
        with self._reading() as connection:
            return Position({STREAM: _end(connection)})

    def check(self) -> int:
        """The number of events, after SQLite's integrity check and a look for holes: offsets are dense from 1.

        Raises `LogError` for a damaged file or a missing row. Whether each event is authentic is for a reader with
        identities to find.
        """
        with self._reading() as connection:
            found = connection.execute("PRAGMA integrity_check(1)").get
            count, end = connection.execute("SELECT count(*), coalesce(max(position), 0) FROM events").get
            if found != "ok":
                raise LogError(f"the log {self.path} is damaged", cause=str(found), hint="restore it from a copy")
            if count != end:
                raise LogError(f"the log {self.path} lacks {end - count:,} of its {end:,} events", hint="restore it from a copy")
        return int(count)

    def close(self) -> None:
        self._closed = True
        handle = self._handle
        if handle.pid == os.getpid():
            with handle.write_lock, handle.read_lock:
                for connection in (handle.reader, handle.writer):
                    if connection is not None:
                        connection.close()
                handle.reader = handle.writer = None

    def _wait(self, version: int, deadline: float) -> bool:
        """Whether the file has changed since `version`, before `deadline`."""
        pause_s = 0.001
        while True:
            left_s = deadline - time.monotonic()
            if left_s <= 0:
                return False
            # Looking while holding the condition: an append of this process comes before the look, or wakes the wait.
            with self._handle.appended:
                with self._reading() as connection:
                    if _data_version(connection) != version:
                        return True
                self._handle.appended.wait(min(pause_s, left_s))
            pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)

    def _here(self) -> _Handle:
        if self._closed:
            raise LogError(f"the log {self.path} is closed")
        if self._handle.pid != os.getpid():
            _inherited.append(self._handle)
            self._handle = _Handle()
        return self._handle

    @contextmanager
    def _reading(self) -> Iterator[apsw.Connection]:
        handle = self._here()
        with handle.read_lock, translated_errors(self.path):
            try:
                if handle.reader is None:
                    handle.reader = open_connection(self.path, self._busy_timeout_s)
            except (apsw.IOError, apsw.FullError, apsw.CantOpenError):
                if free_bytes_if_full(self.path) is None:
                    raise
            if handle.reader is not None:
                yield handle.reader
                return
            # For this once, so that others come to read too, and a writer as soon as there is room again.
            alone = open_connection(self.path, self._busy_timeout_s, shared=False)
            try:
                yield alone
            finally:
                alone.close(force=True)

    @contextmanager
    def _writing(self) -> Iterator[apsw.Connection]:
        handle = self._here()
        with handle.write_lock, translated_errors(self.path):
            if handle.writer is None:
                handle.writer = open_connection(self.path, self._busy_timeout_s)
            try:
                yield handle.writer
            except apsw.IOError:
                # After a failed fsync the page cache can no longer be trusted: start again from the file.
                handle.writer.close(force=True)
                handle.writer = None
                raise


def _row(event: Event, appended_ms: int) -> _Row:
    envelope.check(event)
    return (
        event.topic,
        event.key,
        bytes.fromhex(event.id),
        event.source,
        event.type,
        event.time_s,
        event.data,
        event.signature,
        appended_ms,
    )


def _insert(connection: apsw.Connection, rows: list[_Row]) -> None:
    whole = len(rows) - len(rows) % _ROWS_AT_ONCE
    for start in range(0, whole, _ROWS_AT_ONCE):
        connection.execute(_INSERT_MANY, tuple(chain.from_iterable(rows[start : start + _ROWS_AT_ONCE])))
    connection.executemany(_INSERT_ONE, rows[whole:])


def _select(connection: apsw.Connection, topics: Collection[str], after: int, limit: int) -> tuple[list[Record], int]:
    """The next events, and the offset up to which `topics` have been read with them."""
    known = [topic for topic in all_topics.ALL if topic in topics]
    with connection:
        end = _end(connection)
        check_reaches(Position({STREAM: end}), Position({STREAM: after}))
        if not known or after == end:
            return [], end
        records = [
            Record(topic, key, uuid.hex(), source, kind, at, data, signature, stream=STREAM, offset=position, appended_ms=ms)
            for topic, key, uuid, source, kind, at, data, signature, position, ms in connection.execute(
                _query(known), (after, limit)
            )
        ]
    return records, records[-1].offset if len(records) == limit else end


def _query(topics: Sequence[str]) -> str:
    if len(topics) == len(all_topics.ALL):
        return f"SELECT {_COLUMNS} FROM events WHERE position > ?1 ORDER BY position LIMIT ?2"
    names = ", ".join(f"'{topic}'" for topic in topics)
    if all_topics.FEEDBACK in topics:
        return f"SELECT {_COLUMNS} FROM events WHERE position > ?1 AND topic IN ({names}) ORDER BY position LIMIT ?2"
    # One walk through the index for each topic, merged as they go; `topic <> 'feedback'` tells SQLite that the index will do.
    walk = f"SELECT {_COLUMNS} FROM events INDEXED BY events_sparse WHERE topic <> 'feedback' AND position > ?1 AND topic = "
    return " UNION ALL ".join(f"{walk}'{topic}'" for topic in topics) + " ORDER BY position LIMIT ?2"


def _end(connection: apsw.Connection) -> int:
    return int(connection.execute("SELECT coalesce(max(position), 0) FROM events").get)


def _data_version(connection: apsw.Connection) -> int:
    return pragma(connection, "data_version")
