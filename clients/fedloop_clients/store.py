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

from fedloop_events.errors import FedloopError, UnreachableError
from sqlcipher3 import dbapi2

from fedloop_clients.migrations import STEPS

FILE_NAME: Final = "store.db"
BUSY_TIMEOUT_S: Final = 10.0
"""How long one process waits for another one's transaction: ours take milliseconds, a migration seconds."""


class StoreError(FedloopError):
    """The store cannot be read or written: absent, damaged, of a newer version, or the disk is full."""


class WrongKeyError(StoreError):
    """The key does not open the store (or the file is no store: the two look the same)."""


class Store:
    """One open store; safe to share between threads.

    Raises `UnreachableError` from any method if another process holds the store for longer than `BUSY_TIMEOUT_S` (the call can
    be made again), `StoreError` if the file or the disk fails.
    """

    def __init__(self, path: Path, connection: Any) -> None:
        self.path = path
        self._db = connection
        self._lock = threading.RLock()
        self._depth = 0

    @classmethod
    def create(cls, path: Path, key: bytes) -> Store:
        """A new store (file mode 0600), or the one that is there already. Raises `StoreError`."""
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
        except OSError as error:
            raise StoreError(f"the store {path} cannot be created", cause=error.strerror or "") from None
        return cls._connect(path, key, may_create=True)

    @classmethod
    def open(cls, path: Path, key: bytes) -> Store:
        """The store at `path`. Raises `StoreError`, `WrongKeyError`; never makes a new one."""
        if not path.is_file():
            raise StoreError(f"there is no store at {path}", hint="enrol this device first")
        return cls._connect(path, key, may_create=False)

    @classmethod
    def _connect(cls, path: Path, key: bytes, *, may_create: bool) -> Store:
        with _translated(path):
            db = dbapi2.connect(str(path), isolation_level=None, check_same_thread=False, timeout=BUSY_TIMEOUT_S)
            try:
                db.execute("PRAGMA cipher_log_level = NONE")  # a wrong key is an exception, and nothing on standard error
                db.execute("PRAGMA cipher_memory_security = ON")
                db.execute(f"PRAGMA key = \"x'{key.hex()}'\"")
                store = cls(path, db)
                store._prepare(may_create=may_create)
            except BaseException:
                db.close()
                raise
        return store

    def _prepare(self, *, may_create: bool) -> None:
        try:
            self._db.execute("SELECT count(*) FROM sqlite_master").fetchone()
        except dbapi2.OperationalError:
            raise
        except dbapi2.DatabaseError:
            raise WrongKeyError(f"the key does not open {self.path}", hint="restore the key and the store together") from None
        # synchronous is set, not inherited: NORMAL would lose commits when power fails.
        for pragma in (
            "journal_mode = WAL",
            "synchronous = FULL",
            "secure_delete = ON",
            "foreign_keys = ON",
            "trusted_schema = OFF",
        ):
            self._db.execute(f"PRAGMA {pragma}")
        while self._migrate(may_create=may_create):
            pass

    def _migrate(self, *, may_create: bool) -> bool:
        """Take the store one version on, wholly or not at all; whether it was not of the newest."""
        with self.transaction() as db:
            version: int = db.execute("PRAGMA user_version").fetchone()[0]
            if version == 0 and not may_create:
                raise StoreError(f"{self.path} was never finished", hint="enrol this device again, with the same store")
            if version > len(STEPS):
                raise StoreError(
                    f"{self.path} is a store of version {version}; this program knows versions up to {len(STEPS)}",
                    hint="upgrade this program",
                )
            if version < len(STEPS):
                STEPS[version](db)
                db.execute(f"PRAGMA user_version = {version + 1}")
        return version < len(STEPS)

    @contextmanager
    def transaction(self) -> Iterator[Any]:
        """A write transaction that is durable when it is left, or undone by an exception; one inside another joins it."""
        with self._lock, _translated(self.path):
            if self._depth == 0:
                self._db.execute("BEGIN IMMEDIATE")
            self._depth += 1
            try:
                yield self._db
                if self._depth == 1:
                    self._db.execute("COMMIT")
            except BaseException:
                if self._depth == 1 and self._db.in_transaction:
                    self._db.execute("ROLLBACK")
                raise
            finally:
                self._depth -= 1

    def rows(self, query: str, arguments: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """What a SELECT finds."""
        with self._lock, _translated(self.path):
            found: list[tuple[Any, ...]] = self._db.execute(query, arguments).fetchall()
        return found

    def changes(self) -> tuple[int, int]:
        """Another value once anybody has changed anything in the store."""
        with self._lock, _translated(self.path):
            return self._db.total_changes, self._db.execute("PRAGMA data_version").fetchone()[0]

    def keep(self, name: str, value: bytes) -> None:
        """Put a value under a name, in place of an earlier one."""
        with self.transaction() as db:
            db.execute("INSERT INTO kept VALUES (?, ?) ON CONFLICT (name) DO UPDATE SET value = excluded.value", (name, value))

    def kept(self, name: str) -> bytes | None:
        """The value under a name."""
        found = self.rows("SELECT value FROM kept WHERE name = ?", (name,))
        return bytes(found[0][0]) if found else None

    def close(self) -> None:
        """Let go of the file; nothing is lost."""
        with self._lock:
            self._db.close()


@contextmanager
def _translated(path: Path) -> Iterator[None]:
    """SQLite's errors as ours. Its messages name tables and columns, never values."""
    try:
        yield
    except dbapi2.OperationalError as error:
        if "locked" in str(error) or "busy" in str(error):
            raise UnreachableError(
                f"the store {path} is in use by another process", hint="try again; the other one may be stopped"
            ) from None
        raise StoreError(f"the store {path} cannot be used", cause=str(error)) from None
    except dbapi2.IntegrityError:
        raise
    except dbapi2.DatabaseError as error:
        raise StoreError(f"the store {path} is damaged", cause=str(error), hint="restore it from a backup") from None
