"""Answering a round: the gate, the budget, and one result at most, wherever the process is killed."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from clients.conftest import answered, back_up, clock_ahead
from fedloop_clients import Agent
from fedloop_clients.device import Settings, Status
from fedloop_clients.eligibility import Eligibility
from fedloop_clients.instructions import InstructionHandler
from fedloop_clients.outbox import SuspendedError
from fedloop_events import types
from fedloop_events.blobs import tensors
from fedloop_events.envelope import Event
from fedloop_events.errors import UnreachableError
from fedloop_events.signatures import SigningKey
from fedloop_events.types import Mechanism
from fedloop_events.writer import EventWriter
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from msgspec.structs import replace

if TYPE_CHECKING:
    from clients.conftest import Deployment, DigitMasker

DAY_S = 24 * 3600.0
SECRET = "Wilhelmina4711"
InChild = Callable[[Callable[[], object]], int]


def die(*_: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Trainer:
    """A Flower `ClientApp` that notes in a file each time it touches data, and adds noise of the operating system's."""

    def __init__(self, touched: Path) -> None:
        self.touched = touched
        self.fatal = False
        self.app = ClientApp()
        self.app.train()(self._train)
        self.app.evaluate()(self._train)

    def _train(self, message: Message, context: Context) -> Message:
        with self.touched.open("ab") as file:
            file.write(b"x")
        if self.fatal:
            die()
        if message.content.config_records.get("fail"):
            raise ValueError(SECRET)
        count = int(context.state["calls"]["n"]) + 1 if "calls" in context.state else 1  # type: ignore[arg-type]
        context.state["calls"] = MetricRecord({"n": count})
        context.state["secret"] = ConfigRecord({"secret": SECRET})
        noise = np.frombuffer(os.urandom(12), np.uint8).astype(np.float32)
        arrays = ArrayRecord({"x": Array(noise), "calls": Array(np.full(1, count, np.float32))})
        metrics = MetricRecord({"num-examples": 7, "loss": 0.25})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    def count(self) -> int:
        return self.touched.stat().st_size if self.touched.exists() else 0


@pytest.fixture
def trainer(tmp_path: Path) -> Trainer:
    return Trainer(tmp_path / "touched")


Enrol = Callable[..., Agent]


@pytest.fixture
def enrol(deployment: Deployment, tmp_path: Path, trainer: Trainer, masker: DigitMasker) -> Iterator[Enrol]:
    agents: list[Agent] = []

    def enrol(**terms: Any) -> Agent:
        given: dict[str, Any] = {"client_id": "phone", "key_from": "file", "apps": {"main": trainer.app}, "masker": masker}
        agents.append(Agent.enrol(deployment.folder, tmp_path / "store", **(given | terms)))
        return agents[-1]

    yield enrol
    for agent in agents:
        agent.close()


def passes(count: int) -> Callable[[Status], bool]:
    left = iter(range(count))
    return lambda status: next(left, None) is None


def declined(deployment: Deployment) -> list[str]:
    return [each.reason for each in deployment.appended(types.RoundDeclined)]


# --- the way it should go ---


def test_a_round_is_paid_for_then_answered(deployment: Deployment, enrol: Enrol, trainer: Trainer) -> None:
    agent, instruction = enrol(), deployment.ask("phone")
    agent.run(until=answered())
    (spent,) = deployment.appended(types.BudgetSpent)
    (update,) = deployment.appended(types.UpdateSubmitted)
    assert (spent.spend_seq, spent.previous, spent.instruction_id) == (0, "", instruction)
    assert (update.spend_seq, update.instruction_id, update.base_release) == (0, instruction, deployment.base_release)
    assert update.mechanism == spent.mechanism
    assert spent.seq < update.seq
    assert tensors.decode(deployment.blobs.get(update.content.arrays["arrays"]))["x"].shape == (12,)
    assert (trainer.count(), agent.status().answers) == (1, {"submitted": 1})
    assert agent.status().epsilon_spent == pytest.approx(1.99, abs=0.01)


def test_under_a_mechanism_nothing_but_tensors_leaves(deployment: Deployment, enrol: Enrol) -> None:
    agent = enrol()
    deployment.ask("phone")
    agent.run(until=answered())
    (update,) = deployment.appended(types.UpdateSubmitted)
    assert (update.content.metrics, update.content.configs) == ({"metrics": {"num-examples": 1}}, {})


