"""Removing the blobs that no event names: what devices sent and never signed for, what a crash left behind.

Whoever appends an event that names a blob has put it shortly before (again, if it had waited), which makes it young. So what is
old, and named nowhere in a log that was read to its end, is nobody's. It is left where it is as soon as anything is in doubt.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
from fedloop_events import envelope, locations, topics, types
from fedloop_events.blobs.store import BlobStore
from fedloop_events.envelope import Record
from fedloop_events.errors import BlobError, InvalidEventError, LogError, TensorError, UsageError
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.folds.snapshots import Snapshots
from fedloop_events.locations import DeploymentLocation
from fedloop_events.logs.port import READ_AHEAD, START, EventLog
from fedloop_events.types import BlobRef
from msgspec import Struct

from fedloop_server.aggregation import releases
from fedloop_server.deployment import SERVER_FOLDER
from fedloop_server.state import IDENTITIES_FILE, STATE_FILE, ServerState

DAY_S: Final = 24 * 3600.0
_HASH: Final = re.compile(rb"(?=([0-9a-f]{64}))")


class Swept(Struct, frozen=True):
    """What a sweep found: `removed` blobs of `freed_bytes` (with `dry_run`: that it would remove), `named` and `young` ones that
    stay."""

    blobs: int
    named: int
    young: int
    removed: int
    freed_bytes: int
    dry_run: bool


def sweep(
    place: DeploymentLocation,
    log: EventLog,
    blobs: BlobStore,
    directory: Path | None,
    *,
    older_than_s: float,
    dry_run: bool = False,
    now: Callable[[], float] = time.time,
    stopped: Callable[[], bool] = lambda: False,
) -> Swept:
    """Remove each blob that no event of the log names and nobody has put for `older_than_s`; `stopped` ends it early.

    Raises `UsageError` for a log that may not be the whole one, or not that of these blobs; LogError if it cannot be read to its
    end; `LogChangedError` if it has lost what the server in `directory` has read; UnreachableError. Nothing is removed then.
    """
    if locations.scheme_of(place.log) in {"http", "https"}:
        raise UsageError("a gateway may hold back what names a blob", hint="sweep where the log itself can be read")
    if directory is not None:
        _check_read(log, directory / SERVER_FOLDER)
    before_s = now() - older_than_s
    named, made = names_in(log, stopped)
    named |= _remembered(blobs, made)
    count, old = [0, 0, 0], []
    for each in blobs.stored() if not stopped() else ():
        kind = 0 if each.sha256 in named else 1 if each.written_s >= before_s else 2
        count[kind] += 1
        if kind == 2:
            old.append(each)
    removed, freed = 0, 0
    for each in old:
        if stopped():
            break
        size = each.size_bytes if dry_run else blobs.remove(each.sha256, before_s)
        removed, freed = removed + 1, freed + size
    return Swept(sum(count), count[0], count[1], removed, freed, dry_run)


def _check_read(log: EventLog, folder: Path) -> None:
    """Raises `LogChangedError` unless it is the log that the server has read: a reader with a snapshot looks when it begins."""
    people = Reader(log, Identities(), snapshots=Snapshots(folder / IDENTITIES_FILE))
    Reader(log, ServerState(types.DEFAULT_RUN, people.fold), identities=people, snapshots=Snapshots(folder / STATE_FILE))


def _remembered(blobs: BlobStore, made: Iterable[BlobRef]) -> set[str]:
    """What the files of releases name: no event does. Of a release whose file is gone or broken nothing can be made any more."""
    found: set[str] = set()
    for ref in made:
        with suppress(BlobError, TensorError):
            if (state := releases.remembered(blobs, ref)) is not None:
                found.add(state.sha256)
    return found


def names_in(log: EventLog, stopped: Callable[[], bool] = lambda: False) -> tuple[set[str], set[BlobRef]]:
    """Whatever looks like a hash in any event, of any type and version, and whoever has signed it; and the files of releases.

    Raises as `sweep`.
    """
    found, made = set[str](), set[BlobRef]()
    end, after, begun, created = log.end(), START, set[str](), False
    while (batch := log.read(topics.ALL, after, limit=READ_AHEAD)).records and not stopped():
        for record in batch.records:
            if record.stream not in begun and record.offset > 1:
                raise UsageError(
                    f"the log does not begin with its first event: stream {record.stream} begins at {record.offset:,}",
                    hint="what was removed may name blobs that are needed; restore the whole log first",
                )
            begun.add(record.stream)
            created = created or record.type == types.DeploymentCreated.type_name
            if record.type == types.ReleaseProposed.type_name:
                with suppress(InvalidEventError):
                    made.add(envelope.expect(record, types.ReleaseProposed).blob)
            found.update(match.decode() for match in _HASH.findall(_plain(record)))
        after = batch.position
    if stopped():
        return found, made
    if not all(after.covers(stream, offset) for stream, offset in end.offsets.items()):
        raise LogError("the log could not be read to its end", hint="try again; `fedloop log verify` says what is broken")
    if not created:
        raise UsageError("the log belongs to no deployment: nothing says which blobs are needed")
    return found, made


def _plain(record: Record) -> bytes:
    """The event's data, where nothing is hidden by an escape of JSON's."""
    if b"\\" not in record.data:
        return record.data
    try:
        return msgspec.json.encode(msgspec.json.decode(record.data)) + record.data
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return record.data
