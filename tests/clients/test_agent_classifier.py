"""The agent with a real model: a real encoder, a real masker, predictions and rounds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from clients.classified import TEXTS, Classified, enrol
from clients.conftest import ORIGIN
from fedloop_clients import Agent
from fedloop_clients.device import Settings
from fedloop_events import types
from fedloop_events.blobs import tensors
from fedloop_events.types import Mechanism, RoundOpened
from fedloop_tasks import updates
from flwr.app import Context, Message, MetricRecord, RecordDict
from msgspec.structs import replace

pytestmark = pytest.mark.slow

MECHANISM = Mechanism(sampling_rate=0.5, noise_multiplier=1.0, clip_norm=1.0, steps=2, divisor=4.0)


def test_a_device_predicts_learns_and_contributes(classified: Classified, tmp_path: Path) -> None:
    with Agent.enrol(classified.folder, tmp_path / "store", key_from="file", epsilon=8.0) as agent:
        for label, text in TEXTS.items():
            response = agent.predict(f"Hello, this is John Smith. {text}")
            assert response.label == label
            assert 0 < response.confidence <= 1
            agent.feedback(response.response_id, thumb="up")
        agent.run(until=lambda status: status.settled)
        recorded = classified.appended(types.FeedbackRecorded)
        assert len(recorded) == 3
        assert all("John" not in each.text.text and "<PERSON_1>" in each.text.text for each in recorded)
        head = ["head.weight", "head.bias"]
        for program, upload, mechanism in (
            ("sums", ["sums"], Mechanism(1.0, 2.0, 1.0, 1, 1.0)),
            ("ffa", [name for name in classified.arrays if name.endswith(".B")] + head, Mechanism(0.5, 2.0, 1.0, 2, 2.0)),
        ):
            opened = replace(
                classified.opened(agent.identity.client_id, mechanism=mechanism),
                strategy=program,
                upload=upload,
                max_upload_bytes=10**7,
            )
            classified.server.append(opened)
            instruction = classified.instruct(agent.identity.client_id, opened)
            agent.run(until=lambda status: sum(status.answers.values()) == classified.rounds and status.settled)
            update = classified.appended(types.UpdateSubmitted)[-1]
            assert update.instruction_id == instruction
            arrays = tensors.decode(classified.blobs.get(update.content.arrays["arrays"]))
            assert list(arrays) == upload
            assert all(np.isfinite(array).all() for array in arrays.values())
        before = agent.predict(TEXTS["loan"])
        classified.arrays["head.weight"] = np.roll(classified.arrays["head.weight"], 1, axis=0)
        release = classified.release()
        after = agent.predict(TEXTS["loan"])
        assert (before.label, after.label, after.release) == ("loan", "transfer", release)


def opened(classified: Classified, agent: Agent, mechanism: Mechanism | None, **more: Any) -> RoundOpened:
    """The terms of a training round."""
    upload = [name for name in classified.arrays if not name.endswith(".A")]
    terms = {"upload": upload, "max_upload_bytes": 10**7} | more
    return replace(classified.opened(agent.identity.client_id, mechanism=mechanism), **terms)


def contribute(classified: Classified, agent: Agent, terms: RoundOpened) -> types.UpdateSubmitted | types.RoundDeclined:
    """What the device answers to a round."""
    before = sum(agent.status().answers.values())
    classified.server.append(terms)
    instruction = classified.instruct(agent.identity.client_id, terms)
    agent.run(until=lambda status: sum(status.answers.values()) > before and status.settled)
    answers: list[types.UpdateSubmitted | types.RoundDeclined] = [*classified.appended(types.UpdateSubmitted)]
    answers += classified.appended(types.RoundDeclined)
    (answer,) = [each for each in answers if each.instruction_id == instruction]
    return answer


def teach(agent: Agent) -> None:
    for label, text in TEXTS.items():
        agent.feedback(agent.record(text, label).response_id, thumb="up")


@pytest.mark.parametrize("taught", [False, True])
def test_a_private_answer_holds_the_upload_and_a_constant(classified: Classified, tmp_path: Path, taught: bool) -> None:
    settings = Settings(min_examples=0)
    with enrol(classified, tmp_path / "store", settings=settings) as agent:
        if taught:
            teach(agent)
        terms = opened(classified, agent, MECHANISM)
        update = contribute(classified, agent, terms)
        assert isinstance(update, types.UpdateSubmitted)
        assert (update.content.metrics, update.content.configs) == ({"metrics": {"num-examples": 1}}, {})
        assert list(update.content.arrays) == ["arrays"]
        got = tensors.decode(classified.blobs.get(update.content.arrays["arrays"]))
        shapes = classified.model.shapes
        assert [(name, value.shape) for name, value in got.items()] == [(name, shapes[name]) for name in terms.upload]
        assert {value.dtype for value in got.values()} == {np.dtype(np.float32)}


def test_an_answer_without_privacy_counts_the_examples(classified: Classified, tmp_path: Path) -> None:
    with enrol(classified, tmp_path / "store", epsilon=None) as agent:
        teach(agent)
        update = contribute(classified, agent, opened(classified, agent, None))
        assert isinstance(update, types.UpdateSubmitted)
        assert update.content.metrics == {"metrics": {"num-examples": 3}}


def test_an_answer_in_8_bits_stands_for_what_was_trained(classified: Classified, tmp_path: Path) -> None:
    with enrol(classified, tmp_path / "store", epsilon=None) as agent:
        teach(agent)
        whole, few = (opened(classified, agent, None, hyperparameters=each) for each in ({}, {"update_bits": 8.0}))
        few = replace(few, number=whole.number)  # the order of training follows from it
        answers = [contribute(classified, agent, each) for each in (whole, few)]
        got = []
        for answer in answers:
            assert isinstance(answer, types.UpdateSubmitted)
            got.append(tensors.decode(classified.blobs.get(answer.content.arrays["arrays"])))
        assert [each.dtype for each in got[1].values()] == [np.float32, *[np.int8] * len(few.upload)]
        decoded = updates.decode(few, classified.arrays, got[1])
        for name, values in got[0].items():
            largest = np.abs(values - classified.arrays[name]).max()
            assert np.abs(decoded[name] - values).max() <= largest / 254 * 1.001 + 1e-6


def test_training_starts_at_the_rounds_release_and_leaves_the_model_as_it_was(classified: Classified, tmp_path: Path) -> None:
    with enrol(classified, tmp_path / "store") as agent:
        teach(agent)
        agent.predict("hello")
        before = dict(classified.arrays)
        classified.arrays = {name: value + np.float32(0.01) for name, value in before.items()}
        classified.release()
        still = opened(classified, agent, MECHANISM, hyperparameters={"head_lr": 0.0, "lora_lr": 0.0})
        update = contribute(classified, agent, still)
        assert isinstance(update, types.UpdateSubmitted)
        got = tensors.decode(classified.blobs.get(update.content.arrays["arrays"]))
        assert all(value.tobytes() == classified.arrays[name].tobytes() for name, value in got.items())
        with agent._device.models.borrowed(classified.model.spec) as held:
            assert all(value.tobytes() == before[name].tobytes() for name, value in held.model.arrays().items())


def test_what_the_program_cannot_do_is_declined_and_leaves_the_model_as_it_was(classified: Classified, tmp_path: Path) -> None:
    with enrol(classified, tmp_path / "store", epsilon=1000.0) as agent:
        teach(agent)
        agent.predict("hello")
        whole = dict(classified.arrays)
        wrong = opened(classified, agent, MECHANISM, hyperparameters={"head_lr": -1.0})
        unknown = opened(classified, agent, MECHANISM, upload=["head.other"])
        classified.arrays = {"head.weight": whole["head.weight"]}
        classified.release()
        partial = opened(classified, agent, MECHANISM)
        for terms, error in ((wrong, "TermsError"), (unknown, "TensorError"), (partial, "TensorError")):
            answer = contribute(classified, agent, terms)
            assert isinstance(answer, types.RoundDeclined)
            assert (answer.reason, answer.detail) == ("client-error", error)
        with agent._device.models.borrowed(classified.model.spec) as held:
            assert all(value.tobytes() == whole[name].tobytes() for name, value in held.model.arrays().items())
        classified.arrays = whole
        classified.release()


def test_one_agent_learns_in_rounds_and_serves_another_run_with_an_app(classified: Classified, tmp_path: Path) -> None:
    def echo(message: Message, context: Context) -> Message:
        return Message(RecordDict({"metrics": MetricRecord({"seen": 1})}), reply_to=message)

    classified.server.append(types.EpochStarted(origin=ORIGIN, epoch=1, run_id="theirs", server_id="s1"))
    with enrol(classified, tmp_path / "store", epsilon=None, apps={"theirs": echo}) as agent:
        teach(agent)
        other = classified.instruct(agent.identity.client_id, None, run_id="theirs", message_type="query")
        update = contribute(classified, agent, opened(classified, agent, MECHANISM))
        assert isinstance(update, types.UpdateSubmitted)
        assert (update.run_id, update.spend_seq) == ("main", 0)
        (echoed,) = [each for each in classified.appended(types.UpdateSubmitted) if each.instruction_id == other]
        assert (echoed.content.metrics, echoed.mechanism, echoed.round_id) == ({"metrics": {"seen": 1}}, None, None)
        assert agent.status().answers == {"submitted": 2}
