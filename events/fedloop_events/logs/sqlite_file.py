"""The file of a SQLite log: how it is opened, made, recognised and refused, and what its errors mean."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

import apsw

from fedloop_events.errors import FedloopError, LogError, UnreachableError
from fedloop_events.files import create_private, free_bytes_if_full, fsync_folder

APPLICATION_ID: Final = 0x46644C67
FORMAT: Final = 1
PAGE_BYTES: Final = 8192
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


def open_connection(path: Path, busy_timeout_s: float, *, shared: bool = True) -> apsw.Connection:
    """A connection to the log in the file, which is made if there is none: for its owner alone, and what SQLite puts beside it
    has the same mode. One that is not `shared` needs no room on the disk, writes nothing, and keeps all others out."""
    deadline = time.monotonic() + busy_timeout_s
    with suppress(OSError):  # what cannot be made cannot be opened either, and SQLite says why
        create_private(path)
    while True:
        connection = apsw.Connection(str(path))
        try:
            connection.set_busy_timeout(round(busy_timeout_s * 1000))
            if not shared:
                keep_to_itself(connection)
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


def keep_to_itself(connection: apsw.Connection) -> None:
    """Make a new connection read without files beside the database: for a disk that has no room for any."""
    connection.config(apsw.SQLITE_DBCONFIG_NO_CKPT_ON_CLOSE, 1)
    connection.execute("PRAGMA locking_mode=EXCLUSIVE")
    connection.execute("PRAGMA query_only=ON")


def _configure(path: Path, connection: apsw.Connection) -> None:
    """Set what this program relies on, make the schema in an empty file, and refuse what is not exactly a log."""
    settings = ("trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0", "synchronous=FULL", "temp_store=MEMORY")
    for setting in settings:
        connection.execute(f"PRAGMA {setting}")
    if not _schema(connection) and pragma(connection, "application_id") == 0:
        _refuse_network(path)
        connection.execute(f"PRAGMA page_size={PAGE_BYTES}")
        with transaction(connection):
            if not _schema(connection):
                connection.execute(_SCHEMA)
        fsync_folder(path.absolute().parent)
    if pragma(connection, "application_id") != APPLICATION_ID:
        raise LogError(f"{path} is a database, but no Fedloop log", hint="name the folder that `fedloop server init` made")
    version = pragma(connection, "user_version")
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


def pragma(connection: apsw.Connection, name: str) -> int:
    return int(connection.execute(f"PRAGMA {name}").get)


@contextmanager
def transaction(connection: apsw.Connection) -> Iterator[None]:
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


@contextmanager
def translated_errors(path: Path) -> Iterator[None]:
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
        raise _full(path, error) from error
    except apsw.NotADBError as error:
        raise LogError(f"{path} is no Fedloop log", cause=str(error)) from error
    except (apsw.IOError, apsw.CantOpenError, apsw.ReadOnlyError) as error:  # read-only: a log that cannot be made either
        if free_bytes_if_full(path) is not None:
            raise _full(path, error) from error
        raise _unusable(path, error) from error
    except apsw.CorruptError as error:
        raise _unusable(path, error) from error


def _full(path: Path, error: apsw.Error) -> LogError:
    free_bytes = free_bytes_if_full(path)
    free = "" if free_bytes is None else f" ({free_bytes:,} bytes are free)"
    return LogError(
        f"the disk of the log {path} is full{free}: nothing was appended", cause=str(error), hint="make room, then try again"
    )


def _unusable(path: Path, error: apsw.Error) -> LogError:
    hint = "check that the folder exists, the disk and the permissions"
    return LogError(f"the log {path} cannot be used", cause=str(error), hint=hint)
