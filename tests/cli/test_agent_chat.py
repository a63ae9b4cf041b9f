"""`fedloop agent chat`: what is typed is answered, and what commands do about an answer is in the store."""

from __future__ import annotations

import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from cli.conftest import Fedloop
from clients.chatted import Chatted, chatted_in
from clients.classified import TEXTS, classified_in
from clients.classified import enrol as enrol_classified
from fedloop_cli.conversing import COMMANDS, Conversation
from fedloop_clients import Agent
from fedloop_clients.feedback import FeedbackInput
from rich.console import Console


@pytest.fixture(scope="module")
def chatted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chatted]:
    made = chatted_in(tmp_path_factory.mktemp("chatted"))
    yield made
    made.log.close()


@pytest.fixture
def agent(chatted: Chatted, tmp_path: Path) -> Iterator[Agent]:
    with chatted.enrol(tmp_path / "store") as agent:
        yield agent


class Talk:
    """A conversation, and what its screen shows."""

    def __init__(self, agent: Agent) -> None:
        self.agent, self._file = agent, io.StringIO()
        self.conversation = Conversation(agent, Console(file=self._file, width=200, highlight=False))

    def __call__(self, line: str) -> str:
        """What is shown after a line."""
        start = self._file.tell()
        assert self.conversation.take(line)
        return self._file.getvalue()[start:].removesuffix("\n")

    def given(self) -> list[FeedbackInput]:
        """The feedback that the device has, oldest first."""
        rows = self.agent._device.store.rows(
            "SELECT thumb, preferred_over, signal,"
            " (SELECT raw FROM texts WHERE owner = feedback_id AND kind = 'correction') FROM feedback ORDER BY number"
        )
        return [FeedbackInput(thumb=row[0], preferred_over=row[1], signal=row[2], correction=row[3]) for row in rows]

    def answers(self) -> list[tuple[str, str]]:
        """The answers that the device has, oldest first, with their ids."""
        return self.agent._device.store.rows(
            "SELECT response_id, (SELECT raw FROM texts WHERE owner = response_id AND kind = 'response')"
            " FROM responses ORDER BY number"
        )


def test_what_is_typed_is_answered_in_its_conversation(agent: Agent) -> None:
    talk = Talk(agent)
    first, second = talk("where is my card"), talk("the card is lost")
    turns = [{"role": "user", "content": "where is my card"}]
    assert printed(agent.chat(turns).text) == first
    turns += [{"role": "assistant", "content": talk.answers()[0][1]}, {"role": "user", "content": "the card is lost"}]
    assert printed(agent.chat(turns).text) == second


def printed(text: str) -> str:
    from fedloop_cli.console import printable

    return "\n".join(printable(line) for line in text.split("\n"))


def test_commands_are_feedback_on_the_last_answer(agent: Agent) -> None:
    talk = Talk(agent)
    talk("where is my card")
    assert talk("/up") == "kept"
    talk("/down")
    talk("/fix it is in the post")
    assert talk.given() == [FeedbackInput(thumb="up"), FeedbackInput(thumb="down"), FeedbackInput(correction="it is in the post")]
    after = talk("the card is lost")
    turns = [
        {"role": "user", "content": "where is my card"},
        {"role": "assistant", "content": "it is in the post"},
        {"role": "user", "content": "the card is lost"},
    ]
    assert printed(agent.chat(turns).text) == after


def test_retry_answers_the_same_anew_and_up_then_prefers_it(agent: Agent) -> None:
    talk = Talk(agent)
    talk("where is my card")
    talk("/retry")
    (first, one), (_, other) = talk.answers()
    assert one != other
    talk("/up")
    assert talk.given() == [FeedbackInput(signal="retried"), FeedbackInput(thumb="up", preferred_over=first)]
    talk("the card is lost")
    talk("/up")
    assert talk.given()[-1] == FeedbackInput(thumb="up")


def test_what_cannot_be_done_is_said_and_changes_nothing(agent: Agent) -> None:
    talk = Talk(agent)
    for line in ("/up", "/retry", "/fix never mind"):
        assert "no answer yet" in talk(line)
    assert "no command /upp" in talk("/upp")
    talk("where is my card")
    assert "followed by" in talk("/fix")
    assert "takes at most" in talk("word " * 200)
    talk("/new")
    assert "no answer yet" in talk("/up")
    assert talk.given() == []
    assert len(talk.answers()) == 1
    assert all(name.partition(" ")[0] in talk("/help") for name in COMMANDS)
    assert talk("  ") == ""


def test_nothing_in_an_answer_steers_the_terminal(agent: Agent) -> None:
    talk = Talk(agent)
    talk.conversation._show("a\x1b[2Jb\nc\u202e[red]d")
    assert talk._file.getvalue() == "a\\x1b[2Jb\nc\\u202e[red]d"


def test_a_classifier_is_talked_to_as_well(tmp_path: Path) -> None:
    classified = classified_in(tmp_path / "deployment")
    with enrol_classified(classified, tmp_path / "store") as agent:
        talk = Talk(agent)
        assert talk(TEXTS["loan"]).startswith("loan (")
        assert "would be the same" in talk("/retry")
        assert talk("/fix transfer") == "kept"
        assert talk("/up") == "kept"
    classified.log.close()


def test_it_is_a_command_that_ends_with_its_input(fedloop: Fedloop, chatted: Chatted, tmp_path: Path) -> None:
    store = tmp_path / "store"
    chatted.enrol(store).close()
    talk = ("agent", "chat", "--store", store, "--model-dir", chatted.base_folder)
    for typed in ("where is my card\n/up\n", "where is my card\n/up\n/quit\nnever asked\n"):
        ended = fedloop(*talk, stdin=typed)
        assert ended.status == 0, ended.err
        assert "kept" in ended.out
        assert "never asked" not in ended.out
    with Agent.open(store) as agent:
        assert agent.status().waiting == 2
