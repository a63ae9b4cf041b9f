"""Devices whose deployment is a gateway: everything but the location stays the same."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from clients.conftest import Deployment, DigitMasker
from devices import OPEN_CONFIG, SPEC, evaluate, initial_arrays
from fedloop_clients import Agent
from fedloop_clients.device import Status
from fedloop_clients.enrolment import Identity
from fedloop_clients.loop import RevokedError
from fedloop_events import types
from fedloop_events.blobs.store import BlobStore
from fedloop_events.envelope import Event, decode
from fedloop_events.errors import NotAllowedError, UnreachableError, UsageError
from fedloop_events.folds.rounds import RoundsView
from fedloop_events.locations import DeploymentLocation
from fedloop_events.logs.http import GatewayLog
from fedloop_events.logs.port import EventLog, read_all
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_server.deployment import create_deployment
from fedloop_server.operations.sweeping import sweep
from fedloop_server.rounds.loop import Server
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from gateway.harness import Served

CONFIG = msgspec.structs.replace(OPEN_CONFIG, min_examples=0)


@contextmanager
def gateway(log: EventLog, blobs: BlobStore, folder: Path) -> Iterator[Served]:
    served = Served(log, blobs, folder)
    served.start()
    try:
        yield served
    finally:
        served.stop()


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(tmp_path / "deployment")
    made.register()
    made.release()
    yield made
    made.log.close()


@pytest.fixture
def served(deployment: Deployment, tmp_path: Path) -> Iterator[Served]:
    with gateway(deployment.log, deployment.blobs, tmp_path) as served:
        yield served


def adding_one() -> ClientApp:
    """Trains every tensor by adding one."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        before = message.content.array_records["arrays"]
        arrays = ArrayRecord({name: Array(np.asarray(array.numpy() + 1, np.float32)) for name, array in before.items()})
        metrics = MetricRecord({"num-examples": 1})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


def settled(status: Status) -> bool:
    return status.settled


def test_feedback_is_published_masked_and_read_back(deployment: Deployment, served: Served, tmp_path: Path) -> None:
    with Agent.enrol(served.url, tmp_path / "store", client_id="phone", key_from="file", masker=DigitMasker()) as agent:
        response = agent.record("card 4711 is lost", "card-lost")
        agent.feedback(response.response_id, comment="4711 again")
        agent.run(until=settled)
        assert agent.status().published == 1
    (recorded,) = deployment.appended(types.FeedbackRecorded)
    assert recorded.text.text == "card <NUMBER_1> is lost"
    with Agent.open(tmp_path / "store", masker=DigitMasker()) as again:
        assert again.status().settled
        assert again.identity.location == served.url


def test_a_round_is_answered_paid_for_once_and_its_terms_are_kept(deployment: Deployment, served: Served, tmp_path: Path) -> None:
    with Agent.enrol(served.url, tmp_path / "store", client_id="phone", key_from="file", apps={"main": adding_one()}) as agent:
        instruction = deployment.ask("phone")
        other = deployment.ask("another")
        agent.run(until=lambda status: bool(status.answers))
        status = agent.status()
    (update,) = deployment.appended(types.UpdateSubmitted)
    (spent,) = deployment.appended(types.BudgetSpent)
    assert (update.instruction_id, spent.instruction_id, update.spend_seq) == (instruction, instruction, 0)
    assert other != instruction
    assert (status.answers, status.spends) == ({"submitted": 1}, 1)
    assert deployment.blobs.exists(update.content.arrays["arrays"])


def test_a_run_that_belongs_to_no_round_goes_on_from_instruction_to_instruction(
    deployment: Deployment, served: Served, tmp_path: Path
) -> None:
    store = tmp_path / "store"
    with Agent.enrol(served.url, store, client_id="phone", epsilon=None, key_from="file", app=adding_one()) as agent:
        for step in range(4):
            deployment.instruct("phone", None, step=step)
            agent.run(until=lambda status: status.answers.get("submitted") == step + 1)  # noqa: B023
    updates = deployment.appended(types.UpdateSubmitted)
    assert len(updates) == 4
    assert all(deployment.blobs.exists(update.content.arrays["arrays"]) for update in updates)


@pytest.mark.parametrize("behind_a_gateway", [False, True])
@pytest.mark.parametrize("app", [False, True])
def test_an_answer_that_waited_for_longer_than_the_blob_store_keeps_its_tensors_puts_them_again(
    deployment: Deployment,
    served: Served,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    behind_a_gateway: bool,
    app: bool,
) -> None:
    def sweep_all() -> int:
        place = DeploymentLocation(str(deployment.folder), deployment.blobs.url)
        return sweep(place, deployment.log, deployment.blobs, None, older_than_s=0, now=lambda: time.time() + 100).removed

    def away(self: EventLog, events: Sequence[Event]) -> None:
        if any(each.type == types.UpdateSubmitted.type_name for each in events):
            raise UnreachableError("away")
        append(self, events)

    apps: dict[str, Any] = {"app": adding_one()} if app else {"apps": {"main": adding_one()}}
    place = (served.url, None) if behind_a_gateway else (str(deployment.folder), str(deployment.blobs.url))
    kind: type[Any] = GatewayLog if behind_a_gateway else SqliteLog
    append = kind.append
    store, epsilon = tmp_path / "store", None if app else 8.0
    enrolled = Agent.enrol(place[0], store, client_id="phone", epsilon=epsilon, key_from="file", blobs=place[1], **apps)
    with enrolled as agent, monkeypatch.context() as patch:
        patch.setattr(kind, "append", away)
        _ = deployment.instruct("phone", None) if app else deployment.ask("phone")
        agent.run(until=lambda status: bool(status.answers))
        assert (agent.status().answers, agent.status().unsent) == ({"submitted": 1}, 1)
    assert sweep_all() == 1
    with Agent.open(store, **apps) as agent:
        agent.run(until=lambda status: not status.unsent)
        assert agent._device.store.rows("SELECT name FROM kept WHERE name GLOB 'upload/*'") == []
    (update,) = deployment.appended(types.UpdateSubmitted)
    assert deployment.blobs.exists(update.content.arrays["arrays"])
    assert sweep_all() == 0


