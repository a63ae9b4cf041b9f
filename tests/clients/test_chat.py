"""Chatting with a language model on the device: what it answers, what is kept of it, and what leaves the device."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from clients.classified import enrol
from clients.conftest import settled
from fedloop_clients import Agent, chatting
from fedloop_clients.feedback import UnknownResponseError
from fedloop_clients.interactions import MAX_CONTEXT_CHARS, Interactions
from fedloop_clients.publishing import fitting
from fedloop_clients.refreshing import refresh_now
from fedloop_clients.store_file import NotWritableError
from fedloop_events import types
from fedloop_events.envelope import MAX_EVENT_BYTES, size_bytes
from fedloop_events.errors import UsageError
from fedloop_events.masked import MaskedText, MaskedTurn
from fedloop_tasks.task import Interaction, ModelError
from fedloop_tasks.turns import Turn
from msgspec.structs import replace

if TYPE_CHECKING:
    from clients.chatted import Chatted
    from clients.classified import Classified

Message = dict[str, Any]
InChild = Callable[[Callable[[], object]], int]
HELLO: list[Message] = [{"role": "user", "content": "where is my card"}]
TALK: list[Message] = [
    {"role": "system", "content": "be short"},
    {"role": "user", "content": "the card is lost"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "where is my card"},
]


def user(content: Any) -> Message:
    return {"role": "user", "content": content}


@pytest.fixture(scope="module")
def chatted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chatted]:
    from clients.chatted import chatted_in  # imports torch

    made = chatted_in(tmp_path_factory.mktemp("chatted"))
    made.find_words(HELLO, TALK)
    yield made
    made.log.close()


@pytest.fixture
def agent(chatted: Chatted, tmp_path: Path) -> Iterator[Agent]:
    """With a release that has much to say."""
    chatted.train(chatted.talkative)
    with chatted.enrol(tmp_path / "store") as agent:
        yield agent


def judged(agent: Agent) -> list[Interaction]:
    agent.run(until=settled)
    return [*agent._device.interactions.judged()]


def recorded(chatted: Chatted, agent: Agent) -> list[types.FeedbackRecorded]:
    """What this device has published."""
    agent.run(until=settled)
    return [each for each in chatted.appended(types.FeedbackRecorded) if each.client_id == agent.identity.client_id]


def kept(agent: Agent) -> int:
    """How many responses the store has."""
    return int(agent._device.store.rows("SELECT count(*) FROM responses")[0][0])


def masked(text: str) -> MaskedText:
    return MaskedText._from_masker(text, {})


# --- answers ---


@pytest.mark.parametrize("messages", [HELLO, TALK])
def test_an_answer_is_the_models_own_with_the_release_in_force(chatted: Chatted, agent: Agent, messages: list[Message]) -> None:
    turns = [Turn(**each) for each in messages]
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
    assert [each.interaction_id for each in judged(agent)] == [stream.response_id]


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


def test_a_release_that_comes_meanwhile_answers_the_next_message(
    chatted: Chatted, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also one that takes the place of the other between the look at its name and that at its tensors."""
    stream = agent.chat(HELLO, stream=True)
    first, second = stream.release, chatted.train(2)
    assert agent.chat(HELLO).release == second
    list(stream)
    assert stream.response is not None
    assert stream.response.release == first
    agent._device.models._idle.clear()  # so that the tensors are looked at
    look, found = agent._in_force.kept, []

    def outdated() -> object:
        found.append(look())
        if len(found) == 1:
            chatted.train(4)
            refresh_now(agent._device)
        return found[-1]

    monkeypatch.setattr(agent._in_force, "kept", outdated)
    assert agent.chat(HELLO).release == chatted.base_release
    assert [each.release for each in found] == [second, chatted.base_release]


def test_threads_that_chat_at_once_get_their_own_answers_from_one_model(agent: Agent) -> None:
    prompts = [[user(f"{word} card")] for word in ("where", "lost", "loan", "house", "yes", "sent")]
    expected = [agent.chat(each).text for each in prompts]

    def ask(number: int) -> tuple[str, str]:
        if number % 2:
            return (whole := agent.chat(prompts[number])).text, whole.response_id
        stream = agent.chat(prompts[number], stream=True)
        return "".join(stream), stream.response_id

    with ThreadPoolExecutor(6) as pool:
        answered = [*pool.map(ask, range(6))]
    assert [text for text, _ in answered] == expected
    assert len({response_id for _, response_id in answered}) == 6
    assert len(agent._device.models._idle) == 1


