"""Light now: what a user has corrected is answered as corrected, on this device alone, until the release answers so by itself."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from clients.chatted import chatted_in
from clients.classified import TEXTS, enrol
from clients.conftest import settled
from clients.sidecar_served import serving
from fedloop_clients import Agent
from fedloop_clients.device import Settings
from fedloop_events import types

if TYPE_CHECKING:
    from clients.chatted import Chatted
    from clients.classified import Classified

pytestmark = pytest.mark.slow

ASKED = "somebody has stolen my card"
ALIKE = "somebody stole my card"
OTHER = "how do I change the PIN"
HELLO = [{"role": "user", "content": "where is my card"}]


@pytest.fixture
def device(classified: Classified, tmp_path: Path) -> Iterator[Agent]:
    with enrol(classified, tmp_path / "store") as agent:
        yield agent


@pytest.fixture(scope="module")
def chatted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chatted]:
    made = chatted_in(tmp_path_factory.mktemp("chatted"))
    made.find_words([*HELLO])
    yield made
    made.log.close()


@pytest.fixture
def chatting(chatted: Chatted, tmp_path: Path) -> Iterator[Agent]:
    chatted.train(chatted.talkative)
    with chatted.enrol(tmp_path / "store") as agent:
        yield agent


def published(deployment: Classified | Chatted, agent: Agent) -> list[types.FeedbackRecorded]:
    agent.run(until=settled)
    return [each for each in deployment.appended(types.FeedbackRecorded) if each.client_id == agent.identity.client_id]


def correct(agent: Agent, text: str = ASKED, label: str = "transfer") -> str:
    """Ask, and say that another label is right; the id of that feedback."""
    return agent.feedback(agent.predict(text).response_id, label=label).feedback_id


# --- a classifier ---


def test_a_corrected_label_answers_the_same_and_a_similar_text_at_once(device: Agent) -> None:
    before = device.predict(ASKED)
    assert (before.label, before.remembered) == ("card-lost", False)
    device.feedback(before.response_id, label="transfer")
    same, alike, other = (device.predict(each) for each in (ASKED, ALIKE, OTHER))
    assert (same.label, same.remembered, same.confidence) == ("transfer", True, 1.0)
    assert (alike.label, alike.remembered) == ("transfer", True)
    assert 0.8 <= alike.confidence < 1
    assert not other.remembered


def test_the_label_that_was_named_last_is_remembered(device: Agent) -> None:
    correct(device)
    correct(device, label="loan")
    assert device.predict(ASKED).label == "loan"
    correct(device, label="card-lost")
    found = device.predict(ASKED)
    assert (found.label, found.remembered) == ("card-lost", False)


def test_what_is_taken_back_is_remembered_no_more(device: Agent) -> None:
    feedback_id = correct(device)
    assert device.predict(ASKED).remembered
    device.retract(feedback_id)
    assert not device.predict(ASKED).remembered


def test_a_correction_is_remembered_after_it_is_published_and_the_store_opened_again(device: Agent, tmp_path: Path) -> None:
    correct(device)
    device.run(until=settled)
    device.close()
    with Agent.open(tmp_path / "store", masker=device._masking._masker) as again:
        assert again.predict(ASKED).remembered


def test_a_release_that_has_learnt_the_correction_answers_itself(classified: Classified, device: Agent) -> None:
    correct(device)
    assert device.predict(ALIKE).remembered
    before = dict(classified.arrays)
    weight = before["head.weight"].copy()
    weight[list(TEXTS).index("transfer")] = classified.model.embed([ASKED])[0] * np.float32(2)
    classified.arrays = before | {"head.weight": weight}
    release = classified.release()
    for text in (ASKED, ALIKE):
        found = device.predict(text)
        assert (found.label, found.release, found.remembered) == ("transfer", release, False)
    classified.arrays = before
    classified.release()
    assert device.predict(ASKED).remembered


def test_nothing_is_remembered_where_that_is_switched_off(classified: Classified, tmp_path: Path) -> None:
    with enrol(classified, tmp_path / "off", settings=Settings(remember=False)) as agent:
        correct(agent)
        assert agent.predict(ASKED).label == "card-lost"


def test_content_with_a_remembered_label_names_it_and_confirms_nothing_of_the_release(
    classified: Classified, device: Agent
) -> None:
    correct(device)
    liked = device.feedback(device.predict(ALIKE).response_id, thumb="up", signal="copied")
    starred = device.feedback(device.predict(ALIKE).response_id, rating=5)
    assert (liked.teaches, starred.teaches) == ("transfer", "transfer")
    assert [each.label for each in device._device.examples()] == ["transfer"] * 3
    for each in published(classified, device):
        assert (each.predicted, each.label, each.thumb, each.rating, each.signal) == ("card-lost", "transfer", None, None, None)


def test_a_rejected_answer_is_given_no_more_and_says_nothing_of_the_release(classified: Classified, device: Agent) -> None:
    feedback_id = correct(device)
    rejected = device.feedback(device.predict(ALIKE).response_id, thumb="down")
    assert rejected.teaches is None
    assert not device.predict(ALIKE).remembered
    assert [each.feedback_id for each in published(classified, device)] == [feedback_id]
    device.retract(rejected.feedback_id)
    assert device.predict(ALIKE).remembered


def test_a_better_label_for_a_similar_text_leaves_the_first_text_its_own(device: Agent) -> None:
    correct(device)
    device.feedback(device.predict(ALIKE).response_id, thumb="down", label="loan")
    assert (device.predict(ASKED).label, device.predict(ALIKE).label) == ("transfer", "loan")


def test_the_memory_of_labels_is_bounded(device: Agent, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedloop_clients import remembering

    monkeypatch.setattr(remembering, "_LABELS", remembering._LABELS.replace(f"LIMIT {remembering.MOST}", "LIMIT 2"))
    correct(device)
    for text in (OTHER, "what is a loan"):
        correct(device, text)
        device.predict(text)
    assert device._memory is not None
    assert len(device._memory._known) <= 2
    assert not device.predict(ASKED).remembered


# --- a language model ---


def test_a_corrected_answer_is_given_to_the_same_messages_at_once_whole_or_streamed(chatting: Agent) -> None:
    first = chatting.chat(HELLO)
    assert not first.remembered
    chatting.feedback(first.response_id, correction="It is on its way.")
    again = chatting.chat(HELLO)
    assert (again.text, again.remembered, again.finished, again.release) == ("It is on its way.", True, True, first.release)
    with chatting.chat(HELLO, stream=True, stop=["way"]) as stream:
        assert "".join(stream) == "It is on its "
    assert stream.response is not None
    assert stream.response.remembered
    system = [{"role": "system", "content": "be short"}, *HELLO]
    assert not chatting.chat(system).remembered
    assert not chatting.chat(HELLO, temperature=1.0, seed=1).remembered
    assert not chatting.chat(HELLO, max_tokens=2).remembered


def test_the_correction_that_the_release_writes_itself_is_the_releases(chatted: Chatted, chatting: Agent) -> None:
    first = chatting.chat(HELLO)
    chatting.feedback(first.response_id, correction=f" {first.text} ")
    assert not chatting.chat(HELLO).remembered
    chatted.train(chatted.talkative + 1)
    assert chatting.chat(HELLO).remembered
    chatted.train(chatted.talkative)
    assert not chatting.chat(HELLO).remembered


def test_a_correction_in_which_the_masker_left_placeholders_is_no_answer(chatted: Chatted, chatting: Agent) -> None:
    chatting.feedback(chatting.chat(HELLO).response_id, correction="call 4711")
    assert chatting.chat(HELLO).text == "call 4711"
    chatting.run(until=settled)
    assert not chatting.chat(HELLO).remembered
    chatting.feedback(chatting.chat(HELLO).response_id, correction="call the bank")
    chatting.run(until=settled)
    assert chatting.chat(HELLO).text == "call the bank"


def test_judgements_of_a_remembered_answer_stay_on_the_device(chatted: Chatted, chatting: Agent) -> None:
    chatting.feedback(chatting.chat(HELLO).response_id, correction="It is on its way.")
    chatting.feedback(chatting.chat(HELLO).response_id, thumb="up")
    chatting.feedback(chatting.chat(HELLO).response_id, thumb="up", comment="thanks")
    found = published(chatted, chatting)
    assert [(each.thumb, each.comment and each.comment.text) for each in found] == [(None, None), (None, "thanks")]
    assert chatting.status().settled
    chatting.feedback(chatting.chat(HELLO).response_id, thumb="down")
    assert not chatting.chat(HELLO).remembered
    assert len(published(chatted, chatting)) == 2


def test_the_sidecar_says_that_an_answer_is_remembered(chatting: Agent) -> None:
    with serving(chatting) as served:

        def ask() -> Any:
            return served.http.post("/v1/chat/completions", json={"messages": HELLO}).json()

        first = ask()
        assert "remembered" not in first["fedloop"]
        assert served.feedback(first["id"], correction="It is on its way.", signal="regenerated").status_code == 200
        again = ask()
        assert again["choices"][0]["message"]["content"] == "It is on its way."
        assert again["fedloop"]["remembered"] is True