def test_flowers_context_lives_on_in_the_store_and_nowhere_else(deployment: Deployment, enrol: Enrol, tmp_path: Path) -> None:
    for calls in (1, 2, 3):
        with enrol() as agent:
            deployment.ask("phone")
            agent.run(until=answered(calls))
        update = deployment.appended(types.UpdateSubmitted)[-1]
        assert tensors.decode(deployment.blobs.get(update.content.arrays["arrays"]))["calls"] == calls
    kept = b"".join(path.read_bytes() for path in (tmp_path / "store").iterdir())
    assert SECRET.encode() not in deployment.bytes() + kept


def test_a_device_without_a_budget_serves_any_run(deployment: Deployment, enrol: Enrol, trainer: Trainer) -> None:
    agent = enrol(epsilon=None)
    deployment.instruct("phone", None)
    deployment.instruct("phone", None, message_type="evaluate")
    deployment.ask("phone", None)
    agent.run(until=answered(3))
    assert agent.status().answers == {"submitted": 3}
    assert [each.content.metrics["metrics"]["loss"] for each in deployment.appended(types.UpdateSubmitted)] == [0.25] * 3
    assert deployment.appended(types.BudgetSpent) == []


# --- the task and apps beside it ---


def start_run(deployment: Deployment, run_id: str) -> None:
    deployment.server.append(types.EpochStarted(origin="test.example", epoch=1, run_id=run_id, server_id="s1"))


def test_one_agent_serves_each_run_with_its_own_app_and_rounds_with_the_task(
    deployment: Deployment, enrol: Enrol, tmp_path: Path
) -> None:
    theirs, any_other = Trainer(tmp_path / "theirs"), Trainer(tmp_path / "any-other")
    agent = enrol(apps={"theirs": theirs.app}, app=any_other.app, epsilon=None)
    for run_id in ("theirs", "another"):
        start_run(deployment, run_id)
    deployment.instruct("phone", None, run_id="theirs")
    deployment.instruct("phone", None, run_id="another")
    deployment.instruct("phone", None, run_id="main", message_type="evaluate")
    deployment.ask("phone", None)
    agent.run(until=answered(4))
    assert [each.run_id for each in deployment.appended(types.UpdateSubmitted)] == ["theirs", "another", "main"]
    assert (theirs.count(), any_other.count()) == (1, 2)
    # The round is not the apps': the task declines it, for nobody has taught this device anything.
    assert [(each.reason, each.round_id) for each in deployment.appended(types.RoundDeclined)] == [("no-examples", "r0001")]


def test_a_round_of_a_run_with_an_app_of_its_own_is_paid_for_and_answered_by_that_app(
    deployment: Deployment, enrol: Enrol, tmp_path: Path
) -> None:
    theirs, any_other = Trainer(tmp_path / "theirs"), Trainer(tmp_path / "any-other")
    agent = enrol(apps={"theirs": theirs.app}, app=any_other.app)
    start_run(deployment, "theirs")
    opened = replace(deployment.opened("phone"), run_id="theirs")
    deployment.server.append(opened)
    deployment.instruct("phone", opened)
    agent.run(until=answered())
    (update,), (spent,) = deployment.appended(types.UpdateSubmitted), deployment.appended(types.BudgetSpent)
    assert (update.spend_seq, spent.run_id, update.content.metrics) == (0, "theirs", {"metrics": {"num-examples": 1}})
    assert (theirs.count(), any_other.count()) == (1, 0)


def test_no_app_of_a_device_with_a_budget_serves_what_no_mechanism_covers(
    deployment: Deployment, enrol: Enrol, tmp_path: Path
) -> None:
    theirs, any_other = Trainer(tmp_path / "theirs"), Trainer(tmp_path / "any-other")
    agent = enrol(apps={"theirs": theirs.app}, app=any_other.app)
    for run_id in ("theirs", "another"):
        start_run(deployment, run_id)
        deployment.instruct("phone", None, run_id=run_id)
        opened = replace(deployment.opened("phone", mechanism=None), run_id=run_id)
        deployment.server.append(opened)
        deployment.instruct("phone", opened)
    agent.run(until=answered(4))
    assert declined(deployment) == ["not-private"] * 4
    assert (theirs.count(), any_other.count(), deployment.appended(types.BudgetSpent)) == (0, 0, [])


