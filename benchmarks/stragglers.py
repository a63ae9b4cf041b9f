"""What a straggler costs: seconds until ten devices, one of them ten times slower, have made a release of a given accuracy.

The whole path runs, without differential privacy: a server over a log in a file, and devices in threads that train on Dirichlet
shares of banking77's questions. All compute on one machine, so how long a device takes is set, and more than it computes.

`python -m benchmarks.stragglers` prints the accuracies over time too.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from fedloop_events import envelope, topics, types
from fedloop_events.blobs import tensors
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.logs.port import START
from fedloop_events.signatures import SigningKey
from fedloop_events.writer import EventWriter
from fedloop_server.config import ServerConfig
from fedloop_server.deployment import Deployment, create_deployment
from fedloop_server.rounds.loop import Server
from fedloop_tasks.classification.plan import ClassificationPlan
from fedloop_tasks.evaluation import Measured
from fedloop_tasks.task import Arrays
from msgspec.structs import replace

from benchmarks.harness import MIN_RUNS, Row, costs, in_turn, scratch
from benchmarks.utility import Classifiers, federate

DEVICES: Final = 10
SLOWER: Final = 10.0
DEVICE_S: Final = 2.0
"""Of a device that is not slow, for one update."""
PART: Final = 0.1
TARGET: Final = 0.6
AWAY_S: Final = 3600.0

SYNCHRONOUS: Final = ServerConfig(
    plan=ClassificationPlan(epsilon=None),
    quorum=5,
    cohort_size=DEVICES,
    deadline_s=AWAY_S,
    grace_s=AWAY_S,
    availability_s=AWAY_S,
    gate_margin=1.0,
)
OVER_SELECTED: Final = replace(SYNCHRONOUS, cohort_size=8, over_selection=1.25)
BUFFERED: Final = replace(SYNCHRONOUS, buffer_size=5)


@dataclass
class Trial:
    """A deployment from nothing to the target."""

    federation: Classifiers
    config: ServerConfig
    target: float
    device_s: float
    stop: threading.Event = field(default_factory=threading.Event)
    lock: threading.Lock = field(default_factory=threading.Lock)  # of the one model
    reached: list[tuple[float, float]] = field(default_factory=list)

    def seconds(self) -> float:
        """From the first round's opening until the target is reached."""
        with scratch() as folder:
            initial = self.federation.model.initial_arrays(0)
            deployment = create_deployment(folder / "deployment", self.federation.model.spec, initial, self.config)
            people = Identities()
            Reader(deployment.log, people).catch_up()
            devices = [
                threading.Thread(target=self._device, args=(deployment, people.origin, number)) for number in range(DEVICES)
            ]
            for device in devices:
                device.start()
            try:
                self._serve(deployment)
            finally:
                self.stop.set()
                for device in devices:
                    device.join()
        return self.reached[-1][0]

    def _serve(self, deployment: Deployment) -> None:
        identities, began = Identities(), 0.0
        people = Reader(deployment.log, identities)
        while len(identities.clients) < DEVICES:
            people.wait(1.0)
        deployment.writer.append(types.RoundRequested(identities.origin, types.DEFAULT_RUN, "benchmark", 1000))

        def seen(record: envelope.Record, payload: types.Payload) -> None:
            nonlocal began
            if isinstance(payload, types.RoundOpened):
                began = began or time.monotonic()
            elif isinstance(payload, types.ReleaseEvaluated) and began:
                accuracy = payload.metrics["accuracy"] or 0.0
                self.reached.append((time.monotonic() - began, accuracy))
                if accuracy >= self.target:
                    self.stop.set()

        evaluate, (log, blobs, writer) = self._evaluate, (deployment.log, deployment.blobs, deployment.writer)
        Server(log, blobs, writer, self.config, evaluate=evaluate, on_event=seen).run(self.stop)

    def _evaluate(self, arrays: Arrays) -> Measured:
        with self.lock:
            test = self.federation.test
            return Measured({"accuracy": self.federation.accuracy(arrays)}, "accuracy", len(test.texts), "0" * 64)

    def _device(self, deployment: Deployment, origin: str, number: int) -> None:
        """Answer the newest instruction that still counts, one at a time; number 0 is the slow one."""
        log, writer, client_id, seq = deployment.log, EventWriter(deployment.log, SigningKey.generate()), f"c{number}", 2
        enrolled = types.ClientEnrolled(origin, client_id, 0, writer.key.public_key, str(1000 + number), None, 1e-5)
        writer.append(enrolled, types.ClientSeen(origin, client_id, 1, len(self.federation.shares[number])))
        takes_s = self.device_s * (SLOWER if number == 0 else 1.0)
        position, rounds = START, dict[str, types.RoundOpened]()
        due: dict[str, str] = {}
        while not self.stop.is_set():
            batch = log.read((topics.ROUNDS,), position, wait_s=0.0 if due else 0.2)
            position = batch.position
            for record in batch.records:
                match envelope.decode(record):
                    case types.RoundOpened() as opened:
                        rounds[opened.round_id] = opened
                    case types.InstructionSent(client_id=to, round_id=str(round_id)) if to == client_id:
                        due[round_id] = record.id
                    case types.RoundClosed(round_id=str(round_id)) if not rounds[round_id].max_staleness:
                        due.pop(round_id, None)
                    case _:
                        pass
            if due and not batch.records:
                round_id, instruction_id = due.popitem()
                due.clear()
                content = self._trained(deployment, rounds[round_id], number, takes_s)
                base = rounds[round_id].base_release
                writer.append(
                    types.UpdateSubmitted(
                        origin, client_id, seq, types.DEFAULT_RUN, instruction_id, content, round_id, base_release=base
                    )
                )
                seq += 1

    def _trained(self, deployment: Deployment, opened: types.RoundOpened, number: int, takes_s: float) -> types.Content:
        began = time.monotonic()
        with self.lock:
            update = self.federation.update(number, tensors.decode(deployment.blobs.get(opened.base)), opened)
        blob = deployment.blobs.put(tensors.encode(update))
        self.stop.wait(takes_s - (time.monotonic() - began))
        weight = len(self.federation.shares[number])
        return types.Content(arrays={"arrays": blob}, metrics={"metrics": {"num-examples": weight}})


