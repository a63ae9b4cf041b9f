"""`fedloop log replay`: every state folded again from the first event on, and compared with what was kept of it."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec
from fedloop_events import types
from fedloop_events.envelope import Record
from fedloop_events.errors import InvalidEventError
from fedloop_events.folds.admit import Admit
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader, StoredFold
from fedloop_events.folds.releases import ReleasesView
from fedloop_events.folds.rounds import RoundsView
from fedloop_events.folds.snapshots import Snapshots
from fedloop_events.logs.port import EventLog, read_all
from fedloop_events.types import DEFAULT_RUN
from msgspec import Struct

from fedloop_cli import console, state
from fedloop_cli.options import Where

SNAPSHOTS: Final = "*.snapshot"
"""Where folds keep their states, anywhere below the deployment's folder: `<name of the fold>.snapshot`."""


class Replayed(Struct):
    """What the folds say. `matching` and `differing` name the snapshots that are, and are not, the state that the log gives at
    their position; `refused` are events that count for nothing, by reason."""

    log: str
    events: int = 0
    seconds: float = 0.0
    types: dict[str, int] = {}
    unknown: int = 0
    refused: int = 0
    first_refused: list[dict[str, Any]] = []
    epoch: int = 0
    clients: int = 0
    revoked: int = 0
    rounds: dict[str, int] = {}
    releases: dict[str, int] = {}
    current: str | None = None
    stale_decisions: int = 0
    spends: int = 0
    suspended: list[str] = []
    matching: list[str] = []
    differing: list[str] = []


def replay(where: Where) -> Replayed:
    """Fold the log from scratch, and compare it with the snapshots below the deployment's folder, if that was named.

    Raises as `state.open_log`.
    """
    from fedloop_privacy.ledger import Ledger

    log, directory = state.open_log(where), where.directory
    replayed = Replayed(where.place.log)
    began = time.monotonic()
    types: Counter[str] = Counter()
    for record in read_all(log):
        replayed.events += 1
        types[record.type] += 1
    replayed.types = dict(sorted(types.items()))
    people = Identities()

    def refused(record: Record, error: InvalidEventError) -> None:
        if len(replayed.first_refused) < 20:
            replayed.first_refused.append(
                {"stream": record.stream, "offset": record.offset, "type": record.type, "why": error.message}
            )

    who = Reader(log, people, on_refused=refused)
    who.catch_up()
    rounds = Reader(log, RoundsView(), identities=people, on_refused=refused)
    releases = Reader(log, ReleasesView(), identities=people, on_refused=refused)
    ledger = Reader(log, Ledger(), identities=people, on_refused=refused)
    for reader in (rounds, releases, ledger):
        reader.catch_up()
        replayed.refused += reader.refused
    replayed.refused += who.refused
    replayed.unknown = sum(count for name, count in types.items() if not _known(name))
    replayed.stale_decisions = sum(rounds.standing.stale.values())
    _summarise(replayed, people, rounds.fold, releases.fold, ledger.fold)
    for path in sorted(directory.rglob(SNAPSHOTS)) if directory is not None else []:
        fold = _fold(path.name.split(".")[0], people)
        if fold is not None and directory is not None:
            same = _same(log, path, fold)
            (replayed.matching if same else replayed.differing).append(str(path.relative_to(directory)))
    replayed.seconds = round(time.monotonic() - began, 3)
    return replayed


def as_document(replayed: Replayed) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.to_builtins(replayed)
    return document


def as_text(replayed: Replayed) -> str:
    rate = replayed.events / replayed.seconds if replayed.seconds else 0.0
    rows: dict[str, object] = {
        "log": replayed.log,
        "events": f"{replayed.events:,} in {replayed.seconds:.1f} s ({rate:,.0f} a second)",
        "unknown types": replayed.unknown,
        "refused": replayed.refused,
        "epoch": replayed.epoch,
        "clients": f"{replayed.clients}, {replayed.revoked} revoked",
        "rounds": _counts(replayed.rounds),
        "releases": _counts(replayed.releases),
        "in force": replayed.current,
        "stale decisions": replayed.stale_decisions,
        "spends": replayed.spends,
        "suspended": ", ".join(replayed.suspended) or "nobody",
        "snapshots": f"{len(replayed.matching)} match the log, {len(replayed.differing)} differ",
    }
    lines = [console.fields(rows), "", console.table(["type", "events"], [list(each) for each in replayed.types.items()])]
    refused = [
        (console.position(each["stream"], each["offset"]), console.printable(each["why"])) for each in replayed.first_refused
    ]
    lines += [f"REFUSED  offset {place}: {why}" for place, why in refused]
    lines += [f"DIFFERS  {console.printable(path)}" for path in replayed.differing]
    return "\n".join(lines)


def _summarise(replayed: Replayed, people: Identities, rounds: RoundsView, releases: ReleasesView, ledger: Any) -> None:
    replayed.epoch = rounds.epoch
    replayed.clients = len(people.clients)
    replayed.revoked = sum(client.revoked for client in people.clients.values())
    replayed.rounds = dict(Counter(each.state for each in rounds.rounds.values()))
    replayed.releases = dict(Counter(each.status for each in releases.releases.values()))
    for model in releases.models:
        current = releases.current(model)
        replayed.current = current.release if current is not None else replayed.current
    replayed.spends = sum(len(ledger.spends(client)) for client in people.clients)
    replayed.suspended = [client for client in people.clients if ledger.suspended(client) is not None]


def _fold(name: str, people: Identities) -> StoredFold | None:
    """A new fold of the kind whose snapshots have this name."""
    from fedloop_privacy.ledger import Ledger
    from fedloop_server.rounds.actions import ServerState

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
    from fedloop_server.rounds.actions import ServerState

    if isinstance(fold, ServerState):
        return [_comparable(each) for each in (fold.rounds, fold.releases, fold.ledger)]
    state = fold.to_state()
    found: object = (msgspec.json if isinstance(fold, Identities) else msgspec.msgpack).decode(state)
    return found


def _known(type_name: str) -> bool:
    return types.newest(type_name) is not None


def _counts(counts: dict[str, int]) -> str:
    return ", ".join(f"{count} {name}" for name, count in sorted(counts.items())) or "none"
