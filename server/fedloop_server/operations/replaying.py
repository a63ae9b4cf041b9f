"""Every state folded again from the first event on, and compared with the snapshots that were kept of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final

import msgspec
from fedloop_events import types
from fedloop_events.envelope import Record
from fedloop_events.errors import InvalidEventError
from fedloop_events.folds.admit import Admit
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Fold, Reader, StoredFold
from fedloop_events.folds.releases import ReleasesView
from fedloop_events.folds.rounds import RoundsView
from fedloop_events.folds.snapshots import Snapshots
from fedloop_events.logs.port import EventLog, read_all
from fedloop_events.types import DEFAULT_RUN
from fedloop_privacy.dp.ledger import Ledger
from msgspec import Struct

from fedloop_server.state import ServerState

SNAPSHOTS: Final = "*.snapshot"
"""Where folds keep their states, anywhere below the deployment's folder: `<name of the fold>.snapshot`."""
MOST_REFUSED: Final = 20


class Refused(Struct, frozen=True):
    """An event that counts for nothing, and why."""

    stream: str
    offset: int
    type: str
    why: str


class Replayed(Struct, frozen=True):
    """What the folds have. `first_refused` are the first `MOST_REFUSED` of the events that count for nothing; `matching` and
    `differing` name the snapshots that are, and are not, the state that the log gives at their position."""

    events: int
    took_ms: int
    types: dict[str, int]
    unknown: int
    """Events of types that only a newer program knows."""
    refused: int
    first_refused: list[Refused]
    epoch: int
    clients: int
    revoked: int
    rounds: dict[str, int]
    """By state."""
    releases: dict[str, int]
    """By status."""
    current: str | None
    """The release in force."""
    stale_decisions: int
    spends: int
    suspended: list[str]
    matching: list[str]
    differing: list[str]


def replay(log: EventLog, directory: Path | None) -> Replayed:
    """Fold the log from scratch, and compare it with the snapshots below the deployment's folder, if it has one."""
    began = time.monotonic()
    counts = Counter(record.type for record in read_all(log))
    first_refused: list[Refused] = []

    def refuse(record: Record, error: InvalidEventError) -> None:
        if len(first_refused) < MOST_REFUSED:
            first_refused.append(Refused(record.stream, record.offset, record.type, error.message))

    people, rounds, releases, ledger = Identities(), RoundsView(), ReleasesView(), Ledger()
    enrolled = Reader(log, people, on_refused=refuse)
    enrolled.catch_up()
    readers = [Reader[Fold](log, fold, identities=people, on_refused=refuse) for fold in (rounds, releases, ledger)]
    for reader in readers:
        reader.catch_up()
    current = [found.release for model in releases.models if (found := releases.current(model)) is not None]
    matching, differing = _compared(log, directory, people)
    return Replayed(
        events=counts.total(),
        took_ms=round((time.monotonic() - began) * 1000),
        types=dict(sorted(counts.items())),
        unknown=sum(count for name, count in counts.items() if types.newest(name) is None),
        refused=enrolled.refused + sum(reader.refused for reader in readers),
        first_refused=first_refused,
        epoch=rounds.epoch,
        clients=len(people.clients),
        revoked=sum(client.revoked for client in people.clients.values()),
        rounds=dict(Counter(each.state for each in rounds.rounds.values())),
        releases=dict(Counter(each.status for each in releases.releases.values())),
        current=current[-1] if current else None,
        stale_decisions=sum(readers[0].standing.stale.values()),
        spends=sum(len(ledger.spends(client)) for client in people.clients),
        suspended=[client for client in people.clients if ledger.suspended(client) is not None],
        matching=matching,
        differing=differing,
    )


def _compared(log: EventLog, directory: Path | None, people: Identities) -> tuple[list[str], list[str]]:
    """The snapshots below the folder that are the log's state, and those that are not."""
    matching: list[str] = []
    differing: list[str] = []
    for path in sorted(directory.rglob(SNAPSHOTS)) if directory is not None else []:
        fold = _fold(path.name.split(".")[0], people)
        if fold is not None and directory is not None:
            (matching if _same(log, path, fold) else differing).append(str(path.relative_to(directory)))
    return matching, differing


def _fold(name: str, people: Identities) -> StoredFold | None:
    """A new fold of the kind whose snapshots have this name."""
    folds: dict[str, Callable[[], StoredFold]] = {
        "rounds": RoundsView,
        "releases": ReleasesView,
        "ledger": Ledger,
        "identities": Identities,
        "server": lambda: ServerState(DEFAULT_RUN, people),
    }
    return folds[name]() if name in folds else None


def _same(log: EventLog, path: Path, fresh: StoredFold) -> bool:
    """Whether the log, folded up to the snapshot's position, gives the snapshot's state."""
    found = Snapshots(path).load(fresh.version)
    if found is None:
        return False
    people = Identities()
    Reader(log, people).catch_up()
    admit = Admit(None if isinstance(fresh, Identities) else people)
    for record in read_all(log, fresh.topics):
        if found.position.covers(record.stream, record.offset):
            with suppress(InvalidEventError):
                payload = admit(record)
                if payload is not None:
                    fresh.apply(record, payload)
    same = _comparable(fresh) == _comparable(fresh.from_state(found.state))
    return same and admit.standing == found.standing


def _comparable(fold: StoredFold) -> object:
    """A fold's state as plain values. What has come from several partitions has no order there, nor have positions in it."""
    if isinstance(fold, ServerState):
        return [_comparable(each) for each in (fold.rounds, fold.releases, fold.ledger)]
    state = fold.to_state()
    found: object = (msgspec.json if isinstance(fold, Identities) else msgspec.msgpack).decode(state)
    return found
