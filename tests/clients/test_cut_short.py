"""A spend that a crash cut short: the device says which round, what it cost, and how long that holds."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from clients.conftest import ORIGIN, answered, clock_ahead, settled
from fedloop_clients import Agent
from fedloop_clients.cut_short import CutShort
from fedloop_events import types
from flwr.app import Array, ArrayRecord, Context, Message, RecordDict

if TYPE_CHECKING:
    from clients.conftest import Deployment

InChild = Callable[[Callable[[], object]], int]


def answer(message: Message, context: Context) -> Message:
    return Message(RecordDict({"arrays": ArrayRecord({"x": Array(np.zeros(1, np.float32))})}), reply_to=message)


def die(message: Message, context: Context) -> Message:
    os.kill(os.getpid(), signal.SIGKILL)
    raise AssertionError


@pytest.fixture
def store(deployment: Deployment, tmp_path: Path, in_child: InChild) -> Path:
    """Of a device that was killed between the spend and the answer of its only round."""
    store = tmp_path / "store"
    with Agent.enrol(deployment.folder, store, client_id="phone", epsilon=2.5, key_from="file") as agent:
        agent.run(until=settled)
    deployment.ask("phone")

    def work() -> None:
        with Agent.open(store, apps={"main": die}) as agent:
            agent.run(until=answered())

    assert in_child(work) == -9
    assert len(deployment.appended(types.BudgetSpent)) == 1
    return store


def status_of(store: Path) -> list[CutShort]:
    with Agent.open(store) as agent:
        return agent.status().cut_short


def test_it_is_shown_before_and_after_the_device_has_declined_and_until_the_round_is_over_and_the_day(
    deployment: Deployment, store: Path
) -> None:
    (found,) = status_of(store)
    assert (found.round_id, found.reason, found.open, found.pays_again) == ("r0001", "interrupted", True, False)
    assert found.epsilon == pytest.approx(1.99, abs=0.01)
    assert found.counts_s == pytest.approx(86_400, abs=60)
    with Agent.open(store, apps={"main": answer}) as agent:
        agent.run(until=answered())
        assert agent.status().answers == {"interrupted": 1}
    assert status_of(store) == [found]
    deployment.server.append(types.RoundAborted(origin=ORIGIN, epoch=1, run_id="main", round_id="r0001", reason="deadline"))
    (closed,) = status_of(store)
    assert (closed.round_id, closed.open) == ("r0001", False)
    with clock_ahead(86_401):
        deployment.release()
    assert status_of(store) == []
    with Agent.open(store) as agent:
        assert agent.status().epsilon_spent == pytest.approx(found.epsilon)


def test_the_command_says_it_in_words_and_as_json(store: Path) -> None:
    command = [sys.executable, "-m", "fedloop_cli.main", "agent", "status", "--store", str(store)]
    text, document = (
        subprocess.run([*command, *more], capture_output=True, text=True, timeout=60, check=True).stdout
        for more in ([], ["--json"])
    )
    said = "round r0001 was paid for and cut short before its answer (interrupted): it takes no further part in it until its"
    for each in (text, json.loads(document)["cut_short"][0]["sentence"]):
        assert f"{said} RoundClosed or RoundAborted; it counts as a round of the day for 86,400 s more; " in each
        assert "its epsilon of 1.993 is spent for life, and its budget does not pay for another such round" in each
    assert json.loads(document)["cut_short"][0]["round_id"] == "r0001"


def test_a_round_that_is_being_answered_or_was_is_none(deployment: Deployment, tmp_path: Path) -> None:
    store, meanwhile = tmp_path / "store", []

    def watched(message: Message, context: Context) -> Message:
        with Agent.open(store) as other:
            status = other.status()
            meanwhile.append((status.spends, status.cut_short))
        return answer(message, context)

    with Agent.enrol(deployment.folder, store, client_id="phone", key_from="file", apps={"main": watched}) as agent:
        deployment.ask("phone")
        agent.run(until=answered())
        assert agent.status().answers == {"submitted": 1}
    assert meanwhile == [(1, [])]
    assert status_of(store) == []


def test_a_store_from_before_the_answer_knows_by_the_log_that_there_was_one(deployment: Deployment, store: Path) -> None:
    with Agent.open(store) as agent, agent._device.store.transaction() as db:
        me, instruction = agent.identity, deployment.appended(types.BudgetSpent)[0].instruction_id
        db.execute("DELETE FROM answers")
    update = types.UpdateSubmitted(
        origin=ORIGIN,
        client_id="phone",
        seq=len([each for each in deployment.appended(types.ClientEvent) if each.client_id == "phone"]),
        run_id="main",
        instruction_id=instruction,
        content=types.Content(),
        round_id="r0001",
    )
    me.writer(deployment.log).append(update)
    assert status_of(store) == []
