"""A deployment with scripted devices: numpy in place of a model, real keys, a real ledger, a real log."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from fedloop_events import types
from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_events.blobs.tensors import Array
from fedloop_events.envelope import Record, decode
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.folds.releases import ReleasesView
from fedloop_events.folds.rounds import RoundsView
from fedloop_events.logs.port import EventLog, read_all
from fedloop_events.signatures import SigningKey
from fedloop_events.writer import EventWriter
from fedloop_privacy.dp.ledger import Ledger
from fedloop_server.config import ServerConfig
from fedloop_server.deployment import Deployment, create_deployment
from fedloop_server.operations.rounds import OnWait
from fedloop_server.rounds import actions
from fedloop_server.rounds.loop import Server
from fedloop_tasks import updates
from fedloop_tasks.classification.plan import ClassificationPlan
from fedloop_tasks.evaluation import Measured, Scores

P = TypeVar("P", bound=types.Payload)
Behaviour = Callable[[types.RoundOpened, dict[str, Array]], Mapping[str, Array] | str | None]
"""What becomes of an honest update: other tensors, the reason of a refusal, or None for silence."""

SPEC = types.ClassificationSpec(
    base_model="tiny", base_sha256="0" * 64, labels=["a", "b", "c"], rank=2, alpha=4.0, targets=["query"], layers=1
)
# At sampling rate 1 the accountant has a closed form and needs no torch.
PLAN = ClassificationPlan(planned_rounds=3, sampling_rate=1.0, steps=1, nominal_examples=100)
CONFIG = ServerConfig(plan=PLAN, quorum=2, deadline_s=30.0)
OPEN_CONFIG = ServerConfig(plan=ClassificationPlan(epsilon=None), quorum=2, deadline_s=30.0)


def initial_arrays(labels: int = 3) -> dict[str, Array]:
    random = np.random.default_rng(0)
    return {
        "lora.0.query.A": random.normal(size=(2, 4)).astype(np.float32),
        "lora.0.query.B": np.zeros((4, 2), np.float32),
        "head.weight": np.zeros((labels, 4), np.float32),
        "head.bias": np.zeros(labels, np.float32),
    }


def evaluation(accuracy: float, dataset: str = "e") -> Measured:
    return Measured({"accuracy": accuracy}, "accuracy", 100, dataset * 64)


def scored(*right: int) -> Measured:
    """An evaluation by example: of each, whether it is right."""
    scores = Scores.of(right)
    return Measured({"accuracy": scores.mean}, "accuracy", len(right), "e" * 64, scores=scores)


def evaluate(arrays: Mapping[str, Array]) -> Measured:
    return evaluation(0.5)


class Following:
    """The log as scripted devices read it: each for itself, or many together."""

    def __init__(self, log: EventLog) -> None:
        self.identities, self.ledger = Identities(), Ledger()
        people = Reader(log, self.identities)
        people.catch_up()
        self.rounds = Reader(log, RoundsView(), identities=people)
        self.audit = Reader(log, self.ledger, identities=people)


class Device:
    """Answers each instruction of the latest epoch once. Its updates are a function of its name, the round and the base."""

    def __init__(
        self,
        log: EventLog,
        blobs: BlobStore,
        client_id: str,
        *,
        epsilon: float | None = 8.0,
        examples: int = 64,
        behave: Behaviour = lambda opened, arrays: arrays,
        following: Following | None = None,
    ) -> None:
        self.client_id, self.epsilon, self.examples, self.behave = client_id, epsilon, examples, behave
        self.weight = examples
        """What it says that an update without a mechanism weighs."""
        self.writer = EventWriter(log, SigningKey.generate())
        self._blobs = blobs
        self.following = following or Following(log)
        self._answered: set[str] = set()
        self._seq = 0

    @property
    def origin(self) -> str:
        return self.following.identities.origin

    def seq(self) -> int:
        self._seq += 1
        return self._seq - 1

    def enrol(self) -> None:
        node_id = int.from_bytes(hashlib.sha256(self.client_id.encode()).digest()[:8], "big") | 1
        self.writer.append(
            types.ClientEnrolled(
                self.origin, self.client_id, self.seq(), self.writer.key.public_key, str(node_id), self.epsilon, 1e-5
            )
        )
        self.seen()

    def seen(self) -> None:
        self.writer.append(types.ClientSeen(self.origin, self.client_id, self.seq(), self.examples))

    def step(self, wait_s: float = 0.0) -> None:
        """Answer what is open and addressed to this device."""
        self.following.rounds.wait(wait_s)
        opened = self.following.rounds.fold.open_round
        if opened is None or opened.opened is None:
            return
        instruction = opened.instructed.get(self.client_id)
        if instruction is not None and instruction not in self._answered:
            self._answered.add(instruction)
            self.answer(opened.opened, instruction)

    def run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            self.step(0.05)

    def answer(self, opened: types.RoundOpened, instruction: str) -> None:
        honest = self.trained(opened)
        update = self.behave(opened, honest)
        if isinstance(update, str):
            self.writer.append(
                types.RoundDeclined(
                    self.origin, self.client_id, self.seq(), opened.run_id, instruction, update, round_id=opened.round_id
                )
            )
        elif update is not None:
            self.submit(opened, instruction, update)

    def submit(self, opened: types.RoundOpened, instruction: str, arrays: Mapping[str, Array]) -> str:
        """The update's event id."""
        base = tensors.decode(self._blobs.get(opened.base))
        blob = self._blobs.put(tensors.encode(updates.encode(opened, base, arrays)))
        spend_seq = None if opened.mechanism is None else self.spend(opened, instruction)
        weight = self.weight if opened.mechanism is None else 1
        update = types.UpdateSubmitted(
            self.origin,
            self.client_id,
            self.seq(),
            opened.run_id,
            instruction,
            types.Content(arrays={"arrays": blob}, metrics={"metrics": {"num-examples": weight}}),
            opened.round_id,
            opened.base_release,
            opened.mechanism,
            spend_seq,
        )
        return self.writer.append(update)[0].id

    def spend(self, opened: types.RoundOpened, instruction: str) -> int:
        self.following.audit.catch_up()
        assert opened.mechanism is not None
        spent = self.following.ledger.next_spend(
            self.client_id,
            opened.mechanism,
            origin=self.origin,
            seq=self.seq(),
            run_id=opened.run_id,
            instruction_id=instruction,
            round_id=opened.round_id,
        )
        self.writer.append(spent)
        return spent.spend_seq

    def trained(self, opened: types.RoundOpened) -> dict[str, Array]:
        seed = hashlib.sha256(f"{self.client_id} {opened.number}".encode()).digest()
        random = np.random.default_rng(int.from_bytes(seed[:8], "big"))
        base = tensors.decode(self._blobs.get(opened.base))
        if opened.strategy == "sums":
            return {"sums": np.asarray(random.normal(size=base["head.weight"].shape), np.float32)}
        return {name: np.asarray(base[name] + random.normal(size=base[name].shape), np.float32) for name in opened.upload}


