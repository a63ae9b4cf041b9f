"""What durable files need beyond the standard library: they appear whole, and stay."""

from __future__ import annotations

import errno
import os
import shlex
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final

from fedloop_events import ids

PRIVATE: Final = 0o600
"""For its owner alone."""
SHARED: Final = 0o666
"""For whom the process's umask allows."""
_LEAST_FREE_BYTES: Final = 64 * 1024
"""With less, SQLite cannot make the 32 KiB that connections to one file share, and calls that an I/O error."""


def free_bytes(path: Path) -> int | None:
    """How many bytes are free on the disk of a file; None if nobody knows."""
    try:
        found = os.statvfs(path.absolute().parent)
    except OSError:
        return None
    return found.f_bavail * found.f_frsize


def free_bytes_if_full(path: Path) -> int | None:
    """How many bytes are free on the disk of a file that has no room to work with; None if there is room, or nobody knows."""
    free = free_bytes(path)
    return free if free is not None and free < _LEAST_FREE_BYTES else None


def is_full(error: OSError) -> bool:
    """Whether there was no room, on the disk or in its user's share of it."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def reason(error: OSError, path: Path) -> str:
    """Why a file cannot be written, in words: of a disk that is full also how much is free, and what to do."""
    if not is_full(error):
        return error.strerror or str(error)
    free = free_bytes(path)
    return f"the disk is full{'' if free is None else f' ({free:,} bytes are free)'}: make room, then try again"


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a new or renamed file is safe only after this."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class NewFile:
    """A file that is being written under a temporary name."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self.path, self.file = path, file

    def publish(self, path: Path, *, replace: bool = True) -> None:
        """Give it its name, durably; a file that has the name gives way, or (not `replace`) stays in its place."""
        self.file.flush()
        os.fsync(self.file.fileno())
        if replace:
            self.path.rename(path)
        else:
            with suppress(FileExistsError):
                os.link(self.path, path)
        fsync_folder(path.absolute().parent)


@contextmanager
def new_file(folder: Path, prefix: str, *, mode: int = SHARED) -> Iterator[NewFile]:
    """A file in `folder` under a temporary name that begins with `prefix`; it is gone after the block unless it was published."""
    path = folder / f"{prefix}{ids.new_id()}"
    try:
        with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode), "wb") as file:
            yield NewFile(path, file)
    except OSError as error:
        if error.filename is None:  # writing names no file
            error.filename = str(path)
        raise
    finally:
        with suppress(OSError):
            path.unlink(missing_ok=True)


def write_whole(path: Path, data: bytes, *, mode: int = SHARED, replace: bool = True) -> None:
    """Write a file durably, in place of one that is there (not `replace`: unless one is there); after a crash it is whole or
    absent."""
    with new_file(path.parent, f".{path.name}.", mode=mode) as new:
        new.file.write(data)
        new.publish(path, replace=replace)


def quoted(path: Path | str) -> str:
    """A path as a command line takes it."""
    return shlex.quote(str(path))


def write_folder(path: Path, files: Mapping[str, bytes | Iterable[bytes | memoryview]]) -> None:
    """Make the folder `path` of these files, durably; it appears whole or not at all, in place of an empty one at most.

    A file that is given in chunks is never in memory as a whole. Raises FileExistsError if something else is there, or another
    OSError.
    """
    folder = path.absolute()
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise FileExistsError(errno.EEXIST, "it is there already, and not empty", str(path))
    made = folder.with_name(f".{folder.name}.{ids.new_id()}")
    made.mkdir()
    try:
        for name, data in files.items():
            with (made / name).open("xb") as file:
                for chunk in (data,) if isinstance(data, bytes) else data:
                    file.write(chunk)
                file.flush()
                os.fsync(file.fileno())
        fsync_folder(made)
        made.rename(folder)  # fails if something came there meanwhile
    except BaseException:
        shutil.rmtree(made, ignore_errors=True)
        raise
    fsync_folder(folder.parent)


def write_private(path: Path, data: bytes) -> None:
    """`write_whole`, of a file that only its owner can read."""
    write_whole(path, data, mode=PRIVATE)


def create_private(path: Path) -> None:
    """An empty file that only its owner can read, unless there is a file; one that is there is not opened, for closing it would
    let go of the locks that this process holds on it."""
    with suppress(FileExistsError):
        os.close(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, PRIVATE))