def test_a_reader_that_is_slow_or_gone_holds_nobody_up(agent: Agent) -> None:
    unread, dropped = agent.chat(HELLO, stream=True), agent.chat(HELLO, stream=True)
    next(dropped)
    del dropped
    gc.collect()
    assert agent.chat(HELLO).text == "".join(unread)
    assert kept(agent) == 2


# --- a stream that ends early ---


@pytest.mark.parametrize("how", ["close", "with", "other thread"])
def test_what_was_read_of_a_stream_that_is_closed_is_kept_as_an_answer_that_is_not_finished(agent: Agent, how: str) -> None:
    whole, stream = agent.chat(HELLO), agent.chat(HELLO, stream=True)
    read = next(stream) + next(stream)
    if how == "with":
        with stream:
            pass
    elif how == "close":
        stream.close()
    else:
        other = threading.Thread(target=stream.close)
        other.start()
        other.join()
    assert stream.response is not None
    assert whole.text.startswith(read)
    assert (stream.response.text, stream.response.finished) == (read, False)
    assert stream.response.tokens < whole.tokens
    assert list(stream) == []
    stream.close()
    agent.feedback(stream.response_id, correction="we have sent it", signal="stopped")
    (found,) = judged(agent)
    assert (found.response, found.signal) == (agent._masking.together([read])[0], "stopped")


def test_a_stream_of_which_nothing_was_read_keeps_nothing(agent: Agent) -> None:
    stream = agent.chat(HELLO, stream=True)
    stream.close()
    assert (stream.response, list(stream), kept(agent)) == (None, [], 0)
    with pytest.raises(UnknownResponseError):
        agent.feedback(stream.response_id, thumb="down")


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[threading.Event, threading.Event]]:
    """The model goes on after its first word when the first event is set, and sets the second once it has written all."""
    from fedloop_tasks.causal.model import CausalModel

    go, whole, writing = threading.Event(), threading.Event(), CausalModel.writing

    def held_up(*given: Any, **named: Any) -> Iterator[object]:
        for answer in writing(*given, **named):
            yield answer
            assert go.wait(30)
        whole.set()

    monkeypatch.setattr(CausalModel, "writing", held_up)
    yield go, whole
    go.set()


def no_writer_is_left() -> bool:
    for writer in [each for each in threading.enumerate() if each.name == chatting.THREAD]:
        writer.join(30)
    return all(each.name != chatting.THREAD for each in threading.enumerate())


def test_an_agent_that_is_closed_ends_its_streams(
    chatted: Chatted, tmp_path: Path, slow: tuple[threading.Event, threading.Event]
) -> None:
    with chatted.enrol(tmp_path / "other") as agent:
        stream = agent.chat(HELLO, stream=True)
        next(stream)
    slow[0].set()
    with pytest.raises(UsageError, match="not written to its end"):
        list(stream)
    assert no_writer_is_left()
    assert not slow[1].is_set()


@pytest.mark.parametrize("how", ["close", "drop"])
def test_what_nobody_reads_any_more_is_not_written(agent: Agent, slow: tuple[threading.Event, threading.Event], how: str) -> None:
    stream = agent.chat(HELLO, stream=True)
    next(stream)
    if how == "close":
        stream.close()
    del stream
    gc.collect()
    slow[0].set()
    assert no_writer_is_left()
    assert not slow[1].is_set()
    assert kept(agent) == (1 if how == "close" else 0)


