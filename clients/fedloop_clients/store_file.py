"""The file of a device's store: how it is opened, with room to write and without, and what its errors mean."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from fedloop_events.errors import FedloopError, UnreachableError
from fedloop_events.files import free_bytes, free_bytes_if_full
from sqlcipher3 import dbapi2

_NO_ROOM: Final = "make room, then try again: what the store holds can be read meanwhile"


class StoreError(FedloopError):
    """The store cannot be read or written: absent, damaged, of a newer version, or on a disk that fails."""


class NotWritableError(StoreError):
    """The disk is full, or its file system read-only: nothing was written, and what the store holds can still be read."""


class WrongKeyError(StoreError):
    """The key does not open the store (or the file is no store: the two look the same)."""


def connect(path: Path, key: bytes, timeout_s: float, *, alone: bool = False) -> Any:
    """A connection to the store in the file; nothing was read yet. One that is `alone` needs no room on the disk, writes nothing,
    and keeps all others out."""
    # Beside a file on a read-only file system nothing can be made; where nothing lies beside it, it is all there is.
    whole = alone and _is_read_only(path) and not path.with_name(f"{path.name}-wal").exists()
    db = dbapi2.connect(
        f"{path.absolute().as_uri()}{'?immutable=1' if whole else ''}",
        uri=True,
        isolation_level=None,
        check_same_thread=False,
        timeout=timeout_s,
    )
    try:
        db.execute("PRAGMA cipher_log_level = NONE")  # a wrong key is an exception, and nothing on standard error
        db.execute("PRAGMA cipher_memory_security = ON")
        db.execute(f"PRAGMA key = \"x'{key.hex()}'\"")
        if alone:
            db.execute("PRAGMA locking_mode = EXCLUSIVE")
            db.execute("PRAGMA query_only = ON")
    except BaseException:
        db.close()
        raise
    return db


def cannot_write(path: Path, error: BaseException | None = None) -> NotWritableError | None:
    """Why nothing can be written now, by what SQLite says and by the disk itself; None if that is not why."""
    code = _code(error)
    if code == sqlite3.SQLITE_FULL or free_bytes_if_full(path) is not None:
        free = free_bytes(path)
        known = "" if free is None else f" ({free:,} bytes are free)"
        return NotWritableError(f"the disk of the store {path} is full{known}: nothing was written", hint=_NO_ROOM)
    if _is_read_only(path):
        return NotWritableError(
            f"the store {path} is on a file system that is read-only: nothing was written",
            hint="mount it for writing, and look for why it was not: a disk that fails is often made read-only",
        )
    return None


def is_io_error(error: BaseException) -> bool:
    """Whether the file failed: after a failed sync what a connection has in memory can no longer be trusted."""
    return _code(error) == sqlite3.SQLITE_IOERR


@contextmanager
def translated(path: Path) -> Iterator[None]:
    """SQLite's errors as ours. Its messages name tables and columns, never values."""
    try:
        yield
    except dbapi2.OperationalError as error:
        if _code(error) in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
            raise UnreachableError(
                f"the store {path} is in use by another process", hint="try again; the other one may be stopped"
            ) from None
        raise cannot_write(path, error) or StoreError(f"the store {path} cannot be used", cause=str(error)) from None
    except dbapi2.IntegrityError:
        raise
    except dbapi2.DatabaseError as error:
        raise StoreError(f"the store {path} is damaged", cause=str(error), hint="restore it from a backup") from None


def _code(error: BaseException | None) -> int:
    """SQLite's primary result code; 0 for what is none of its errors."""
    code: int = getattr(error, "sqlite_errorcode", 0)
    return code & 0xFF


def _is_read_only(path: Path) -> bool:
    try:
        return bool(os.statvfs(path.absolute().parent).f_flag & os.ST_RDONLY)
    except OSError:
        return False
