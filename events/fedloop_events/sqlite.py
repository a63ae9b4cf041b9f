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
from pathlib import Path
from typing import Final

import apsw

from fedloop_events import topics as all_topics
from fedloop_events.envelope import MAX_EVENT_BYTES, Event, Record
from fedloop_events.errors import FedloopError, InvalidEventError, LogError, UnreachableError
from fedloop_events.log import START, Batch, Position

STREAM: Final = "log"
APPLICATION_ID: Final = 0x46644C67
FORMAT: Final = 1
PAGE_BYTES: Final = 8192
_LONGEST_PAUSE_S: Final = 0.02
_NETWORK_FILE_SYSTEMS: Final = frozenset({"nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "ceph", "fuse.sshfs"})

# Feedback is most of a log: its events are found by scanning, and pay for no index but the one of their ids.
_SCHEMA: Final = f"""
CREATE TABLE events (
    position INTEGER PRIMARY KEY,
    topic TEXT NOT NULL,
    id BLOB NOT NULL UNIQUE CHECK (length(id) = 16),
    key TEXT NOT NULL,
    source TEXT NOT NULL,
    type TEXT NOT NULL,
    time INTEGER NOT NULL,
    data BLOB NOT NULL,
    signature TEXT NOT NULL,
    appended_ms INTEGER NOT NULL
) STRICT;
CREATE INDEX events_sparse ON events (topic) WHERE topic <> 'feedback';
CREATE TRIGGER events_no_update BEFORE UPDATE ON events BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
CREATE TRIGGER events_no_delete BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'the log is append-only'); END;
PRAGMA application_id = {APPLICATION_ID};
PRAGMA user_version = {FORMAT};
"""
_COLUMNS: Final = "topic, key, id, source, type, time, data, signature, position, appended_ms"
_INSERT: Final = """
INSERT INTO events (topic, key, id, source, type, time, data, signature, appended_ms) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)
ON CONFLICT (id) DO NOTHING
"""


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
        with self._writing() as connection, _transaction(connection):
            connection.executemany(_INSERT, rows)
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

        Raises `LogError` for a damaged file or a missing row. Whether each event is what its author said is for a reader with
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
        with handle.read_lock, _errors(self.path):
            if handle.reader is None:
                handle.reader = _open(self.path, self._busy_timeout_s)
            yield handle.reader

    @contextmanager
    def _writing(self) -> Iterator[apsw.Connection]:
        handle = self._here()
        with handle.write_lock, _errors(self.path):
            if handle.writer is None:
                handle.writer = _open(self.path, self._busy_timeout_s)
            try:
                yield handle.writer
            except apsw.IOError:
                # After a failed fsync the page cache can no longer be trusted: start again from the file.
                handle.writer.close(force=True)
                handle.writer = None
                raise


def _row(event: Event, appended_ms: int) -> tuple[str, str, bytes, str, str, int, bytes, str, int]:
    try:
        identifier = bytes.fromhex(event.id)
    except ValueError:
        identifier = b""
    if len(identifier) != 16 or identifier.hex() != event.id:
        raise InvalidEventError("an event id is not 32 lower-case hexadecimal digits", hint="use fedloop_events.ids")
    if event.topic not in all_topics.ALL:
        raise InvalidEventError(f"event {event.id} is for a topic that does not exist")
    if not 0 < len(event.data) <= MAX_EVENT_BYTES:
        raise InvalidEventError(f"event {event.id} has {len(event.data):,} bytes of data; 1 to {MAX_EVENT_BYTES:,} can be held")
    return (
        event.topic,
        event.key,
        identifier,
        event.source,
        event.type,
        event.time_s,
        event.data,
        event.signature,
        appended_ms,
    )


def _select(connection: apsw.Connection, topics: Collection[str], after: int, limit: int) -> tuple[list[Record], int]:
    """The next events, and the offset up to which `topics` have been read with them."""
    known = [topic for topic in all_topics.ALL if topic in topics]
    with connection:
        end = _end(connection)
        if not known or after >= end:
            return [], max(after, end)
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
    return _pragma(connection, "data_version")


def _open(path: Path, busy_timeout_s: float) -> apsw.Connection:
    deadline = time.monotonic() + busy_timeout_s
    while True:
        connection = apsw.Connection(str(path))
        try:
            connection.set_busy_timeout(round(busy_timeout_s * 1000))
            _configure(path, connection)
            return connection
        except apsw.BusyError:
            # SQLite does not wait while another process switches the file to WAL or recovers it.
            connection.close(force=True)
            if time.monotonic() > deadline:
                raise
            time.sleep(0.005)
        except BaseException:
            connection.close(force=True)
            raise


def _configure(path: Path, connection: apsw.Connection) -> None:
    """Set what this program relies on, make the schema in an empty file, and refuse what is not exactly a log."""
    settings = ("trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0", "synchronous=FULL", "temp_store=MEMORY")
    for setting in settings:
        connection.execute(f"PRAGMA {setting}")
    if not _schema(connection) and _pragma(connection, "application_id") == 0:
        _refuse_network(path)
        connection.execute(f"PRAGMA page_size={PAGE_BYTES}")
        with _transaction(connection):
            if not _schema(connection):
                connection.execute(_SCHEMA)
        _fsync_folder(path.absolute().parent)
    if _pragma(connection, "application_id") != APPLICATION_ID:
        raise LogError(f"{path} is a database, but no Fedloop log", hint="name the folder that `fedloop server init` made")
    version = _pragma(connection, "user_version")
    if version > FORMAT:
        raise LogError(
            f"{path} has log format {version}; this program knows formats up to {FORMAT}", hint="install a newer fedloop"
        )
    pristine = apsw.Connection(":memory:")
    pristine.execute(_SCHEMA)
    if _schema(connection) != _schema(pristine):
        raise LogError(f"the log {path} has been altered: it has other tables, indexes or triggers than a log has")
    connection.execute("PRAGMA journal_mode=WAL")


def _schema(connection: apsw.Connection) -> list[tuple[str, str]]:
    return [(str(name), str(sql)) for name, sql in connection.execute("SELECT name, sql FROM sqlite_schema ORDER BY name")]


def _pragma(connection: apsw.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").get)


@contextmanager
def _transaction(connection: apsw.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


def _refuse_network(path: Path) -> None:
    """Raise `LogError` where file locks and shared memory do not hold between machines (Linux only: elsewhere nobody says)."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8", errors="surrogateescape")
    except OSError:
        return
    folder, best, kind = path.resolve().parent, "", ""
    for line in mounts.splitlines():
        fields, _, rest = line.partition(" - ")
        point = fields.split()[4].replace("\\040", " ")
        if folder.is_relative_to(point) and len(point) >= len(best):
            best, kind = point, rest.split()[0]
    if kind in _NETWORK_FILE_SYSTEMS:
        raise LogError(f"the log {path} would lie on a network share ({kind})", hint="keep it on a local disk")


def _fsync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except FedloopError:
        raise
    except (apsw.BusyError, apsw.LockedError) as error:
        raise UnreachableError(
            f"the log {path} stayed locked by another process",
            cause=str(error),
            hint="try again; the same call is safe to repeat",
        ) from error
    except apsw.FullError as error:
        raise LogError(
            f"the disk of the log {path} is full: nothing was appended", cause=str(error), hint="make room, then try again"
        ) from error
    except apsw.NotADBError as error:
        raise LogError(f"{path} is no Fedloop log", cause=str(error)) from error
    except (apsw.IOError, apsw.CorruptError, apsw.CantOpenError, apsw.ReadOnlyError) as error:
        raise LogError(
            f"the log {path} cannot be used", cause=str(error), hint="check that the folder exists, the disk and the permissions"
        ) from error