def test_what_nobody_on_the_device_serves_is_declined_without_spending(deployment: Deployment, enrol: Enrol) -> None:
    agent = enrol(apps=None, epsilon=None)
    deployment.instruct("phone", None)
    terms = {"origin": "test.example", "model": "other", "epoch": 1, "release": "0000-o", "number": 0}
    deployment.server.append(
        types.ReleaseProposed(**terms, blob=deployment.base),  # type: ignore[arg-type]
        types.ReleasePublished(**terms, blob=deployment.base),  # type: ignore[arg-type]
    )
    other = replace(deployment.opened("phone"), model="other", base_release="0000-o")
    evaluation = deployment.opened("phone", mechanism=None)
    unknown = replace(deployment.opened("phone"), strategy="no-such")
    unsaid = replace(deployment.opened("phone"), hyperparameters={"update_bits": 4.0})
    deployment.server.append(other, evaluation, unknown, unsaid)
    deployment.instruct("phone", other)
    deployment.instruct("phone", evaluation, message_type="evaluate")
    deployment.instruct("phone", unknown)
    deployment.instruct("phone", unsaid)
    agent.run(until=answered(5))
    assert declined(deployment) == ["no-app", "other-model", "not-training", "unknown-program", "unknown-format"]
    assert deployment.appended(types.BudgetSpent) == []


# --- the gate ---


def test_a_round_without_privacy_is_declined_by_a_device_with_a_budget(
    deployment: Deployment, enrol: Enrol, trainer: Trainer
) -> None:
    agent = enrol()
    deployment.ask("phone", None)
    deployment.instruct("phone", None)
    opened = deployment.opened("phone")
    deployment.server.append(opened)
    deployment.instruct("phone", opened, message_type="evaluate")
    agent.run(until=answered(3))
    assert declined(deployment) == ["not-private"] * 3
    assert (trainer.count(), deployment.appended(types.BudgetSpent)) == (0, [])


def test_no_round_exceeds_the_budget_of_a_life(deployment: Deployment, enrol: Enrol, trainer: Trainer) -> None:
    for asked in range(1, 5):
        with enrol(epsilon=3.0) as agent:
            deployment.ask("phone")
            agent.run(until=answered(asked))
            assert agent.status().epsilon_spent <= 3.0
    assert trainer.count() == len(deployment.appended(types.BudgetSpent)) == 2
    assert declined(deployment) == ["budget-exceeded"] * 2
    refused = deployment.appended(types.BudgetRefused)
    assert [each.budget_epsilon for each in refused] == [3.0] * 2
    assert all(each.would_be_epsilon is not None and each.would_be_epsilon > 3 for each in refused)


def test_a_mechanism_without_noise_is_declined(deployment: Deployment, enrol: Enrol, trainer: Trainer) -> None:
    agent = enrol()
    deployment.ask("phone", Mechanism(1.0, 1e-9, 1.0, 1, 1.0))
    agent.run(until=answered())
    assert (declined(deployment), trainer.count()) == (["budget-exceeded"], 0)
    assert deployment.appended(types.BudgetRefused)[0].would_be_epsilon is None


def test_a_server_cannot_drain_the_budget_in_a_day(deployment: Deployment, enrol: Enrol, trainer: Trainer) -> None:
    agent = enrol(epsilon=1000.0, settings=Settings(eligibility=Eligibility(rounds_per_day=2)))
    for _ in range(4):
        deployment.ask("phone")
    agent.run(until=answered(4))
    assert (declined(deployment), trainer.count()) == (["too-many-rounds"] * 2, 2)


def test_nor_with_the_steps_of_one_round(deployment: Deployment, enrol: Enrol, trainer: Trainer) -> None:
    agent = enrol(epsilon=1000.0, settings=Settings(eligibility=Eligibility(rounds_per_day=2)))
    opened = deployment.opened("phone")
    deployment.server.append(opened)
    for step in range(4):
        deployment.instruct("phone", opened, step=step)
    agent.run(until=answered(4))
    assert (declined(deployment), trainer.count()) == (["too-many-rounds"] * 2, 2)


def test_nor_of_a_device_whose_restored_store_has_forgotten_its_rounds(
    deployment: Deployment, enrol: Enrol, trainer: Trainer, tmp_path: Path
) -> None:
    settings = Settings(eligibility=Eligibility(rounds_per_day=1))
    with enrol(epsilon=1000.0) as agent:
        back_up(agent, tmp_path / "backup")
        deployment.ask("phone")
        agent.run(until=answered())
    with Agent.open(tmp_path / "backup", apps={"main": trainer.app}, settings=settings) as restored:
        deployment.ask("phone")
        restored.run(until=answered())
    assert (declined(deployment), trainer.count()) == (["too-many-rounds"], 1)