def test_a_model_that_fails_is_an_error_where_it_fails_and_nothing_is_kept(
    chatted: Chatted, agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fedloop_tasks.causal.model import CausalModel

    writing = CausalModel.writing

    def broken(*given: Any, **named: Any) -> Iterator[object]:
        for number, answer in enumerate(writing(*given, **named)):
            if number == 2:
                raise ModelError("the model broke")
            yield answer

    with monkeypatch.context() as patched:
        patched.setattr(CausalModel, "writing", broken)
        stream = agent.chat(HELLO, stream=True)
        next(stream)
        with pytest.raises(ModelError, match="broke"):
            list(stream)
        with pytest.raises(ModelError, match="broke"):
            agent.chat(HELLO)
    assert (list(stream), stream.response, kept(agent)) == ([], None, 0)
    assert agent.chat(HELLO).text


def test_on_a_disk_that_is_full_it_answers_and_says_that_the_answer_is_not_kept(
    agent: Agent, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> str:
        raise NotWritableError("the disk is full")

    with monkeypatch.context() as patched:
        patched.setattr(Interactions, "answer", full)
        stream = agent.chat(HELLO, stream=True)
        list(stream)
        for response in (agent.chat(HELLO), stream.response):
            assert response is not None
            assert (bool(response.text), response.response_id) == (True, "")
            assert "the disk is full, so no feedback" in response.note
    with pytest.raises(UsageError, match="was not kept"):
        agent.feedback("", thumb="up")


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_process_that_is_killed_has_kept_what_its_user_has_read_to_the_end(
    chatted: Chatted, agent: Agent, tmp_path: Path, in_child: InChild, when: str
) -> None:
    import os

    def work() -> None:
        import torch

        torch.set_num_threads(1)  # a pool of threads does not survive the fork
        with Agent.open(tmp_path / "store", settings=agent.settings) as again:
            stream = again.chat(HELLO, stream=True)
            if when == "before":
                next(stream)
            else:
                (tmp_path / "id").write_text(stream.response_id)
                list(stream)
            os.kill(os.getpid(), 9)

    assert in_child(work) == -9
    assert kept(agent) == (0 if when == "before" else 1)
    if when == "after":
        agent.feedback((tmp_path / "id").read_text(), thumb="up")
        assert len(judged(agent)) == 1


# --- what is refused ---


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([], "messages is empty"),
        ("hello", "messages must be a list"),
        (user("hello"), "messages must be a list"),
        (["hello"], "message 1 is not a mapping"),
        ([{"role": "user"}], "message 1 is not a mapping"),
        ([{"role": "user", "content": "hi", "name": "Jane"}], "message 1 is not a mapping"),
        ([user("hi"), {"role": "tool", "content": "hi"}], "message 2 has a role that does not exist"),
        ([{"role": ["user"], "content": "hi"}], "message 1 has a role that does not exist"),
        ([user(None)], "the content of message 1 is not a text"),
        ([user([{"type": "text", "text": "hi"}])], "the content of message 1 is not a text"),
        ([user(" \u200b")], "the content of message 1 is empty"),
        ([user("x" * 10_001)], "the content of message 1 has 10,001 characters"),
        ([user("hi \ud83d")], "the content of message 1 is not Unicode"),
        ([user("hi \0")], "the content of message 1 holds a NUL"),
        ([user("hi"), user("hi")], "messages 1 and 2 are both of the user"),
        ([*TALK[:3], TALK[2], TALK[3]], "messages 3 and 4 are both of the assistant"),
        ([TALK[1], TALK[0], TALK[3]], "message 2 is of the system"),
        ([TALK[2], TALK[3]], "message 1 is of the assistant, before"),
        ([TALK[0], TALK[2], TALK[3]], "message 2 is of the assistant, before"),
        (TALK[:3], "the last message is of the assistant"),
        (TALK[:1], "the last message is of the system"),
        ([user("z" * 200)], "the conversation has 2\\d\\d tokens, and the model takes at most 127"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_messages_that_cannot_be_answered_are_one_clear_error_and_nothing_is_kept(
    agent: Agent, messages: Any, said: str, stream: bool
) -> None:
    with pytest.raises(UsageError, match=said) as error:
        agent.chat(messages, stream=stream)  # type: ignore[call-overload]
    assert "hi" not in error.value.message.replace("this", "").replace("which", "").replace("nothing", "").split()
    assert kept(agent) == 0


@pytest.mark.parametrize(
    "settings",
    [
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"seed": 1.5},
        {"seed": 2**64},
    ],
)
def test_settings_that_make_no_sense_are_refused_by_name(agent: Agent, settings: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=next(iter(settings))):
        agent.chat(HELLO, **settings)
    assert kept(agent) == 0


def test_a_model_does_what_it_can_and_says_what_to_use_for_the_rest(
    chatted: Chatted, agent: Agent, classified: Classified, tmp_path: Path
) -> None:
    asked: list[Callable[[], object]] = [lambda: agent.predict("hello"), lambda: agent.record("hello", "loan")]
    for ask in asked:
        with pytest.raises(UsageError, match="answers in its own words") as error:
            ask()
        assert "Agent.chat" in error.value.hint
    response = agent.chat(HELLO)
    with pytest.raises(UsageError, match="no label is right"):
        agent.feedback(response.response_id, label="loan")
    with enrol(classified, tmp_path / "classifier") as other:
        for stream in (False, True):
            with pytest.raises(UsageError, match="closed set of words") as error:
                other.chat(HELLO, stream=stream)
            assert "Agent.predict" in error.value.hint
        with pytest.raises(UsageError, match="closed set of words"):
            other.record_answer(HELLO, "yes")


# --- feedback ---


def test_feedback_on_an_answer_is_learnt_with_the_conversation_it_stands_in(agent: Agent) -> None:
    response = agent.chat(TALK)
    other = agent.chat(TALK, temperature=2.0, seed=3)
    assert agent.feedback(response.response_id, correction="it is on its way", rating=2).teaches == "it is on its way"
    agent.feedback(other.response_id, preferred_over=response.response_id, signal="copied")
    corrected, compared = judged(agent)
    for each in (corrected, compared):
        assert [(turn.role, turn.text.text) for turn in each.context] == [(turn["role"], turn["content"]) for turn in TALK[:3]]
        assert (each.prompt.text, each.predicted) == ("where is my card", None)
    assert corrected.edit is not None
    assert (corrected.edit.text, corrected.rating) == ("it is on its way", 2)
    assert corrected.response == agent._masking.together([response.text])[0]
    assert (compared.interaction_id, compared.preferred_over) == (other.response_id, response.response_id)
    assert (compared.signal, compared.response) == ("copied", agent._masking.together([other.text])[0])


def test_the_worse_of_two_is_another_answer_to_the_same_messages(chatted: Chatted, agent: Agent) -> None:
    better, worse = agent.chat(TALK), agent.chat(TALK)
    for messages in (HELLO, [TALK[0] | {"content": "be long"}, *TALK[1:]]):
        with pytest.raises(UsageError, match="preferred_over names a response to another prompt"):
            agent.feedback(better.response_id, preferred_over=agent.chat(messages).response_id)
    with pytest.raises(UnknownResponseError):
        agent.feedback(better.response_id, preferred_over="unknown")
    with pytest.raises(UsageError, match="over itself"):
        agent.feedback(better.response_id, preferred_over=better.response_id)
    assert agent.status().waiting == 0
    agent.feedback(better.response_id, preferred_over=worse.response_id)
    (event,) = recorded(chatted, agent)
    assert (event.response_id, event.preferred_over) == (better.response_id, worse.response_id)


def test_an_answer_that_was_made_elsewhere_is_kept_as_one_of_the_release_in_force(chatted: Chatted, agent: Agent) -> None:
    first = agent.record_answer(TALK, "it is lost", response_id="jane.doe")
    empty = agent.record_answer(TALK, "")
    assert (first.release, first.text) == (chatted.base_release, "it is lost")
    agent.feedback("jane.doe", preferred_over=empty.response_id)
    (event,) = recorded(chatted, agent)
    assert (event.response_id, event.response) == (first.response_id, masked("it is lost"))
    assert b"jane" not in chatted.bytes()
    for answer in (None, "half \ud83d", "x" * 100_001):
        with pytest.raises(UsageError, match="the answer"):
            agent.record_answer(TALK, answer)  # type: ignore[arg-type]


# --- what leaves the device ---


SECRETS = [f"{number}47114711" for number in range(1, 9)]


def test_nothing_that_was_written_leaves_the_device_unless_it_is_masked(
    chatted: Chatted, agent: Agent, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A value in each field, and the same in texts that the masker refuses."""
    system, asked, said, prompt, answer, other, correction, comment = SECRETS

    def talk(mark: str = "") -> list[Message]:
        return [
            {"role": "system", "content": f"{mark} serve {system}"},
            user(f"I am {asked}"),
            {"role": "assistant", "content": f"hello {said}"},
            user(f"my card {prompt} is lost"),
        ]

    def give(messages: list[Message], answered: str, **given: Any) -> str:
        better, worse = agent.record_answer(messages, answered), agent.record_answer(messages, f"worse {other}")
        return agent.feedback(better.response_id, preferred_over=worse.response_id, **given).feedback_id

    good = f"your card {answer} is there"
    whole = give(talk(), good, correction=f"no, {correction}", comment=f"call {comment}", signal="copied")
    for marked, text in ((talk("unmaskable"), good), (talk("explosive"), good), (talk(), f"unmaskable {answer}")):
        give(marked, text, thumb="up")
    give(talk(), good, correction=f"unmaskable {correction}")
    give(talk(), good, comment=f"explosive {comment}")
    (event,) = recorded(chatted, agent)
    assert event.feedback_id == whole
    assert [(turn.role, turn.text.text) for turn in event.context] == [
        ("system", " serve <NUMBER_1>"),
        ("user", "I am <NUMBER_1>"),
        ("assistant", "hello <NUMBER_1>"),
    ]
    texts = (event.text, event.response, event.correction, event.comment)
    assert [each and each.text for each in texts] == [
        "my card <NUMBER_1> is lost",
        "your card <NUMBER_1> is there",
        "no, <NUMBER_1>",
        "call <NUMBER_1>",
    ]
    assert (event.predicted, event.turns_left_out, event.signal) == (None, 0, "copied")
    counts = [each.counts for each in chatted.appended(types.TextMasked) if each.feedback_id == whole]
    assert counts == [{"NUMBER": 7}]
    status = agent.status()
    assert sum(status.failed.values()) == 5
    stored = b"".join(path.read_bytes() for path in (tmp_path / "store").rglob("*") if path.is_file())
    output = "".join(capfd.readouterr())
    for secret in SECRETS:
        assert secret.encode() not in chatted.bytes()
        assert secret.encode() not in stored
        assert secret not in output + repr(status)


def test_an_answer_whose_conversation_cannot_be_masked_teaches_nothing(agent: Agent) -> None:
    response = agent.record_answer([TALK[0] | {"content": "unmaskable"}, *TALK[1:]], "yes")
    agent.feedback(response.response_id, thumb="up")
    assert judged(agent) == []


def test_a_signal_is_a_word_in_which_the_masker_finds_nothing(chatted: Chatted, agent: Agent) -> None:
    response = agent.chat(HELLO).response_id
    for signal in ("", "Copied", "card 4711", "jane.doe", "a" * 41, "tel4711", "-x"):
        with pytest.raises(UsageError, match="signal must be 1 to 40 lower-case"):
            agent.feedback(response, signal=signal)
    for signal in ("copied", "regenerated", "read-aloud", "unmaskable"):
        agent.feedback(response, thumb="up", signal=signal)
    assert [each.signal for each in recorded(chatted, agent)] == ["copied", "regenerated", "read-aloud", None]


@pytest.mark.parametrize("signal", ["copied", "regenerated", "read-aloud", "shared", "stopped", "edited", "thumb_removed"])
def test_the_real_masker_lets_usual_signals_pass(signal: str) -> None:
    from fedloop_privacy.masking import Masker

    assert Masker().mask(signal).text == signal


def test_names_are_the_same_placeholder_in_all_texts_of_a_conversation(chatted: Chatted, tmp_path: Path) -> None:
    from fedloop_privacy.masking import Masker

    with chatted.enrol(tmp_path / "other", masker=Masker()) as agent:
        messages = [user("I am Jane Doe, and my card is lost"), {"role": "assistant", "content": "whose card?"}]
        messages.append(user("that of my husband John Smith"))
        response = agent.record_answer(messages, "Dear Jane Doe, the card of John Smith is lost")
        agent.feedback(response.response_id, correction="Dear Mrs. Doe, John Smith has a new card")
        (event,) = recorded(chatted, agent)
        assert event.context[0].text.text == "I am <PERSON_1>, and my card is lost"
        assert event.text.text == "that of my husband <PERSON_2>"
        assert event.response is not None
        assert event.response.text == "Dear <PERSON_1>, the card of <PERSON_2> is lost"
        assert event.correction is not None
        assert "<PERSON_2> has a new card" in event.correction.text


# --- how much of it ---


def test_of_a_long_conversation_the_newest_turns_are_kept_and_how_many_are_not(chatted: Chatted, agent: Agent) -> None:
    messages = [TALK[0]]
    for number in range(10):
        messages += [user(f"{'u' * 1_999}{'x' * number}"), {"role": "assistant", "content": "a" * 2_000}]
    messages.append(user("and now?"))
    agent.feedback(agent.record_answer(messages, "yes").response_id, thumb="up")
    (event,) = recorded(chatted, agent)
    assert [turn.role for turn in event.context] == ["user", "assistant"] * 4
    assert sum(len(turn.text.text) for turn in event.context) <= MAX_CONTEXT_CHARS
    assert event.context[-2].text.text.endswith("x" * 9)
    assert event.turns_left_out == len(messages) - 1 - 8


def feedback(**given: Any) -> types.FeedbackRecorded:
    base: dict[str, Any] = dict.fromkeys(("origin", "client_id", "feedback_id", "response_id", "release", "use_case"), "x")
    return types.FeedbackRecorded(seq=2**53 - 1, **base, **given)


def test_an_event_that_is_too_large_loses_the_oldest_turns_first_and_then_the_answer() -> None:
    def turns(*sizes: int) -> list[MaskedTurn]:
        return [MaskedTurn("user" if number % 2 == 0 else "assistant", masked("t" * size)) for number, size in enumerate(sizes)]

    text, answer, long = masked("p" * 10_000), masked("\u4e2d" * 10_000), masked("c" * 8_000)
    small = feedback(text=text, context=turns(10, 10), response=answer)
    assert fitting(small) is small
    for many in (turns(*[5_000] * 8), turns(*[10] * 1_000)):
        whole = feedback(text=text, context=many, response=answer, turns_left_out=3)
        found = fitting(whole)
        assert 0 < len(found.context) < len(many)
        assert found.context == many[-len(found.context) :]
        assert found.turns_left_out == 3 + len(many) - len(found.context)
        assert (found.response, found.context[0].role) == (answer, "user")
        assert size_bytes(found) <= MAX_EVENT_BYTES
        more = many[-len(found.context) - 2 :]
        assert size_bytes(replace(found, context=more)) > MAX_EVENT_BYTES
    bare = fitting(feedback(text=answer, context=turns(10, 10), response=answer, correction=long))
    assert (bare.context, bare.turns_left_out, bare.response, bare.correction) == ([], 2, None, long)


def test_the_longest_feedback_in_letters_of_three_bytes_fits_into_an_event_without_its_conversation() -> None:
    from fedloop_clients.feedback import MAX_COMMENT_CHARS, MAX_CORRECTION_CHARS, MAX_TEXT_CHARS

    def long(chars: int) -> MaskedText:
        return masked("\u4e2d" * chars)

    found = fitting(
        replace(
            feedback(text=long(MAX_TEXT_CHARS), correction=long(MAX_CORRECTION_CHARS), comment=long(MAX_COMMENT_CHARS)),
            **dict.fromkeys(("origin", "client_id", "feedback_id", "response_id", "release", "preferred_over"), "x" * 80),
            response=long(10_000),
            context=[MaskedTurn("user", long(10)), MaskedTurn("assistant", long(10))],
        )
    )
    assert size_bytes(found) <= MAX_EVENT_BYTES


@pytest.mark.parametrize(("settings", "taken"), [({}, True), ({"scratch_bytes": 0}, False)])
def test_what_the_model_keeps_beyond_its_memory_is_beside_the_store_unless_the_owner_wants_none(
    chatted: Chatted, tmp_path: Path, settings: dict[str, int], taken: bool
) -> None:
    from fedloop_clients.device import Device, Settings
    from fedloop_tasks.causal.model import CausalModel

    with chatted.enrol(tmp_path) as agent:
        own = Settings(model_dir=chatted.base_folder, **settings)  # type: ignore[arg-type]
        device = Device(agent._device.store, agent.identity, agent.identity.place, own)
        with device.models.borrowed(chatted.model.spec) as held:
            assert isinstance(held.model, CausalModel)
            beyond = held.model._kept._states._beyond
            assert beyond is not None
            assert beyond._scratch.folder == tmp_path
            assert (beyond._scratch.bound() > 0) is taken
