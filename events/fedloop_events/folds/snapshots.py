"""Snapshots of folds: a saving of time, never a source of truth."""

from __future__ import annotations

import hashlib
import logging
import os
import tempfile
from pathlib import Path

import msgspec
from msgspec import Struct

from fedloop_events.files import fsync_folder
from fedloop_events.logs.port import Position

_logger = logging.getLogger(__name__)


class _Snapshot(Struct, frozen=True, forbid_unknown_fields=True):
    version: int
    offsets: dict[str, int]
    state: bytes


class Snapshots:
    """Snapshots of one fold in one file. A file that is damaged or of another version counts as absent."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def load(self, version: int) -> tuple[Position, bytes] | None:
        """The position and state last saved under `version`, or None."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _logger.warning("the snapshot %s cannot be read (%s): it is rebuilt from the log", self.path, error.strerror)
            return None
        try:
            if hashlib.sha256(data[32:]).digest() != data[:32]:
                raise ValueError("checksum")
            snapshot = msgspec.msgpack.decode(data[32:], type=_Snapshot)
        except (ValueError, msgspec.MsgspecError):
            _logger.warning("the snapshot %s is damaged: it is rebuilt from the log", self.path)
            return None
        if snapshot.version != version:
            _logger.warning("the snapshot %s is of version %d: it is rebuilt from the log", self.path, snapshot.version)
            return None
        return Position(snapshot.offsets), snapshot.state

    def save(self, version: int, position: Position, state: bytes) -> None:
        """Replace the file, whole or not at all. A snapshot is only ever a saving of time: a failure is no error."""
        data = msgspec.msgpack.encode(_Snapshot(version, dict(position.offsets), state))
        temporary = ""
        try:
            with tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=".tmp-", delete=False) as file:
                temporary = file.name
                file.write(hashlib.sha256(data).digest() + data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)  # noqa: PTH105
            fsync_folder(self.path.parent)
        except OSError as error:
            _logger.warning("the snapshot %s cannot be written (%s)", self.path, error.strerror)
            if temporary:
                Path(temporary).unlink(missing_ok=True)
