"""Made `deployments/`, once, with the code of version 0.1.0 before its first release (log format 1, event types of version 1 and
feedback of version 2). It is never run again: what the two logs hold must replay for ever, to the same releases and states.

    PYTHONPATH=tests python tests/events/recorded/record_deployments.py FOLDER

Two deployments of scripted devices, with real keys, ledgers and servers. The key of the server is a test key that everybody knows
(`histories.open_world`), so that tests can go on where a log ends; those of the devices are lost.
"""

from __future__ import annotations

import json
import shutil
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path

import fleet
import histories
import numpy as np
import samples
from devices import CONFIG, OPEN_CONFIG, Behaviour, Device, World, evaluation
from fedloop_events import ids, types
from fedloop_events.blobs.tensors import Array
from fedloop_server.operations import registry
from msgspec.structs import replace
from simulated import SimulatedClient

DEADLINE_S = 1.5


def main(folder: Path) -> None:
    expected = {}
    for name, record in (("private", record_private), ("open", record_open)):
        expected[name] = record(folder / name)
        shutil.rmtree(folder / name / "server")
    (folder / "expected.json").write_text(json.dumps(expected, indent=1, ensure_ascii=False) + "\n")


def record_private(folder: Path) -> histories.Document:
    """Sums, training, a rollback, training from the earlier release; two servers, and every way not to count."""
    world = histories.open_world(folder, replace(CONFIG, deadline_s=DEADLINE_S))

    def refuses(opened: types.RoundOpened, arrays: dict[str, Array]) -> Mapping[str, Array] | str:
        if opened.number != 2:
            return arrays
        dan, instruction = world.devices["dan"], world.rounds.rounds[opened.round_id].instructed["dan"]
        dan.writer.append(
            types.BudgetRefused(
                dan.origin, "dan", dan.seq(), opened.run_id, instruction, "budget-exceeded", 8.0, 8.25, opened.round_id
            )
        )
        return "budget-exceeded"

    def misbehaves(opened: types.RoundOpened, arrays: dict[str, Array]) -> Mapping[str, Array]:
        if opened.strategy == "sums":
            return {name: values.reshape(-1) for name, values in arrays.items()}
        return {name: values * np.float32(1e6) for name, values in arrays.items()}

    world.device("ann", epsilon=20.0)
    world.device("bob", behave=silent_in(3))
    world.device("cem", behave=silent_in(3, 4))
    dan = world.device("dan", behave=lambda opened, arrays: None if opened.number == 3 else refuses(opened, arrays))
    world.device("eve", behave=misbehaves)
    world.device("fay", epsilon=0.5)
    zero = registry.current(world.releases, "default").release
    for number, name in enumerate(("ann", "bob", "cem", "ann")):
        give_feedback(world.devices[name], number, zero)

    world.request(2)
    with world.serving():
        world.server().run(rounds=1)
    interrupted(world, ann := world.devices["ann"])
    server = world.server()
    server.step()
    origin = dan.origin
    fenced = types.RoundAborted(origin, 1, "main", "r0002", "operator")
    world.log.append([world.writer.event(fenced, id=ids.derived_id(origin, "main", "r0002", "aborted"))])
    with world.serving():
        server.run(rounds=1)
    dan.seen()
    world.writer.append(types.ClientRevoked(origin, "eve", "lost"))
    registry.roll_back(world.writer, release=list(world.releases.releases)[1], reason="worse in the field")

    world.request(2, "q2")
    with world.serving():
        server.run(rounds=2)
    cem, late = world.devices["cem"], world.rounds.rounds["r0004"]
    assert late.opened is not None
    cem.submit(late.opened, late.instructed["cem"], cem.trained(late.opened))
    world.request(3, "q3")
    server.run(until_idle=True)
    [spent, *_] = [each for each in world.payloads(types.BudgetSpent) if each.client_id == "bob"]
    world.devices["bob"].writer.append(replace(spent, seq=99, instruction_id="f" * 32))
    ann.seen()
    return closed(world)


def record_open(folder: Path) -> histories.Document:
    """Rounds without privacy and with weights, the gate's refusal, a silent client, a rollback; then a run of Flower's own."""
    world = histories.open_world(folder, replace(OPEN_CONFIG, deadline_s=DEADLINE_S))
    world.device("ann", epsilon=None, examples=16)
    world.device("bob", epsilon=None, examples=64)
    world.device("cem", epsilon=None, examples=128, behave=silent_in(3))
    world.device("dan", epsilon=8.0)
    world.request(3)
    accuracies: Iterator[float] = iter((0.5, 0.625, 0.375, 0.75))
    with world.serving():
        world.server(evaluate=lambda arrays: evaluation(next(accuracies))).run(rounds=3)
    registry.roll_back(world.writer, release=list(world.releases.releases)[1], reason="slower")

    clients = []
    for number in range(3):
        node = fleet.node_id(number)
        app = fleet.regression_app()
        clients.append(
            SimulatedClient(world.log, world.blobs, f"client-{number}", app, node_id=node, node_config={"number": number})
        )
        clients[-1].enrol()
    with fleet.serving(*clients):
        result = histories.flower_run(world.log, world.blobs, world.writer)
    return closed(world) | {"flower_result": result}


def silent_in(*rounds: int) -> Behaviour:
    return lambda opened, arrays: None if opened.number in rounds else arrays


def give_feedback(device: Device, number: int, release: str) -> None:
    feedback = types.FeedbackRecorded(
        device.origin,
        device.client_id,
        device.seq(),
        f"f{number}",
        f"r{number}",
        release,
        "default",
        samples.masked("<PERSON_1> häßlich — 100 € short"),
        predicted="a",
        thumb=("up", "down", None)[number % 3],
        rating=number + 1,
        label="b" if number else None,
        correction=samples.masked("<PERSON_1> lost it") if number else None,
        comment=samples.masked("thanks") if number == 1 else None,
    )
    masked = types.TextMasked(device.origin, device.client_id, device.seq(), f"f{number}", {"PERSON": 1 + number})
    device.writer.append(feedback, masked)


def interrupted(world: World, answers: Device) -> None:
    """A server that opens the next round, sends its instructions, and stops when one device has answered."""
    server, stop = world.server(config=replace(world.config, deadline_s=60.0)), threading.Event()
    thread = threading.Thread(target=server.run, args=(stop,))
    thread.start()
    while not (opened := world.rounds.open_round) or not opened.replies:
        answers.step(0.1)
    stop.set()
    thread.join()


def closed(world: World) -> histories.Document:
    folds = histories.Folds(world.log)
    document = {"events": histories.counts(world.log)} | folds.document()
    world.log.close()
    return document


if __name__ == "__main__":
    main(Path(sys.argv[1]))