def test_only_a_release_of_the_log_is_trained_on(deployment: Deployment, enrol: Enrol, trainer: Trainer) -> None:
    agent = enrol()
    crafted = deployment.blobs.put(tensors.encode({"head.weight": np.ones((3, 2), np.float32)}))
    for opened in (
        replace(deployment.opened("phone"), base=crafted),
        replace(deployment.opened("phone"), model="other"),
        deployment.opened("tablet"),
    ):
        deployment.server.append(opened)
        deployment.instruct("phone", opened)
    opened = deployment.opened("phone")
    deployment.server.append(opened)
    deployment.instruct("phone", opened, base=crafted)
    agent.run(until=answered(4))
    assert (declined(deployment), trainer.count()) == (["wrong-base", "wrong-base", "not-in-cohort", "wrong-base"], 0)


def test_a_base_that_has_not_arrived_is_waited_for_without_spending(deployment: Deployment, enrol: Enrol) -> None:
    agent = enrol()
    path = deployment.folder / "blobs" / deployment.base.sha256[:2] / deployment.base.sha256[2:]
    content = path.read_bytes()
    path.unlink()
    deployment.ask("phone")
    agent.run(until=passes(2))
    assert deployment.appended(types.BudgetSpent) == []
    deployment.blobs.put([content])
    agent.run(until=answered())
    assert agent.status().answers == {"submitted": 1}


def test_an_instruction_that_the_server_did_not_sign_is_rejected(deployment: Deployment, enrol: Enrol, trainer: Trainer) -> None:
    agent = enrol(epsilon=None)
    real, deployment.server = deployment.server, EventWriter(deployment.log, SigningKey.generate())
    deployment.instruct("phone", None)
    deployment.server = real
    deployment.instruct("tablet", None)
    agent.run(until=passes(2))
    assert (trainer.count(), agent.status().answers) == (0, {})


def test_an_instruction_of_a_fenced_server_is_rejected(deployment: Deployment, enrol: Enrol, trainer: Trainer) -> None:
    agent = enrol()
    deployment.server.append(types.EpochStarted(origin="test.example", epoch=2, run_id="main", server_id="s2"))
    deployment.ask("phone")
    agent.run(until=passes(2))
    assert trainer.count() == 0
    opened = deployment.opened("phone", epoch=2)
    deployment.server.append(opened)
    deployment.instruct("phone", opened)
    agent.run(until=answered())
    assert trainer.count() == 1


def test_what_is_too_late_is_let_pass(deployment: Deployment, enrol: Enrol, trainer: Trainer) -> None:
    agent = enrol()
    closed, aborted, late, short = (
        deployment.opened("phone"),
        deployment.opened("phone"),
        deployment.opened("phone", deadline_s=1e-6),
        deployment.opened("phone"),
    )
    for opened in (closed, aborted, late):
        deployment.server.append(opened)
        deployment.instruct("phone", opened)
    deployment.server.append(short)
    deployment.instruct("phone", short, ttl_s=1e-6)
    common = {"origin": "test.example", "epoch": 1, "run_id": "main"}
    deployment.server.append(
        types.RoundClosed(**common, step=1, accepted=[], round_id=closed.round_id),  # type: ignore[arg-type]
        types.RoundAborted(**common, round_id=aborted.round_id, reason="quorum"),  # type: ignore[arg-type]
    )
    agent.run(until=answered(2))
    assert agent.status().answers == {"late": 2}
    assert (trainer.count(), deployment.appended(types.BudgetSpent), declined(deployment)) == (0, [], [])


def test_whoever_is_at_work_for_a_buffered_round_that_has_closed_pays_and_answers(
    deployment: Deployment, enrol: Enrol, trainer: Trainer
) -> None:
    agent = enrol()
    opened = replace(deployment.opened("phone"), max_staleness=3)
    deployment.server.append(opened)
    instruction = deployment.instruct("phone", opened)
    at_work = [types.Exclusion("phone", types.AT_WORK)]
    deployment.server.append(types.RoundClosed("test.example", 1, "main", 1, [], at_work, opened.round_id))
    agent.run(until=answered())
    [update] = deployment.appended(types.UpdateSubmitted)
    assert (update.instruction_id, update.round_id, update.spend_seq) == (instruction, opened.round_id, 0)
    assert trainer.count() == 1