def rows(quick: bool) -> Iterator[Row]:
    part, target, device_s, runs = (0.02, 0.05, 0.2, 1) if quick else (PART, TARGET, DEVICE_S, MIN_RUNS)
    with scratch() as folder:
        federation = federate(folder, DEVICES, 0.5, 0, part=part)
        trials = [partial(_seconds, federation, config, target, device_s) for config in (BUFFERED, OVER_SELECTED, SYNCHRONOUS)]
        measured = in_turn(trials, runs=runs)
    what = f"seconds to accuracy {target:.2f}, one of {DEVICES} devices {SLOWER:g} times slower"
    buffered, over_selected, synchronous = zip(*measured, strict=True)
    yield costs(f"{what}: buffered", "synchronous", zip(buffered, synchronous, strict=True), "s", 2.0)
    yield costs(f"{what}: over-selected", "synchronous", zip(over_selected, synchronous, strict=True), "s", 2.0)
    yield costs(f"{what}: buffered", "over-selected", zip(buffered, over_selected, strict=True), "s")


def _seconds(federation: Classifiers, config: ServerConfig, target: float, device_s: float) -> float:
    trial = Trial(federation, config, target, device_s)
    took_s = trial.seconds()
    shown = ", ".join(f"{at:.0f} s {accuracy:.3f}" for at, accuracy in trial.reached)
    print(
        f"  {'buffered' if config.buffer_size else 'over-selected' if config.over_selection > 1 else 'synchronous'}: {shown}",
        file=sys.stderr,
    )
    return took_s
