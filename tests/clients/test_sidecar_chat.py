"""The sidecar with a tiny language model behind it: what is streamed, recorded and cut off."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest
import torch
from clients.chatted import Chatted, chatted_in
from clients.sidecar_served import KEY, Served, error, serving
from fedloop_clients import Agent
from fedloop_clients.models import Held
from fedloop_clients.sidecar.answering import OwnModel
from fedloop_privacy.masking import Masker
from fedloop_tasks.causal.model import CausalModel
from fedloop_tasks.chats import Answer
from fedloop_tasks.turns import Turn
from transformers import AutoModelForCausalLM


class Paced(CausalModel):
    """A real model that writes as many tokens as it is let, or fails when it is told to."""

    may_write = threading.Semaphore(0)
    fails = False
    written = 0

    def writing(self, turns: Sequence[Turn], **how: Any) -> Iterator[Answer]:
        for answer in super().writing(turns, **how):
            assert self.may_write.acquire(timeout=60)
            if self.fails:
                raise RuntimeError("the model fails")
            self.written += 1
            yield answer

    def let_write(self, count: int = 1_000) -> None:
        self.may_write.release(count)


@pytest.fixture(scope="module")
def chatted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chatted]:
    made = chatted_in(tmp_path_factory.mktemp("chatted"))
    yield made
    made.log.close()


@pytest.fixture(scope="module")
def served(chatted: Chatted, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with chatted.enrol(tmp_path_factory.mktemp("chat") / "store") as agent, serving(agent) as made:
        yield made


@pytest.fixture
def paced(chatted: Chatted) -> Paced:
    model = Paced(chatted.model.spec, model_dir=chatted.base_folder, device="cpu")
    model.may_write = threading.Semaphore(0)
    return model


@pytest.fixture
def slow(chatted: Chatted, paced: Paced, tmp_path: Path) -> Iterator[Served]:
    """A sidecar whose model is the paced one."""
    with chatted.enrol(tmp_path / "store") as agent:
        agent._device.models._idle.append(Held(paced))
        with serving(agent, OwnModel(agent, most_waiting=3)) as made:
            yield made
            paced.let_write()


def asked(text: str = "where is my card") -> list[Any]:
    return [{"role": "user", "content": text}]


def texts(agent: Agent) -> list[str]:
    """The answers that the device keeps."""
    return [text for (text,) in agent._device.store.rows("SELECT raw FROM texts WHERE kind = 'response' ORDER BY rowid")]


def waiting(served: Served) -> int:
    """How many answers are under way or waited for."""
    assert isinstance(served.answering, OwnModel)
    return served.answering._waiting


def until(condition: Callable[[], bool], between: Callable[[], object] = lambda: None) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        between()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_streamed_answer_is_the_whole_one_and_is_known_by_its_id_from_the_first_chunk(served: Served) -> None:
    whole = served.openai.chat.completions.create(model="default", messages=asked())
    assert whole.choices[0].message.content == served.agent.chat(asked()).text
    stream = served.openai.chat.completions.create(
        model="default", messages=asked(), stream=True, stream_options={"include_usage": True}
    )
    first = next(stream)
    rest = list(stream)
    pieces = [chunk.choices[0].delta.content or "" for chunk in (first, *rest) if chunk.choices]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 5
    assert rest[-1].usage == whole.usage
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 24
    assert served.feedback(first.id, correction="in your wallet").status_code == 200
    assert served.feedback(whole.id, thumb="down", signal="copied").status_code == 200


def test_an_answer_ends_at_its_bound_and_says_so(served: Served) -> None:
    answer = served.openai.chat.completions.create(model="default", messages=asked(), max_completion_tokens=3)
    assert answer.usage is not None
    assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (3, "length")


def test_an_answer_is_drawn_by_its_seed(served: Served) -> None:
    def drawn(seed: int | None) -> str | None:
        given = {} if seed is None else {"seed": seed}
        found = served.openai.chat.completions.create(model="default", messages=asked(), temperature=1.5, extra_body=given)
        return found.choices[0].message.content

    assert drawn(1) == drawn(1) != drawn(2)
    assert drawn(None) != drawn(None)


def test_an_answer_ends_before_a_stop_text_and_is_kept_so(served: Served) -> None:
    whole = served.agent.chat(asked()).text
    for stop in (whole[9:12], whole[7], whole[:1]):
        wanted = whole[: whole.index(stop)]
        answer = served.openai.chat.completions.create(model="default", messages=asked(), stop=[stop, "never written"])
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (wanted, "stop")
        assert texts(served.agent)[-1] == wanted
        stream = served.openai.chat.completions.create(model="default", messages=asked(), stop=stop, stream=True)
        assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == wanted


@pytest.mark.parametrize("stream", [False, True])
def test_a_conversation_that_is_too_long_for_the_model_is_refused_and_not_kept(served: Served, stream: bool) -> None:
    before = len(texts(served.agent))
    with pytest.raises(openai.BadRequestError, match="takes at most") as raised:
        served.openai.chat.completions.create(model="default", messages=asked("word " * 200), stream=stream)
    assert raised.value.code == "context_length_exceeded"
    assert len(texts(served.agent)) == before


def test_turns_out_of_turn_are_refused(served: Served) -> None:
    with pytest.raises(openai.BadRequestError, match="both of the user"):
        served.openai.chat.completions.create(model="default", messages=asked() + asked())


def test_twenty_at_once_are_all_answered_in_turn(served: Served) -> None:
    questions = [f"where is card {number}" for number in range(20)]
    alone = [served.agent.chat(asked(each)).text for each in questions]

    def ask(question: str) -> str:
        stream = served.openai.chat.completions.create(model="default", messages=asked(question), stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in stream)

    with ThreadPoolExecutor(20) as many:
        assert list(many.map(ask, questions)) == alone


def test_who_goes_away_stops_the_writing_and_what_was_read_is_kept(slow: Served, paced: Paced) -> None:
    paced.let_write(4)
    body = {"messages": asked(), "stream": True}
    with slow.http.stream("POST", "/v1/chat/completions", json=body) as response:
        lines = (line for line in response.iter_lines() if line)
        chunks = [json.loads(next(lines).removeprefix("data: ")) for _ in range(3)]
    until(lambda: slow.server.server_state.tasks == set())
    until(lambda: waiting(slow) == 0, between=lambda: paced.let_write(1))
    assert paced.written < 10
    paced.let_write()
    next_one = slow.openai.chat.completions.create(model="default", messages=asked("the card is lost"))
    assert next_one.choices[0].message.content
    kept = texts(slow.agent)
    assert len(kept) == 2
    assert kept[0].startswith("".join(chunk["choices"][0]["delta"]["content"] for chunk in chunks))
    assert slow.feedback(chunks[0]["id"], thumb="down").status_code == 200


def test_who_goes_away_while_waiting_is_forgotten(slow: Served, paced: Paced) -> None:
    body = json.dumps({"messages": asked()}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\nauthorization: Bearer {KEY}\r\n"
    for number in (1, 2):  # the first is being answered, the second waits
        with socket.create_connection(slow.listening.getsockname()) as gone:
            gone.sendall(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
            until(lambda: waiting(slow) == number)  # noqa: B023
    until(lambda: slow.server.server_state.tasks == set())
    until(lambda: waiting(slow) == 0, between=lambda: paced.let_write(1))
    assert paced.written < 10
    assert len(texts(slow.agent)) == 1
    paced.let_write()
    assert slow.openai.chat.completions.create(model="default", messages=asked()).choices[0].finish_reason == "length"


def test_too_many_who_wait_are_told_when_to_come_again(slow: Served, paced: Paced) -> None:
    with ThreadPoolExecutor(3) as many:
        asking = [
            many.submit(slow.openai.chat.completions.create, model="default", messages=asked(f"card {i}")) for i in range(3)
        ]
        until(lambda: waiting(slow) == 3)
        response = slow.http.post("/v1/chat/completions", json={"messages": asked()})
        assert (response.status_code, error(response)["code"]) == (429, "too_many_waiting")
        assert int(response.headers["retry-after"]) >= 1
        with pytest.raises(openai.RateLimitError):
            slow.openai.chat.completions.create(model="default", messages=asked(), stream=True)
        paced.let_write()
        assert all(each.result().choices[0].message.content for each in asking)
    assert slow.openai.chat.completions.create(model="default", messages=asked()).choices[0].message.content


def test_a_model_that_fails_is_one_error_and_the_next_request_is_answered(slow: Served, paced: Paced) -> None:
    paced.let_write(2)
    stream = slow.openai.chat.completions.create(model="default", messages=asked(), stream=True)
    next(stream)
    paced.fails = True
    paced.let_write()
    with pytest.raises(openai.APIError, match="internal error"):
        list(stream)
    with pytest.raises(openai.InternalServerError, match="internal error"):
        slow.openai.chat.completions.create(model="default", messages=asked())
    paced.fails = False
    assert slow.openai.chat.completions.create(model="default", messages=asked()).choices[0].message.content


def test_a_new_release_answers_as_soon_as_it_is_there(chatted: Chatted, served: Served) -> None:
    before = served.openai.chat.completions.create(model="default", messages=asked()).system_fingerprint
    release = chatted.train(1)
    assert before != release
    until(lambda: served.openai.chat.completions.create(model="default", messages=asked()).system_fingerprint == release)


def test_a_text_completion_is_the_answer_to_one_message(served: Served) -> None:
    answer = served.openai.completions.create(model="default", prompt="where is my card")
    assert answer.choices[0].text == served.agent.chat(asked()).text


def test_an_answer_may_be_asked_to_be_longer_than_the_model_can(served: Served) -> None:
    answer = served.openai.chat.completions.create(model="default", messages=asked("hi"), max_tokens=100_000)
    assert answer.choices[0].finish_reason == "length"


@pytest.mark.parametrize("packed", [False, True])
def test_embeddings_are_unit_vectors_of_the_base_model(chatted: Chatted, served: Served, packed: bool) -> None:
    how: Any = {} if packed else {"encoding_format": "float"}
    texts = ["where is my card", "the card is lost", "where is my card"]
    found = [each.embedding for each in served.openai.embeddings.create(model="default", input=texts, **how).data]
    assert found[0] == found[2] != found[1]
    assert [sum(x * x for x in each) for each in found] == pytest.approx([1, 1, 1], abs=1e-5)
    whole = AutoModelForCausalLM.from_pretrained(chatted.base_folder)
    ids = torch.tensor([chatted.model.chat.text(texts[1])])
    states = whole.model(ids).last_hidden_state[0].mean(0)
    assert found[1] == pytest.approx((states / states.norm()).tolist(), abs=1e-5)


def test_what_cannot_be_embedded_is_refused(served: Served) -> None:
    for wrong in ([], [1, 2], [[1, 2]], ["a", ""], "word " * 200, {"text": "a"}, ["a"] * 257):
        assert served.http.post("/v1/embeddings", json={"input": wrong}).status_code == 400
    assert served.http.post("/v1/embeddings", json={"input": "a", "dimensions": 8}).status_code == 400
    assert served.http.post("/v1/embeddings", json={"input": "a", "model": "other"}).status_code == 404


def test_the_documents_programs_run_as_they_stand(served: Served, tmp_path: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "sidecar.md").read_text(encoding="utf-8")
    (tmp_path / "phone").mkdir()
    (tmp_path / "phone" / "sidecar.key").write_text(KEY + "\n")
    program, *_ = re.findall(r"^```python\n(.*?)^```$", document, re.DOTALL | re.MULTILINE)
    curl, *_ = re.findall(r"^```\n(curl .*?)^```$", document, re.DOTALL | re.MULTILINE)
    before = served.agent.status().waiting
    for command in ([sys.executable, "-c", program], ["bash", "-c", curl]):
        here = [part.replace("http://127.0.0.1:11435", served.address) for part in command]
        done = subprocess.run(here, cwd=tmp_path, capture_output=True, text=True, timeout=120)
        assert done.returncode == 0, done.stderr
        assert len(done.stdout) > 20
    assert served.agent.status().waiting == before + 1


def test_feedback_takes_the_signals_that_mean_the_same_to_all_and_the_masker_lets_them_pass(served: Served) -> None:
    words = ("copied", "clicked", "regenerated", "abandoned", "escalated")
    answer = served.openai.chat.completions.create(model="fedloop", messages=asked())
    for word in words:
        assert served.feedback(answer.id, signal=word).status_code == 200
    found = served.agent._device.store.rows("SELECT signal FROM feedback ORDER BY number DESC LIMIT 5")
    assert [word for (word,) in found] == [*reversed(words)]
    assert [each.text for each in Masker().mask_together(words)] == [*words]
