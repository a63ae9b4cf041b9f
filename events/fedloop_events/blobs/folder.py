"""Blobs in a local folder, sharded by the first two digits: each whole or absent."""

from __future__ import annotations

import fcntl
import os
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Final

from fedloop_events.blobs.naming import BLOB_NAME, Stored, copy
from fedloop_events.errors import BlobError, UnreachableError
from fedloop_events.files import fsync_folder, new_file, reason
from fedloop_events.types import BlobRef

ORPHAN_AFTER_S: Final = 24 * 3600.0
_TEMPORARY: Final = ".tmp-"
_LOCK: Final = ".lock"


class Folder:
    """A local folder, sharded by the first two digits. Symbolic links below it are never followed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._sweep()

    def write(self, chunks: Iterable[bytes | memoryview]) -> BlobRef:
        try:
            self.root.mkdir(parents=True, exist_ok=True)  # not before: where a disk is not mounted a reader makes no folder
            with new_file(self.root, _TEMPORARY) as new:
                ref = copy(chunks, new.file)
                with self._locked(fcntl.LOCK_SH):
                    if not self._made_young(ref):
                        new.publish(self._shard(ref.sha256) / ref.sha256[2:])
        except OSError as error:
            raise self._unwritable(error) from error
        return ref

    def refresh(self, ref: BlobRef) -> bool:
        try:
            with self._locked(fcntl.LOCK_SH):
                if self._made_young(ref):
                    return True
            if self.size(ref.sha256) != ref.size_bytes:
                return False
            with self.open(ref.sha256) as file:  # another user's, in whose place comes one of our own
                return self.write(iter(partial(file.read, 1 << 20), b"")) == ref
        except FileNotFoundError:
            return False
        except OSError as error:
            raise self._unwritable(error) from error

    def remove(self, name: str, before_s: float) -> int:
        try:
            with self._locked(fcntl.LOCK_EX):
                path = self.root / name[:2] / name[2:]
                found = path.lstat()
                if found.st_mtime >= before_s:
                    return 0
                path.unlink()
                return found.st_size
        except FileNotFoundError:
            return 0
        except OSError as error:
            raise self._unwritable(error) from error

    def stored(self) -> Iterator[Stored]:
        for name in self.names():
            with suppress(FileNotFoundError):
                found = (self.root / name[:2] / name[2:]).lstat()
                yield Stored(name, found.st_size, found.st_mtime)

    def _made_young(self, ref: BlobRef) -> bool:
        try:
            with self.open(ref.sha256) as file:
                if os.fstat(file.fileno()).st_size != ref.size_bytes:
                    return False
                os.utime(file.fileno())
                return True
        except (FileNotFoundError, NotADirectoryError, PermissionError, BlobError):
            return False

    @contextmanager
    def _locked(self, how: int) -> Iterator[None]:
        """Writers together, or a sweep alone: what it finds old has nobody found there meanwhile. A crash lets go of it."""
        lock = os.open(self.root / _LOCK, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(lock, how)
            yield
        finally:
            os.close(lock)

    def _unwritable(self, error: OSError) -> UnreachableError:
        return UnreachableError(
            f"the blobs in {self.root} cannot be written",
            cause=reason(error, self.root),
            hint="check the disk's space and the permissions",
        )

    def open(self, name: str) -> IO[bytes]:
        shard = os.open(self.root / name[:2], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            file = os.open(name[2:], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=shard)
        finally:
            os.close(shard)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise BlobError(f"blob {name} is no regular file")
        return os.fdopen(file, "rb", buffering=0)

    def size(self, name: str) -> int | None:
        try:
            with self.open(name) as file:
                return os.fstat(file.fileno()).st_size
        except (OSError, BlobError):
            return None

    def names(self) -> Iterator[str]:
        for shard in self.root.iterdir() if self.root.is_dir() else ():
            if len(shard.name) == 2 and shard.is_dir():
                for path in shard.iterdir():
                    if BLOB_NAME.fullmatch(shard.name + path.name):
                        yield shard.name + path.name

    def _shard(self, name: str) -> Path:
        """The folder of a blob, which is made if it is absent."""
        shard = self.root / name[:2]
        if not shard.is_dir():
            shard.mkdir(exist_ok=True)
            fsync_folder(self.root)
        return shard

    def _sweep(self) -> None:
        """Remove what crashed writers left behind."""
        for path in self.root.glob(f"{_TEMPORARY}*"):
            with suppress(OSError):
                if path.lstat().st_mtime < time.time() - ORPHAN_AFTER_S:
                    path.unlink()
