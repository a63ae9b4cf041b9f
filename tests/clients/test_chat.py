"""Chatting with a language model on the device: what it answers, what is kept of it, and what leaves the device."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from clients.conftest import settled
from fedloop_clients import Agent
from fedloop_tasks.task import Interaction
from fedloop_tasks.turns import Turn

if TYPE_CHECKING:
    from clients.chatted import Chatted

HELLO = [{"role": "user", "content": "where is my card"}]
TALK = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "the card is lost"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "where is my card"},
]


@pytest.fixture(scope="module")
def chatted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chatted]:
    from clients.chatted import chatted_in  # imports torch

    made = chatted_in(tmp_path_factory.mktemp("chatted"))
    yield made
    made.log.close()


@pytest.fixture
def agent(chatted: Chatted, tmp_path: Path) -> Iterator[Agent]:
    with chatted.enrol(tmp_path / "store") as agent:
        yield agent


def judged(agent: Agent) -> list[Interaction]:
    agent.run(until=settled)
    return [*agent._device.interactions.judged()]


def kept(agent: Agent) -> int:
    """How many responses the store has."""
    return int(agent._device.store.rows("SELECT count(*) FROM responses")[0][0])


# --- answers ---


@pytest.mark.parametrize("messages", [HELLO, TALK])
def test_an_answer_is_the_models_own_with_the_release_in_force(
    chatted: Chatted, agent: Agent, messages: list[dict[str, str]]
) -> None:
    turns = [Turn(each["role"], each["content"]) for each in messages]  # type: ignore[arg-type]
    for seed in (1, 2):
        release = chatted.train(seed)
        chatted.model.load(chatted.arrays)
        expected = chatted.model.generate(turns)
        response = agent.chat(messages)
        assert (response.text, response.tokens, response.finished) == (expected.text, expected.tokens, expected.finished)
        assert response.confidence == pytest.approx(expected.confidence)
        assert (response.release, response.prompt_tokens) == (release, len(chatted.model.chat.prompt(turns)))


def test_a_stream_gives_the_same_in_pieces_and_is_kept_once_it_is_read(agent: Agent) -> None:
    whole = agent.chat(TALK)
    stream = agent.chat(TALK, stream=True)
    pieces = []
    for piece in stream:
        assert stream.response is None
        pieces.append(piece)
    assert len(pieces) > 1
    assert all(pieces)
    assert stream.response is not None
    assert stream.response.text == "".join(pieces) == whole.text
    assert (stream.response.tokens, stream.response.finished) == (whole.tokens, whole.finished)
    assert (stream.response.response_id, stream.response.release) == (stream.response_id, stream.release)
    assert list(stream) == []
    assert kept(agent) == 2
    agent.feedback(stream.response_id, thumb="up")
    (found,) = judged(agent)
    assert found.response is not None


def test_an_answer_that_is_drawn_is_the_same_for_the_same_seed_alone(agent: Agent) -> None:
    def drawn(seed: int | None) -> str:
        return agent.chat(HELLO, temperature=1.5, seed=seed).text

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(None) != drawn(None)


def test_an_answer_has_at_most_the_tokens_that_were_asked_for_and_that_there_is_room_for(agent: Agent) -> None:
    assert agent.chat(HELLO, max_tokens=3).tokens == 3
    assert not agent.chat(HELLO, max_tokens=3).finished
    long = [{"role": "user", "content": "z" * 100}]
    response = agent.chat(long, max_tokens=1000)
    assert response.prompt_tokens + response.tokens <= 128
    assert not response.finished
