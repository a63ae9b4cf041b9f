"""What durable files need beyond the standard library."""

from __future__ import annotations

import os
from pathlib import Path

from fedloop_events import ids


def fsync_folder(folder: Path) -> None:
    """Make the names in `folder` durable: a new or renamed file is safe only after this."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_private(path: Path, data: bytes) -> None:
    """Write a file that only its owner can read (0600), in place of one that is there; after a crash it is whole or absent."""
    temporary = path.with_name(f".{path.name}.{ids.new_id()}")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    fsync_folder(path.absolute().parent)