class World:
    """A deployment in a folder, and what its log says."""

    def __init__(self, folder: Path, config: ServerConfig = CONFIG, spec: types.ClassificationSpec = SPEC) -> None:
        self.folder, self.config = folder, config
        self.deployment: Deployment = create_deployment(folder, spec, initial_arrays(len(spec.labels)), config)
        self.log, self.blobs, self.writer = self.deployment.log, self.deployment.blobs, self.deployment.writer
        self.devices: dict[str, Device] = {}

    def device(
        self,
        client_id: str,
        *,
        epsilon: float | None = 8.0,
        examples: int = 64,
        behave: Behaviour = lambda opened, arrays: arrays,
    ) -> Device:
        """An enrolled device, which has just been seen."""
        device = Device(self.log, self.blobs, client_id, epsilon=epsilon, examples=examples, behave=behave)
        device.enrol()
        self.devices[client_id] = device
        return device

    def server(
        self,
        *,
        log: EventLog | None = None,
        config: ServerConfig | None = None,
        evaluate: Callable[[Mapping[str, Array]], Measured] = evaluate,
        on_wait: OnWait | None = None,
    ) -> Server:
        writer = self.writer if log is None else EventWriter(log, self.writer.key)
        return Server(log or self.log, self.blobs, writer, config or self.config, evaluate=evaluate, on_wait=on_wait)

    def request(self, rounds: int = 1, request_id: str = "q1", reason: str = "") -> None:
        origin = self.payloads(types.DeploymentCreated)[0].origin
        self.writer.append(types.RoundRequested(origin, "main", request_id, rounds, reason))

    def records(self, kind: type[P]) -> list[tuple[Record, P]]:
        return [(record, payload) for record in read_all(self.log) if isinstance(payload := decode(record), kind)]

    def payloads(self, kind: type[P]) -> list[P]:
        return [payload for _, payload in self.records(kind)]

    @property
    def rounds(self) -> RoundsView:
        return self._read_rounds().fold

    @property
    def stale(self) -> int:
        """Decisions of fenced servers."""
        return self._read_rounds().standing.stale.get("main", 0)

    def _read_rounds(self) -> Reader[RoundsView]:
        reader = Reader(self.log, RoundsView(), identities=Identities())
        reader.catch_up()
        return reader

    @property
    def releases(self) -> ReleasesView:
        reader = Reader(self.log, ReleasesView(), identities=Identities())
        reader.catch_up()
        return reader.fold

    def crowd(self, *client_ids: str, epsilon: float | None = 8.0) -> None:
        """Enrolled devices that read the log together."""
        following = Following(self.log)
        for client_id in client_ids:
            device = Device(self.log, self.blobs, client_id, epsilon=epsilon, following=following)
            device.enrol()
            self.devices[client_id] = device

    @contextmanager
    def serving_together(self) -> Iterator[None]:
        """All devices answer, one after the other, as long as the block lasts."""
        stop = threading.Event()

        def serve() -> None:
            while not stop.wait(0.05):
                for device in self.devices.values():
                    if not stop.is_set():
                        device.step()

        thread = threading.Thread(target=serve)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    @contextmanager
    def serving(self, *names: str) -> Iterator[None]:
        """Devices (all by default) answer as long as the block lasts."""
        stop = threading.Event()
        chosen = [self.devices[name] for name in names] or list(self.devices.values())
        threads = [threading.Thread(target=device.run, args=(stop,)) for device in chosen]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            stop.set()
            for thread in threads:
                thread.join()


def step_to(server: Server, kind: type[actions.Action]) -> actions.Action:
    """Steps until the next action is of that kind, which is not done."""
    while not isinstance(action := server._next(), kind):
        server.step(wait_s=0.0)
    return action
