"""What a log says, as a plain document: the form in which `events/recorded/deployments/expected.json` keeps it.

The document is built from what the folds hand out and from nothing else, under names of its own: folds can be renamed and
restructured, and must go on giving the same document for the recorded logs.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import devices
import msgspec
import samples
from devices import World
from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_events.envelope import Record, decode
from fedloop_events.folds.admit import Admit, Standing
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.folds.releases import ReleaseState, ReleasesView
from fedloop_events.folds.rounds import RoundState, RoundsView
from fedloop_events.logs.port import EventLog, read_all
from fedloop_events.types import DEFAULT_MODEL, DEFAULT_RUN, ClassificationSpec, Mechanism, Payload
from fedloop_events.writer import EventWriter
from fedloop_privacy.dp.ledger import Ledger
from fedloop_server.config import ServerConfig
from fedloop_server.flower.grid import LogGrid
from fedloop_server.flower.journal import start_epoch
from fedloop_server.flower.steps import RunReader
from fedloop_server.flower.strategies import Durable
from fedloop_server.state import ServerState
from fedloop_tasks.table import kind_of
from fleet import as_bytes, initial_arrays
from flwr.serverapp.strategy import DifferentialPrivacyServerSideFixedClipping, FedAvg

DEPLOYMENTS = Path(__file__).parent / "events" / "recorded" / "deployments"
FLOWER_RUN = "flower"
Document = dict[str, Any]


def open_world(folder: Path, config: ServerConfig) -> World:
    """The deployment in a folder, or a new one, under the server's test key. What only the server has is made anew."""
    server = folder / "server"
    server.mkdir(parents=True)
    initial = BlobStore(folder / "blobs").put(tensors.encode(devices.initial_arrays()))
    intent = {"origin": f"recorded-{folder.name}", "spec": devices.SPEC, "initial": initial}
    (server / "deployment.json").write_bytes(msgspec.json.encode(intent))
    samples.key("server").save(server / "key.pem")
    return World(folder, config)


def flower_run(log: EventLog, blobs: BlobStore, writer: EventWriter) -> str:
    """Run a strategy of Flower's own, with its noise recorded, on the clients of `fleet`; the SHA-256 of what came out."""
    epoch = start_epoch(log, writer, run_id=FLOWER_RUN, server_id="flower-server")
    reads = RunReader(log, FLOWER_RUN)

    def nodes() -> list[Any]:
        return [each for name, each in reads.identities.clients.items() if name.startswith("client-")]

    grid = LogGrid(log, blobs, writer, run_id=FLOWER_RUN, epoch=epoch, nodes=nodes, reads=reads)
    strategy = Durable(DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.5, 5.0, 3))
    arrays = strategy.start(grid, initial_arrays(), num_rounds=2, timeout=20).arrays
    return hashlib.sha256(b"".join(value for _, value in sorted(as_bytes(arrays).items()))).hexdigest()


class Folds:
    """Every fold of a server, brought up to date event by event. `restore_each` puts each into a fresh one after every event."""

    def __init__(self, log: EventLog, *, restore_each: bool = False) -> None:
        self.identities, self.flower = Identities(), RoundsView(FLOWER_RUN)
        self.server = ServerState(DEFAULT_RUN, self.identities)
        self.trail: list[str] = []
        """What the server would act on, after each event that changed it."""
        self._admit = Admit(self.identities)
        for record in read_all(log):
            payload = self._admit(record)
            if payload is not None:
                self._apply(record, payload)
            if restore_each:
                self._restore()
            self._note(record)

    def document(self) -> Document:
        state = self.server
        views = document(self.identities, state.rounds, self.flower, state.releases, state.ledger, self._admit.standing.stale)
        return views | {"server_decided_ms": state.decided_ms, "trail": self.trail}

    def _apply(self, record: Record, payload: Payload) -> None:
        for fold in (self.server, self.flower):
            if record.topic in fold.topics:
                fold.apply(record, payload)

    def _restore(self) -> None:
        self.identities = Identities.from_state(self.identities.to_state())
        self.flower = RoundsView.from_state(self.flower.to_state())
        self.server.people = self.identities
        self.server = self.server.from_state(self.server.to_state())
        standing = msgspec.msgpack.decode(msgspec.msgpack.encode(self._admit.standing), type=Standing)
        self._admit = Admit(self.identities)
        self._admit.standing = standing

    def _note(self, record: Record) -> None:
        rounds, releases = self.server.rounds, self.server.releases
        now = {
            "epoch": rounds.epoch,
            "requested": rounds.pending and rounds.pending.request_id,
            "open": rounds.open_round and rounds.open_round.round_id,
            "late": sorted(rounds.unanswered),
            "candidate": _name(releases.candidate(DEFAULT_MODEL)),
            "in force": _name(releases.current(DEFAULT_MODEL)),
        }
        line = ", ".join(f"{key}: {value}" for key, value in now.items() if value)
        if not self.trail or self.trail[-1].partition(" ")[2] != line:
            self.trail.append(f"{record.offset} {line}")


