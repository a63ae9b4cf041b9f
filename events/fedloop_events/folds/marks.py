"""By what a reader that comes back knows the log again: events that it has read, which must stand where they stood.

An offset alone says little: a log that was cut short, or restored from an old backup, grows past it again with other events.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Final

from msgspec import Struct

from fedloop_events import topics
from fedloop_events.envelope import Record
from fedloop_events.errors import LogChangedError
from fedloop_events.logs.port import Batch, Position, check_reaches

_HINT: Final = "restore the whole log"


class Mark(Struct, frozen=True):
    """The SHA-256 of the event that was read at `offset`. With `lasting` nothing ever takes it from this reader's sight."""

    topic: str
    offset: int
    sha256: bytes
    lasting: bool


Marks = dict[str, list[Mark]]
"""For each stream its newest event, and its newest lasting one if that is another."""


def kept_for_ever(record: Record) -> bool:
    """Whether no retention removes it."""
    declared = topics.DECLARED.get(record.topic)
    return declared is not None and declared.retention_ms == topics.KEPT


def remember(marks: Marks, records: Iterable[Record], lasting: Callable[[Record], bool] = kept_for_ever) -> None:
    """Mark what was read last: `records` are in the order of the log."""
    newest: dict[str, Record] = {}
    newest_lasting: dict[str, Record] = {}
    for record in records:
        newest[record.stream] = record
        if lasting(record):
            newest_lasting[record.stream] = record
    for stream, record in newest.items():
        stays = newest_lasting.get(stream)
        before = [each for each in marks.get(stream, []) if each.lasting] if stays is None else [_mark(stays, lasting=True)]
        marks[stream] = before if stays is record else [*before[-1:], _mark(record, lasting=False)]


def check(end: Position, read: Callable[[Position], Batch], position: Position, marks: Mapping[str, Sequence[Mark]]) -> None:
    """Raise `LogChangedError` unless the log, which ends at `end`, is the one that was read up to `position`.

    `read` gives the next event after a position. What is not lasting may have expired; something else in its place may not stand.
    """
    check_reaches(end, position)
    for stream, kept in marks.items():
        for mark in kept:
            found = _first(read, stream, Position({**end.offsets, stream: mark.offset - 1}))
            present = found is not None and found.offset == mark.offset
            if (mark.lasting and not present) or (found is not None and present and _sha256(found) != mark.sha256):
                raise LogChangedError(
                    f"event {mark.offset} of stream {stream!r} is not the one that was read there",
                    cause="the log was cut short or restored from a backup, and has grown again since, or it was replaced",
                    hint=_HINT,
                )


def _first(read: Callable[[Position], Batch], stream: str, after: Position) -> Record | None:
    """The next event of the stream."""
    while True:
        batch = read(after)
        for record in batch.records:
            if record.stream == stream:
                return record
        if not batch.records:
            return None
        after = batch.position


def _mark(record: Record, *, lasting: bool) -> Mark:
    return Mark(record.topic, record.offset, _sha256(record), lasting)


def _sha256(record: Record) -> bytes:
    """Of everything that is the event's own, and not of the place where it was read."""
    own = (record.topic, record.key, record.id, record.source, record.type, str(record.time_s), record.signature)
    digest = hashlib.sha256()
    for part in (*(each.encode() for each in own), record.data):
        digest.update(len(part).to_bytes(8, "big"))
        digest.update(part)
    return digest.digest()
