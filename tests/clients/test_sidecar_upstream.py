"""The sidecar before another server: answers come from there, feedback stays here, and what goes wrong there is one error."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from clients.chatted import Chatted, chatted_in
from clients.conftest import DigitMasker
from clients.fake_upstream import ANSWER, DONE, HEAD, FakeUpstream, chunk, document, fake_upstream
from clients.sidecar_served import Served, error, serving
from fedloop_clients import Agent
from fedloop_clients.sidecar.upstream import Upstream, check_url
from fedloop_events.errors import UsageError

SILENCE_S = 1.0


@pytest.fixture(scope="module")
def upstream() -> Iterator[FakeUpstream]:
    with fake_upstream() as made:
        yield made


@pytest.fixture(scope="module")
def served(upstream: FakeUpstream, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("upstream")
    chatted = chatted_in(folder / "deployment")
    with (
        chatted.enrol(folder / "store") as agent,
        serving(agent, Upstream(agent, upstream.url, "their-key", silence_s=SILENCE_S)) as made,
    ):
        yield made
    chatted.log.close()


@pytest.fixture(autouse=True)
def honest(upstream: FakeUpstream) -> Iterator[None]:
    yield
    upstream.answer = ANSWER
    upstream.gone.clear()


def asked(text: str = "hello") -> list[Any]:
    return [{"role": "user", "content": text}]


def kept(agent: Agent, response_id: str) -> str | None:
    """The answer that the device keeps under an id."""
    own = agent._own_id("response", response_id)
    found = agent._device.store.rows("SELECT raw FROM texts WHERE kind = 'response' AND owner = ?", (own,))
    return found[0][0] if found else None


def test_an_answer_comes_from_there_and_feedback_stays_here(served: Served, upstream: FakeUpstream) -> None:
    answer = served.openai.chat.completions.create(
        model="llama3", messages=asked(), temperature=0.7, extra_body={"keep_alive": "5m"}
    )
    assert answer.choices[0].message.content == "Hello there"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (7, 2)
    line, headers, body = upstream.requests[-1]
    assert line == "POST /v1/chat/completions HTTP/1.1"
    assert headers["authorization"] == "Bearer their-key"
    assert (body["model"], body["temperature"], body["keep_alive"], body["stream"]) == ("llama3", 0.7, "5m", True)
    assert kept(served.agent, answer.id) == "Hello there"
    count = len(upstream.requests)
    assert served.feedback(answer.id, correction="Good morning").status_code == 200
    assert len(upstream.requests) == count


def test_pieces_are_passed_on_as_they_come(served: Served, upstream: FakeUpstream) -> None:
    go_on = asyncio.Event()

    async def in_two(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD + chunk("one "))
        await go_on.wait()
        writer.write(chunk("two", "length") + DONE)

    upstream.answer = in_two
    stream = served.openai.chat.completions.create(model="m", messages=asked(), stream=True)
    assert [next(stream).choices[0].delta.content for _ in range(2)] == ["", "one "]
    upstream._loop.call_soon_threadsafe(go_on.set)
    rest = list(stream)
    assert [each.choices[0].delta.content for each in rest] == ["two", None]
    assert rest[-1].choices[0].finish_reason == "length"
    assert kept(served.agent, rest[-1].id) == "one two"


def test_a_text_completion_goes_to_its_own_address(served: Served, upstream: FakeUpstream) -> None:
    upstream.answer = HEAD + b'data: {"choices": [{"text": "abc", "finish_reason": "stop"}]}\r\n\r\n' + DONE
    answer = served.openai.completions.create(model="m", prompt="hello")
    assert answer.choices[0].text == "abc"
    assert upstream.requests[-1][0].startswith("POST /v1/completions ")
    assert kept(served.agent, answer.id) == "abc"


def test_its_models_are_listed(served: Served, upstream: FakeUpstream) -> None:
    upstream.answer = document("200 OK", {"object": "list", "data": [{"id": "llama3"}, {"id": "a/b"}]})
    assert [each.id for each in served.openai.models.list()] == ["llama3", "a/b"]
    for lie in (document("200 OK", {"models": []}), document("200 OK", b"<html>"), document("500 Oops", b"")):
        upstream.answer = lie
        assert error(served.http.get("/v1/models"))["code"] == "upstream_error"


def test_embeddings_are_those_of_the_upstream(served: Served, upstream: FakeUpstream) -> None:
    data = [{"index": 1, "embedding": [0.0, 1.0]}, {"index": 0, "embedding": [1.0, 0.0]}]
    upstream.answer = document("200 OK", {"data": data})
    found = served.openai.embeddings.create(model="m", input=["a", "b"])
    assert [each.embedding for each in found.data] == [[1.0, 0.0], [0.0, 1.0]]
    assert upstream.requests[-1][2] == {"model": "m", "input": ["a", "b"], "encoding_format": "float"}
    upstream.answer = document("200 OK", {"data": data[:1]})
    with pytest.raises(openai.InternalServerError, match="an embedding of each text"):
        served.openai.embeddings.create(model="m", input=["a", "b"])


LIES: dict[str, tuple[bytes, int, str]] = {
    "a refusal": (document("400 Bad Request", {"error": {"message": "no such\nfield"}}), 400, "no such field"),
    "no such model": (document("404 Not Found", {"error": {"message": "model 'm' not found"}}), 404, "not found"),
    "its error as a text": (document("404 Not Found", {"error": "model 'm' not found"}), 404, "not found"),
    "too many": (document("429 Too Many", {"error": {"message": "later"}}), 429, "later"),
    "a wrong key": (document("401 Unauthorized", {"error": {"message": "their key"}}), 502, "status 401"),
    "a failure": (document("500 Internal Server Error", b"<html>oops</html>"), 502, "status 500"),
    "a failure of lists": (document("500 Internal Server Error", b"[" * 9_000), 502, "status 500"),
    "a failure that is long": (document("500 Internal Server Error", b"a" * (33 << 20)), 502, "more than"),
    "a redirect": (b"HTTP/1.1 302 Found\r\nlocation: http://example.org/\r\ncontent-length: 0\r\n\r\n", 502, "status 302"),
    "a document": (document("200 OK", {"choices": []}), 502, "did not stream"),
    "no JSON": (HEAD + b"data: {oops\n\n" + DONE, 502, "no chunk"),
    "a list": (HEAD + b"data: []\n\n" + DONE, 502, "no chunk"),
    "other types": (HEAD + b'data: {"choices": [{"delta": {"content": 7}}]}\n\n', 502, "no chunk"),
    "no Unicode": (HEAD + b"data: \xff\xfe\n\n", 502, "no chunk"),
    "an error in its stream": (HEAD + b'data: {"error": {"message": "out of memory"}}\n\n', 502, "out of memory"),
    "an end without an answer": (HEAD, 502, "before its answer was whole"),
    "an event without end": (HEAD + b"data: " + b"a" * (2 << 20), 502, "more than"),
    "a line of a header without end": (b"HTTP/1.1 200 OK\r\nx: " + b"a" * (2 << 20), 502, "broke off"),
    "no HTTP": (b"220 smtp.example.org\r\n", 502, "broke off"),
    "nothing": (b"", 502, "broke off"),
}


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("lie", LIES)
def test_an_upstream_that_lies_is_one_clear_error(served: Served, upstream: FakeUpstream, lie: str, stream: bool) -> None:
    upstream.answer, status, what = LIES[lie]
    response = served.http.post("/v1/chat/completions", json={"model": "m", "messages": asked(), "stream": stream})
    assert response.status_code == status
    assert what in error(response)["message"]
    assert "their-key" not in response.text


@pytest.mark.parametrize(
    ("rest", "what"),
    [
        (b"", "before its answer was whole"),
        (b"data: {oops\n\n", "no chunk"),
        (b'data: {"error": "out of memory"}\n\n', "out of memory"),
    ],
)
def test_one_that_breaks_off_is_an_error_in_the_stream_and_what_was_shown_can_be_judged(
    served: Served, upstream: FakeUpstream, rest: bytes, what: str
) -> None:
    upstream.answer = HEAD + chunk("Hello ") + rest
    stream = served.openai.chat.completions.create(model="m", messages=asked(), stream=True)
    first = next(stream)
    with pytest.raises(openai.APIError, match=what):
        list(stream)
    until_kept(served.agent, first.id, "Hello ")
    assert served.feedback(first.id, thumb="down").status_code == 200


def until_kept(agent: Agent, response_id: str, text: str) -> None:
    deadline = time.monotonic() + 30
    while kept(agent, response_id) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert kept(agent, response_id) == text


@pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\n", HEAD, HEAD + b"data: {"])
def test_one_that_hangs_is_an_error_after_a_while(served: Served, upstream: FakeUpstream, said: bytes) -> None:
    async def hang(writer: asyncio.StreamWriter) -> None:
        writer.write(said)
        await asyncio.sleep(600)

    upstream.answer = hang
    with pytest.raises(openai.InternalServerError, match="sent nothing for 1 seconds") as raised:
        served.openai.chat.completions.create(model="m", messages=asked())
    assert raised.value.status_code == 504
    assert upstream.gone.wait(30)


def test_who_goes_away_ends_the_request_there_and_what_was_read_is_kept(served: Served, upstream: FakeUpstream) -> None:
    async def endless(writer: asyncio.StreamWriter) -> None:
        writer.write(HEAD)
        while True:
            writer.write(chunk("word "))
            await writer.drain()
            await asyncio.sleep(0.01)

    upstream.answer = endless
    with served.http.stream("POST", "/v1/chat/completions", json={"model": "m", "messages": asked(), "stream": True}) as response:
        lines = (line for line in response.iter_lines() if line)
        chunks = [json.loads(next(lines).removeprefix("data: ")) for _ in range(3)]
    assert upstream.gone.wait(30)
    deadline = time.monotonic() + 30
    while kept(served.agent, chunks[0]["id"]) is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert served.feedback(chunks[0]["id"], thumb="down").status_code == 200


def test_an_upstream_that_is_away_is_one_error_and_feedback_is_taken_meanwhile(tmp_path: Path, chatted_alone: Chatted) -> None:
    with (
        fake_upstream() as upstream,
        chatted_alone.enrol(tmp_path / "store") as agent,
        serving(agent, Upstream(agent, upstream.url)) as served,
    ):
        answer = served.openai.chat.completions.create(model="m", messages=asked())
        upstream.close_listener()
        with pytest.raises(openai.InternalServerError, match="no server answers"):
            served.openai.chat.completions.create(model="m", messages=asked())
        assert served.feedback(answer.id, thumb="up").status_code == 200
        assert "authorization" not in upstream.requests[0][1]


@pytest.fixture
def chatted_alone(tmp_path: Path) -> Iterator[Chatted]:
    made = chatted_in(tmp_path / "deployment")
    yield made
    made.log.close()


def test_what_cannot_be_kept_is_answered_with_a_note(served: Served) -> None:
    turns: list[Any] = [{"role": "user", "content": "one"}, {"role": "user", "content": "two"}]
    answer = served.openai.chat.completions.create(model="m", messages=turns)
    assert answer.choices[0].message.content == "Hello there"
    assert "no feedback can name this response" in json.loads(answer.model_dump_json())["fedloop"]["note"]
    assert served.feedback(answer.id, thumb="up").status_code == 404


@pytest.mark.parametrize("url", ["", "localhost:11434", "ftp://localhost/v1", "http://", "http://localhost/v1?a=b", "http://[::"])
def test_what_is_no_base_url_is_refused(url: str) -> None:
    with pytest.raises(UsageError, match="no server's base URL"):
        check_url(url)


def test_a_classifier_takes_no_upstream(agent: Agent, masker: DigitMasker) -> None:
    with pytest.raises(UsageError, match="closed set of words"):
        Upstream(agent, "http://127.0.0.1:1/v1")