def read_document(log: EventLog) -> Document:
    """The same document (without what only `Folds` has), as readers see the log: identities first, then each fold."""
    identities, ledger, releases = Identities(), Ledger(), ReleasesView()
    main, flower = RoundsView(DEFAULT_RUN), RoundsView(FLOWER_RUN)
    stale: dict[str, int] = {}
    for fold in (main, flower, releases, ledger):
        reader = Reader(log, fold, identities=identities)
        reader.catch_up()
        assert (reader.refused, reader.unknown) == (0, 0)
        stale |= reader.standing.stale
    return document(identities, main, flower, releases, ledger, stale)


def document(
    identities: Identities,
    main: RoundsView,
    flower: RoundsView,
    releases: ReleasesView,
    ledger: Ledger,
    stale: dict[str, int],
) -> Document:
    return {
        "deployment": {"name": identities.origin, "server_key": identities.server_key},
        "clients": {name: _client(identities, ledger, name) for name in sorted(identities.clients)},
        "runs": {view.run_id: _run(view, stale.get(view.run_id, 0)) for view in (main, flower)},
        "models": {
            name: {"labels": spec.labels, "rank": spec.rank}
            for name, spec in releases.models.items()
            if isinstance(spec, ClassificationSpec)
        },
        "releases": {name: _release(each) for name, each in releases.releases.items()},
        "in_force": _name(releases.current(DEFAULT_MODEL)),
        "next_release": releases.next_number(DEFAULT_MODEL),
        "release_of_round": releases.by_round,
    }


def counts(log: EventLog) -> dict[str, int]:
    """Events by type."""
    return dict(sorted(Counter(record.type for record, _ in _decoded(log)).items()))


def _decoded(log: EventLog) -> Iterator[tuple[Record, Payload]]:
    for record in read_all(log):
        payload = decode(record)
        assert payload is not None, f"{record.type} is an unknown type"
        yield record, payload


def _client(identities: Identities, ledger: Ledger, name: str) -> Document:
    client = identities.clients[name]
    suspension = ledger.suspended(name)
    return {
        "key": client.public_key,
        "node": client.node_id,
        "budget": [client.epsilon, client.delta],
        "seen_ms": client.seen_ms,
        "examples_at_least": client.examples_at_least,
        "device": client.device,
        "enrolled_at": client.enrolled_at.offset,
        "revoked_at": client.revoked_at and client.revoked_at.offset,
        "epsilon": round(ledger.epsilon(name, client.delta), 6),
        "spends": [
            [each.spend_seq, each.sha256, each.event_id, each.instruction_id, *_terms(each.mechanism)]
            for each in ledger.spends(name)
        ],
        "suspended": suspension and [suspension.reason, suspension.spend_seq, suspension.event_id],
    }


def _run(view: RoundsView, stale: int) -> Document:
    return {
        "epoch": [view.epoch, view.server_id, view.epoch_ms],
        "stale_decisions": stale,
        "next_round": view.next_number,
        "late": sorted(view.unanswered),
        "requests": {
            name: [each.rounds, each.requested_ms, each.reason, each.numbers, each.given_up, each.pending]
            for name, each in view.requests.items()
        },
        "rounds": {name: _round(each) for name, each in view.rounds.items()},
    }


def _round(state: RoundState) -> Document:
    opened, closed, aborted = state.opened, state.closed, state.aborted
    return {
        "number": state.number,
        "request": state.request_id,
        "state": state.state,
        "times_ms": [state.opened_ms, state.closed_ms, state.ended_ms],
        "terms": opened
        and {
            "kind": kind_of(opened.strategy),
            "strategy": opened.strategy,
            "base": [opened.base_release, opened.base.sha256],
            "cohort": opened.cohort,
            "quorum": opened.quorum,
            "deadline_s": opened.deadline_s,
            "upload": opened.upload,
            "limits": [opened.max_upload_bytes, opened.max_update_norm],
            "mechanism": opened.mechanism and _terms(opened.mechanism),
            "hyperparameters": opened.hyperparameters,
        },
        "participants": state.participants,
        "excluded": {name: f"{each.reason}: {each.detail}" for name, each in sorted(state.excluded.items())},
        "accepted": closed
        and [[each.client_id, each.update_id, each.blob and each.blob.sha256, each.weight] for each in closed.accepted],
        "aborted": aborted and f"{aborted.reason}: {aborted.detail}",
        "instructions": dict(sorted(state.instructed.items())),
        "replies": dict(sorted(state.replies.items())),
        "declined": dict(sorted(state.declined.items())),
        "refused": {name: [each.client_id, each.reason, each.detail] for name, each in sorted(state.refused.items())},
        "bytes": [state.bytes_down, state.bytes_up],
    }


def _release(state: ReleaseState) -> Document:
    return {
        "number": state.number,
        "sha256": state.blob.sha256,
        "status": state.status,
        "reason": state.reason,
        "withdrawn": state.withdrawn,
        "round": state.round_id,
        "base": state.base_release,
        "strategy": state.strategy,
        "updates": state.updates,
        "accuracy": [[each.metrics["accuracy"], each.examples, each.dataset_sha256] for each in state.evaluations.values()],
        "times_ms": [state.proposed_ms, state.decided_ms],
    }


def _terms(mechanism: Mechanism) -> list[float]:
    rate, noise, clip = mechanism.sampling_rate, mechanism.noise_multiplier, mechanism.clip_norm
    return [rate, noise, clip, mechanism.steps, mechanism.divisor]


def _name(release: ReleaseState | None) -> str | None:
    return None if release is None else release.release
