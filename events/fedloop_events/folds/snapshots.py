"""Snapshots of folds: a saving of time, never a source of truth."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import msgspec
from msgspec import Struct

from fedloop_events.files import PRIVATE, reason, write_whole
from fedloop_events.folds.admit import Standing
from fedloop_events.folds.marks import Marks
from fedloop_events.logs.port import Position

_logger = logging.getLogger(__name__)


class Snapshot(Struct, frozen=True, forbid_unknown_fields=True):
    """The state of a fold, and of what admits events to it, at one position of the log, which `marks` know again.

    One that was kept before there were marks has none.
    """

    version: int
    offsets: dict[str, int]
    state: bytes
    standing: Standing
    marks: Marks = {}

    @property
    def position(self) -> Position:
        return Position(self.offsets)


class Snapshots:
    """Snapshots of one fold in one file. A file that is damaged or of another version counts as absent."""

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)

    def load(self, version: int) -> Snapshot | None:
        """What was last saved under `version`, or None."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            _logger.warning(
                "the snapshot %s cannot be read (%s): it is rebuilt from the log", self.path, reason(error, self.path)
            )
            return None
        try:
            if hashlib.sha256(data[32:]).digest() != data[:32]:
                raise ValueError("checksum")
            snapshot = msgspec.msgpack.decode(data[32:], type=Snapshot)
        except (ValueError, msgspec.MsgspecError):
            _logger.warning("the snapshot %s is damaged: it is rebuilt from the log", self.path)
            return None
        if snapshot.version != version:
            _logger.warning("the snapshot %s is of version %d: it is rebuilt from the log", self.path, snapshot.version)
            return None
        return snapshot

    def discard(self) -> None:
        """Forget what was saved."""
        self.path.unlink(missing_ok=True)

    def save(self, version: int, position: Position, state: bytes, standing: Standing, marks: Marks) -> None:
        """Replace the file, whole or not at all. A snapshot is only ever a saving of time: a failure is no error."""
        data = msgspec.msgpack.encode(Snapshot(version, dict(position.offsets), state, standing, marks))
        try:
            write_whole(self.path, hashlib.sha256(data).digest() + data, mode=PRIVATE)
        except OSError as error:
            _logger.warning("the snapshot %s cannot be written (%s)", self.path, reason(error, self.path))
