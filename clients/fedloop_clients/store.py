"""The device's encrypted store: one SQLCipher file that holds everything the device knows and the log must not.

A process may open it while another one has it open: writes take turns (`BEGIN IMMEDIATE`) and wait for a bounded time. What was
committed survives the loss of power; what was deleted is overwritten. Opening a store of an older version makes it one of the
newest (`migrations.py`).
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from fedloop_events.files import reason
from sqlcipher3 import dbapi2

from fedloop_clients.migrations import STEPS
from fedloop_clients.store_file import StoreError, WrongKeyError, cannot_write, connect, is_io_error, translated

FILE_NAME: Final = "store.db"
BUSY_TIMEOUT_S: Final = 10.0
"""How long one process waits for another one's transaction: ours take milliseconds, a migration seconds."""


class Store:
    """One open store; safe to share between threads.

    Raises `UnreachableError` from any method if another process holds the store for longer than `BUSY_TIMEOUT_S` (the call can
    be made again), `StoreError` if the file or the disk fails. On a disk that is full or read-only what writes raises
    `NotWritableError` and changes nothing; what reads goes on, also in a process that opens the store then, and what writes as
    soon as there is room.
    """

    def __init__(self, path: Path, key: bytes) -> None:
        self.path = path
        self._key = key
        self._db: Any = None
        """The connection that reads and writes; None while there was no room on the disk to open one."""
        self._lock = threading.RLock()
        self._depth = self._opened = 0
        self._closed = False

    @classmethod
    def create(cls, path: Path, key: bytes) -> Store:
        """A new store (file mode 0600), or the one that is there already. Raises `StoreError`."""
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise StoreError(f"the store {path} cannot be created", cause=reason(error, path)) from None
        store = cls(path, key)
        with translated(path):
            store._db = store._connected(may_create=True)
        return store

    @classmethod
    def open(cls, path: Path, key: bytes) -> Store:
        """The store at `path`. Raises `StoreError`, `WrongKeyError`; never makes a new one."""
        if not path.is_file():
            raise StoreError(f"there is no store at {path}", hint="enrol this device first")
        store = cls(path, key)
        with store._reading():
            pass
        return store

    def _connected(self, *, may_create: bool = False) -> Any:
        """A connection that reads and writes the newest version."""
        db = connect(self.path, self._key, BUSY_TIMEOUT_S)
        try:
            self._check_key(db)
            # synchronous is set, not inherited: NORMAL would lose commits when power fails.
            for pragma in (
                "journal_mode = WAL",
                "synchronous = FULL",
                "secure_delete = ON",
                "foreign_keys = ON",
                "trusted_schema = OFF",
            ):
                db.execute(f"PRAGMA {pragma}")
            while self._version(db, may_create=may_create) < len(STEPS):
                self._migrate(db)
        except BaseException:
            db.close()
            raise
        self._opened += 1
        return db

    def _check_key(self, db: Any) -> None:
        try:
            db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except dbapi2.OperationalError:
            raise
        except dbapi2.DatabaseError:
            raise WrongKeyError(f"the key does not open {self.path}", hint="restore the key and the store together") from None

    def _version(self, db: Any, *, may_create: bool) -> int:
        version: int = db.execute("PRAGMA user_version").fetchone()[0]
        if version == 0 and not may_create:
            raise StoreError(f"{self.path} was never finished", hint="enrol this device again, with the same store")
        if version > len(STEPS):
            raise StoreError(
                f"{self.path} is a store of version {version}; this program knows versions up to {len(STEPS)}",
                hint="upgrade this program",
            )
        return version

    def _migrate(self, db: Any) -> None:
        """Take the store one version on, wholly or not at all, unless another process does."""
        with _transaction(db):
            version = db.execute("PRAGMA user_version").fetchone()[0]
            if version < len(STEPS):
                STEPS[version](db)
                db.execute(f"PRAGMA user_version = {version + 1}")

    def _writable(self) -> Any:
        """The connection that reads and writes, opened unless it is. Raises what opening raises."""
        if self._closed:
            raise StoreError(f"the store {self.path} is closed")
        if self._db is None:
            self._db = self._connected()
        return self._db

    @contextmanager
    def _reading(self) -> Iterator[Any]:
        """The connection, or one that needs no room, for this once: others come to read too, and write once there is room."""
        with self._lock, translated(self.path):
            try:
                self._writable()
            except dbapi2.OperationalError as error:
                if cannot_write(self.path, error) is None:
                    raise
            if self._db is not None:
                yield self._db
                return
            alone = connect(self.path, self._key, BUSY_TIMEOUT_S, alone=True)
            try:
                self._check_key(alone)
                if self._version(alone, may_create=False) < len(STEPS):
                    raise cannot_write(self.path) or StoreError(f"the store {self.path} is of an older version")
                self._opened += 1
                yield alone
            finally:
                alone.close()

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        """A write transaction that is durable when it is left, or undone by an exception; one inside another joins it."""
        with self._lock, translated(self.path):
            db = self._writable()
            if self._depth:
                yield db
                return
            self._depth = 1
            try:
                with _transaction(db):
                    yield db
            except BaseException as error:
                if is_io_error(error):
                    db.close()
                    self._db = None
                raise
            finally:
                self._depth = 0

    def rows(self, query: str, arguments: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """What a SELECT finds."""
        with self._reading() as db:
            found: list[tuple[Any, ...]] = db.execute(query, arguments).fetchall()
        return found

    def changes(self) -> tuple[int, int, int]:
        """Another value once anybody has changed anything in the store."""
        with self._reading() as db:
            return self._opened, db.total_changes, db.execute("PRAGMA data_version").fetchone()[0]

    def keep(self, name: str, value: bytes) -> None:
        """Put a value under a name, in place of an earlier one."""
        with self.transaction() as db:
            db.execute("INSERT INTO kept VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (name, value))

    def kept(self, name: str) -> bytes | None:
        """The value under a name."""
        found = self.rows("SELECT value FROM kept WHERE name = ?", (name,))
        return bytes(found[0][0]) if found else None

    def check_writable(self) -> None:
        """Raise `NotWritableError` if there is no room to write: for who is about to do what cannot be done twice."""
        if (error := cannot_write(self.path)) is not None:
            raise error

    def close(self) -> None:
        """Let go of the file; nothing is lost."""
        with self._lock:
            self._closed = True
            if self._db is not None:
                self._db.close()
                self._db = None


@contextmanager
def _transaction(db: Any) -> Iterator[None]:
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        if db.in_transaction:
            db.execute("ROLLBACK")
        raise