def test_a_store_that_was_restored_learns_from_the_log_what_it_has_appended(
    deployment: Deployment, served: Served, tmp_path: Path
) -> None:
    import shutil

    store = tmp_path / "store"
    Agent.enrol(served.url, store, client_id="phone", key_from="file").close()
    shutil.copytree(store, tmp_path / "backup")
    with Agent.open(store, apps={"main": adding_one()}) as agent:
        deployment.ask("phone")
        agent.run(until=lambda status: bool(status.answers))
    shutil.rmtree(store)
    (tmp_path / "backup").rename(store)
    with Agent.open(store, apps={"main": adding_one()}) as agent:
        deployment.ask("phone")
        agent.run(until=lambda status: bool(status.answers))
        assert agent.status().spends == 2
    numbers = [payload.seq for record in read_all(deployment.log) if isinstance(payload := decode(record), types.ClientEvent)]
    assert sorted(numbers) == list(range(len(numbers)))


def test_a_name_that_is_taken_is_refused(deployment: Deployment, served: Served, tmp_path: Path) -> None:
    Agent.enrol(served.url, tmp_path / "one", client_id="phone", key_from="file").close()
    with pytest.raises(UsageError, match="another device is enrolled as phone"):
        Agent.enrol(served.url, tmp_path / "other", client_id="phone", key_from="file")
    assert len(deployment.appended(types.ClientEnrolled)) == 1
    Agent.enrol(served.url, tmp_path / "one", client_id="phone", key_from="file").close()


def test_a_device_that_is_revoked_stops(deployment: Deployment, served: Served, tmp_path: Path) -> None:
    with Agent.enrol(served.url, tmp_path / "store", client_id="phone", key_from="file", masker=DigitMasker()) as agent:
        agent.run(until=settled)
        deployment.server.append(
            types.ClientRevoked(origin=deployment.appended(types.DeploymentCreated)[0].origin, client_id="phone", reason="lost")
        )
        with pytest.raises((RevokedError, NotAllowedError)):
            agent.run()


def test_an_older_store_which_knows_nothing_of_blobs_still_opens() -> None:
    older = {
        "client_id": "a",
        "node_id": 1,
        "origin": "o",
        "location": "/deployment",
        "server_key": "k",
        "signing_key": b"0" * 32,
        "epsilon": None,
        "delta": 1e-5,
    }
    identity = msgspec.msgpack.decode(msgspec.msgpack.encode(older), type=Identity)
    assert identity.blobs is None
    assert identity.place == DeploymentLocation("/deployment", "/deployment/blobs")


def test_a_gateway_that_is_away_is_waited_for(deployment: Deployment, tmp_path: Path) -> None:
    with gateway(deployment.log, deployment.blobs, tmp_path) as served:
        agent = Agent.enrol(served.url, tmp_path / "store", client_id="phone", key_from="file", masker=DigitMasker())
    agent._device.log._get()._transport.timeout_s = 0.3  # type: ignore[attr-defined]
    agent._device.blobs._place._transport.timeout_s = 0.3  # type: ignore[attr-defined]
    with agent:
        agent.feedback(agent._device.interactions.respond("lost", None, "loan", "0000-x", ("loan",)), thumb="up")
        agent.run(until=lambda status: "does not answer" in status.problem)
        with pytest.raises(UnreachableError):
            agent._device.log.end()


def _rounds(folder: Path, place: DeploymentLocation | None) -> None:
    """Two rounds of three devices, whose server stands beside the log and who themselves stand behind the gateway."""
    deployment = create_deployment(folder / "deployment", SPEC, initial_arrays(), CONFIG, place)
    with gateway(deployment.log, deployment.blobs, folder) as served:
        agents = [
            Agent.enrol(served.url, folder / name, client_id=name, epsilon=None, key_from="file", apps={"main": adding_one()})
            for name in ("one", "two", "three")
        ]
        stop = threading.Event()
        threads = [threading.Thread(target=agent.run, args=(stop,)) for agent in agents]
        for thread in threads:
            thread.start()
        try:
            server = Server(deployment.log, deployment.blobs, deployment.writer, CONFIG, evaluate=evaluate)
            origin = agents[0].identity.origin
            deployment.writer.append(types.RoundRequested(origin, "main", "q1", 2))
            assert server.run(rounds=2) == 2
        finally:
            stop.set()
            for thread in threads:
                thread.join(30)
            for agent in agents:
                agent.close()
    rounds = RoundsView()
    for record in read_all(deployment.log):
        if (payload := decode(record)) is not None and payload.topic == "rounds":
            rounds.apply(record, payload)
    own = [payload for record in read_all(deployment.log) if (payload := decode(record)) is not None]
    assert len([each for each in own if isinstance(each, types.UpdateSubmitted)]) == 6
    assert len([each for each in own if isinstance(each, types.ReleaseProposed)]) == 3
    deployment.log.close()


@pytest.mark.slow
def test_rounds_run_with_devices_behind_the_gateway(tmp_path: Path) -> None:
    _rounds(tmp_path, None)


@pytest.mark.slow
def test_rounds_run_on_kafka_with_devices_behind_the_gateway(tmp_path: Path, kafka_url: str) -> None:
    _rounds(tmp_path, DeploymentLocation(kafka_url, str(tmp_path / "blobs")))