@pytest.mark.parametrize("author", ["another device", "the device itself", "the server"])
def test_one_stamp_of_the_future_makes_no_instruction_late(
    deployment: Deployment, enrol: Enrol, trainer: Trainer, author: str
) -> None:
    agent = enrol()
    deployment.ask("phone")
    with clock_ahead(3 * DAY_S):
        if author == "another device":
            Agent.enrol(deployment.folder, deployment.folder.parent / "other", client_id="other", key_from="file").close()
        elif author == "the device itself":
            agent.run(until=lambda status: True)
        else:
            deployment.release()
    deployment.ask("phone")
    agent.run(until=answered(2))
    assert agent.status().answers == {"submitted": 2}


def test_what_the_server_decided_long_after_an_instruction_makes_it_late(
    deployment: Deployment, enrol: Enrol, trainer: Trainer
) -> None:
    agent = enrol()
    deployment.ask("phone")
    with clock_ahead(601):
        deployment.release()
    agent.run(until=answered())
    assert (agent.status().answers, trainer.count()) == ({"late": 1}, 0)


def test_a_stamp_of_the_future_opens_no_second_day_and_closes_none(
    deployment: Deployment, enrol: Enrol, trainer: Trainer
) -> None:
    agent = enrol(epsilon=1000.0, settings=Settings(eligibility=Eligibility(rounds_per_day=2)))
    deployment.ask("phone")
    with clock_ahead(3 * DAY_S):
        agent.run(until=answered(1))
    for count in (2, 3):
        with clock_ahead(5 * DAY_S):
            Agent.enrol(deployment.folder, deployment.folder.parent / f"{count}", client_id=f"c{count}", key_from="file").close()
        deployment.ask("phone")
        agent.run(until=answered(count))
    assert (declined(deployment), trainer.count()) == (["too-many-rounds"], 2)
    with clock_ahead(DAY_S + 600):
        deployment.ask("phone")
        deployment.ask("phone")
        agent.run(until=answered(5))
    assert (declined(deployment), trainer.count()) == (["too-many-rounds"], 4)


@pytest.mark.slow
def test_the_classifier_declines_without_examples_or_without_its_base_model(deployment: Deployment, enrol: Enrol) -> None:
    with enrol(apps=None) as agent:
        deployment.ask("phone")
        agent.run(until=answered(1))
        agent.feedback(agent.record("hello", "loan").response_id, thumb="up")
        deployment.ask("phone")
        agent.run(until=lambda status: status.settled and sum(status.answers.values()) == 2)
    assert declined(deployment) == ["no-examples", "no-model"]
    assert deployment.appended(types.BudgetSpent) == []


# --- failures of the app ---


def test_an_app_that_fails_is_declined_by_its_exceptions_name_alone(deployment: Deployment, enrol: Enrol) -> None:
    def broken(message: Message, context: Context) -> Message:
        raise ValueError(SECRET)

    agent = enrol(apps={"main": broken})
    deployment.ask("phone")
    agent.run(until=answered())
    assert [(each.reason, each.detail) for each in deployment.appended(types.RoundDeclined)] == [
        ("client-error", "app-failed ValueError")
    ]
    assert SECRET.encode() not in deployment.bytes()
    assert len(deployment.appended(types.BudgetSpent)) == 1


@pytest.mark.parametrize("answer", [None, 7, RecordDict()])
def test_an_app_that_answers_nonsense_is_declined(deployment: Deployment, enrol: Enrol, answer: object) -> None:
    agent = enrol(apps={"main": lambda message, context: answer})
    deployment.ask("phone")
    agent.run(until=answered())
    assert declined(deployment) == ["client-error"]


def test_an_answer_too_large_for_an_event_is_declined(deployment: Deployment, enrol: Enrol) -> None:
    def verbose(message: Message, context: Context) -> Message:
        return Message(RecordDict({"m": MetricRecord({f"metric-{i}": i for i in range(9000)})}), reply_to=message)

    agent = enrol(apps={"main": verbose}, epsilon=None)
    deployment.instruct("phone", None)
    agent.run(until=answered())
    assert declined(deployment) == ["client-error"]


# --- killed at every step ---


def fatal_append(deployment: Deployment, kind: type[types.Payload], when: str) -> None:
    append = type(deployment.log).append

    def fatal(log: Any, events: Sequence[Event]) -> None:
        due = any(event.type == kind.type_name for event in events)
        if due and when == "before":
            die()
        append(log, events)
        if due:
            die()

    type(deployment.log).append = fatal  # type: ignore[method-assign,assignment]


@pytest.mark.parametrize(
    ("point", "outcome", "trained"),
    [
        ("before the spend is in the log", "interrupted", 0),
        ("after the spend is in the log", "interrupted", 0),
        ("while it trains", "interrupted", 1),
        ("before the result is kept", "interrupted", 1),
        ("before the result is in the log", "submitted", 1),
        ("after the result is in the log", "submitted", 1),
    ],
)
def test_wherever_it_is_killed_a_device_pays_once_and_at_most_one_result_leaves(
    deployment: Deployment, enrol: Enrol, trainer: Trainer, in_child: InChild, point: str, outcome: str, trained: int
) -> None:
    with enrol() as agent:
        agent.run(until=passes(1))
    deployment.ask("phone")

    def work() -> None:
        when, _, what = point.partition(" the ")
        if what in ("spend is in the log", "result is in the log"):
            fatal_append(deployment, types.BudgetSpent if "spend" in what else types.UpdateSubmitted, when)
        elif point == "while it trains":
            trainer.fatal = True
        else:
            InstructionHandler._submit = die  # type: ignore[method-assign,assignment]
        enrol().run(until=answered())

    assert in_child(work) == -9
    for _ in range(2):
        with enrol() as agent:
            agent.run(until=answered())
            assert agent.status().answers == {outcome: 1}
    assert trainer.count() == trained
    assert len(deployment.appended(types.BudgetSpent)) == 1
    updates = deployment.appended(types.UpdateSubmitted)
    assert (len(updates), declined(deployment)) == ((1, []) if outcome == "submitted" else (0, ["interrupted"]))
    own = deployment.appended(types.ClientEvent)
    assert [each.seq for each in own] == list(range(len(own)))
    # A later round goes on as if nothing had happened, and the ledger's chain is whole.
    deployment.ask("phone")
    with enrol() as agent:
        agent.run(until=answered(2))
        assert (agent.status().spends, agent.status().suspended) == (2, None)


def test_a_blob_store_that_fails_after_the_spend_costs_the_round_and_not_the_device(
    deployment: Deployment, enrol: Enrol, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fedloop_clients.loop.RETRY_S", 0.01)
    agent = enrol()
    deployment.ask("phone")
    with monkeypatch.context() as broken:

        def away(*_: object) -> None:
            raise UnreachableError("the blob store is away")

        broken.setattr(type(deployment.blobs), "put", away)
        agent.run(until=answered())
    assert (declined(deployment), trainer.count(), len(deployment.appended(types.BudgetSpent))) == (["interrupted"], 1, 1)


# --- copies of the store ---


def test_a_store_from_before_the_round_pays_and_trains_no_second_time(
    deployment: Deployment, enrol: Enrol, trainer: Trainer, tmp_path: Path
) -> None:
    enrol().close()
    shutil.copytree(tmp_path / "store", tmp_path / "backup")
    deployment.ask("phone")
    with enrol() as agent:
        agent.run(until=answered())
    shutil.rmtree(tmp_path / "store")
    shutil.copytree(tmp_path / "backup", tmp_path / "store")
    with enrol() as restored:
        restored.run(until=passes(2))
        assert (trainer.count(), restored.status().spends) == (1, 1)
        deployment.ask("phone")
        restored.run(until=answered())
    assert [each.spend_seq for each in deployment.appended(types.BudgetSpent)] == [0, 1]


def test_a_spend_that_another_copy_makes_at_the_same_time_stops_the_device_before_it_trains(
    deployment: Deployment, enrol: Enrol, trainer: Trainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    agent = enrol()
    instruction = deployment.ask("phone")
    append = type(deployment.log).append

    def raced(log: Any, events: Sequence[Event]) -> None:
        if any(event.type == types.BudgetSpent.type_name for event in events):
            other = types.BudgetSpent(
                origin="test.example",
                client_id="phone",
                seq=99,
                spend_seq=0,
                previous="",
                run_id="main",
                instruction_id=instruction,
                mechanism=Mechanism(1.0, 3.0, 1.0, 1, 1.0),
            )
            append(log, [agent.identity.writer(deployment.log).event(other)])
        append(log, events)

    monkeypatch.setattr(type(deployment.log), "append", raced)
    with pytest.raises(SuspendedError):
        agent.run(until=answered())
    assert trainer.count() == 0
    monkeypatch.undo()
    with pytest.raises(SuspendedError):
        agent.run(until=answered())
    assert (trainer.count(), deployment.appended(types.UpdateSubmitted)) == (0, [])
