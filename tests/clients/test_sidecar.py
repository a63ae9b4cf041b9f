"""The sidecar with a classifier behind it: the official client, plain curl, and requests that are wrong."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from clients.classified import TEXTS, Classified, enrol
from clients.conftest import Deployment, DigitMasker
from clients.sidecar_served import KEY, Served, error, serving
from fedloop_clients import Agent

ORIGIN = "https://app.example"


@pytest.fixture(scope="module")
def served(classified: Classified, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with enrol(classified, tmp_path_factory.mktemp("sidecar") / "store") as agent, serving(agent, origins=[ORIGIN]) as made:
        yield made


def asked(text: str) -> list[Any]:
    return [{"role": "system", "content": "You are a bank."}, {"role": "user", "content": text}]


def test_the_official_client_is_answered_and_gives_feedback_with_the_completions_id(served: Served) -> None:
    for label, text in TEXTS.items():
        answer = served.openai.chat.completions.create(model="default", messages=asked(text))
        assert answer.choices[0].message.content == label
        assert answer.choices[0].finish_reason == "stop"
        assert answer.system_fingerprint == served.agent.status().release
    given = served.feedback(answer.id, correction="card-lost", comment="the wrong way round")
    assert given.status_code == 200
    assert given.json()["teaches"] == "card-lost"
    assert served.agent.knows(given.json()["id"])
    again = served.openai.chat.completions.create(model="default", messages=asked(text))
    assert again.choices[0].message.content == "card-lost"
    served.agent.retract(given.json()["id"])  # which the other tests ask too


def test_a_streamed_answer_is_that_of_one_that_is_not_streamed(served: Served) -> None:
    chunks = list(
        served.openai.chat.completions.create(
            model="fedloop", messages=asked(TEXTS["loan"]), stream=True, stream_options={"include_usage": True}
        )
    )
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices) == "loan"
    assert len({chunk.id for chunk in chunks}) == 1
    assert [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices][-1] == "stop"
    assert chunks[-1].usage is not None
    assert not chunks[-1].choices
    assert served.feedback(chunks[0].id, thumb="up").status_code == 200


def test_events_are_sent_as_the_specification_of_streams_says(served: Served) -> None:
    body = {"messages": asked(TEXTS["loan"]), "stream": True}
    response = served.http.post("/v1/chat/completions", json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    lines = response.text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(line.removeprefix("data: "))["object"] == "chat.completion.chunk" for line in lines[:-2])


def test_text_completions_and_models_answer_too(served: Served) -> None:
    answer = served.openai.completions.create(model="default", prompt=TEXTS["transfer"])
    assert answer.choices[0].text == "transfer"
    streamed = served.openai.completions.create(model="default", prompt=[TEXTS["transfer"]], stream=True)
    assert "".join(chunk.choices[0].text for chunk in streamed) == "transfer"
    assert [each.id for each in served.openai.models.list()] == ["default"]
    assert served.openai.models.retrieve("fedloop").id == "default"


def test_a_classifiers_embeddings_tell_its_classes_apart(served: Served) -> None:
    texts = ["I lost my card", TEXTS["card-lost"], TEXTS["loan"]]
    one, same, other = (each.embedding for each in served.openai.embeddings.create(model="default", input=texts).data)
    assert sum(a * b for a, b in zip(one, same, strict=True)) > sum(a * b for a, b in zip(one, other, strict=True))


def test_curl_is_answered(served: Served) -> None:
    message = json.dumps({"messages": asked(TEXTS["card-lost"])})
    command = ["curl", "-sS", f"{served.base_url}/chat/completions", "-H", f"Authorization: Bearer {KEY}", "-d", message]
    found = subprocess.run(command, capture_output=True, check=True, timeout=60)
    assert json.loads(found.stdout)["choices"][0]["message"]["content"] == "card-lost"


def test_content_may_be_parts_of_text(served: Served) -> None:
    parts: list[Any] = [{"type": "text", "text": part} for part in ("my card ", "is lost")]
    answer = served.openai.chat.completions.create(model="default", messages=[{"role": "user", "content": parts}])
    assert answer.choices[0].message.content == "card-lost"


def test_twenty_at_once_are_all_answered(served: Served) -> None:
    texts = [*TEXTS.items()] * 7
    with ThreadPoolExecutor(20) as many:
        found = list(
            many.map(lambda each: served.openai.chat.completions.create(model="default", messages=asked(each[1])), texts[:20])
        )
    assert [each.choices[0].message.content for each in found] == [label for label, _ in texts[:20]]
    assert len({each.id for each in found}) == 20


@pytest.mark.parametrize(
    ("body", "status", "code", "param"),
    [
        (b"{", 400, "invalid_request", None),
        (b"[]", 400, "invalid_request", None),
        (b"\xff\xfe", 400, "invalid_request", None),
        (b"[" * 100_000, 400, "invalid_request", None),
        ({}, 400, "invalid_request", None),
        ({"messages": []}, 400, "invalid_request", "messages"),
        ({"messages": asked("a"), "n": 2}, 400, "unsupported", "n"),
        ({"messages": asked("a"), "n": "many"}, 400, "invalid_request", "n"),
        ({"messages": asked("a"), "temperature": 3}, 400, "invalid_request", "temperature"),
        ({"messages": asked("a"), "max_tokens": 0}, 400, "invalid_request", "max_tokens"),
        ({"messages": asked("a"), "stop": ["a", ""]}, 400, "invalid_request", "stop"),
        ({"messages": asked("a"), "tools": [{"type": "function"}]}, 400, "unsupported", "tools"),
        ({"messages": asked("a"), "response_format": {"type": "json_object"}}, 400, "unsupported", "response_format"),
        ({"messages": [{"role": "tool", "content": "a"}]}, 400, "invalid_request", "messages[0].role"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, 400, "invalid_request", "messages"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, 400, "unsupported", "messages"),
        ({"messages": asked("")}, 400, "invalid_request", None),
        ({"messages": asked("a" * 10_001)}, 400, "invalid_request", None),
        ({"messages": asked("a"), "model": "gpt-4o"}, 404, "model_not_found", "model"),
        (b'"' + b"a" * (1 << 20) + b'"', 413, "too_large", None),
    ],
    ids=str,
)
def test_what_cannot_be_answered_is_refused_in_one_sentence(
    served: Served, body: Any, status: int, code: str, param: str | None
) -> None:
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    response = served.http.post("/v1/chat/completions", content=content)
    assert response.status_code == status
    found = error(response)
    assert (found["code"], found["param"]) == (code, param)


def test_the_official_client_raises_its_typed_exceptions(served: Served) -> None:
    stranger = served.openai.with_options(api_key="wrong")
    with pytest.raises(openai.AuthenticationError, match="key is absent or wrong"):
        stranger.chat.completions.create(model="default", messages=asked("a"))
    with pytest.raises(openai.BadRequestError, match="n must be 1"):
        served.openai.chat.completions.create(model="default", messages=asked("a"), n=2)
    with pytest.raises(openai.NotFoundError, match="alone"):
        served.openai.chat.completions.create(model="other", messages=asked("a"))


def test_fields_that_are_not_known_are_ignored(served: Served) -> None:
    extra: Any = {"top_p": 0.9, "user": "ann", "logit_bias": {}, "store": False, "no_such_field": [1]}
    answer = served.openai.chat.completions.create(model="default", messages=asked(TEXTS["loan"]), extra_body=extra)
    assert answer.choices[0].message.content == "loan"


@pytest.mark.parametrize("given", [None, "", "Bearer", "Bearer wrong", f"Basic {KEY}", f"Bearer {KEY}x", "Bearer \xff\xfe"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/models", "/v1/feedback", "/v1/none", "/v1"])
def test_nothing_of_v1_is_served_without_the_key(served: Served, given: str | None, path: str) -> None:
    headers = {} if given is None else {b"authorization": given.encode("latin-1")}
    response = httpx.post(served.address + path, headers=headers, trust_env=False)
    assert response.status_code == 401
    assert error(response)["code"] == "invalid_api_key"
    assert KEY not in response.text


def test_what_is_nowhere_is_404_and_another_method_405(served: Served) -> None:
    assert error(served.http.get("/v1/none"))["code"] == "not_found"
    assert served.http.get("/none").status_code == 404
    assert error(served.http.get("/v1/chat/completions"))["code"] == "method_not_allowed"
    assert httpx.get(f"{served.address}/healthz", trust_env=False).json() == {"status": "ok"}


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:11435", "localhost.evil.example", "192.0.2.1", "", "127.0.0.1.nip.io"]
)
def test_a_page_whose_name_was_made_to_resolve_to_this_machine_is_refused(served: Served, host: str) -> None:
    for path in ("/v1/models", "/healthz"):
        response = served.http.get(path, headers={"host": host})
        assert response.status_code == 403
        assert error(response)["code"] == "host_not_allowed"


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:1", "127.0.0.1:11435", "[::1]:11435", "[::1]"])
def test_this_machine_may_be_named_in_every_way(served: Served, host: str) -> None:
    assert served.http.get("/v1/models", headers={"host": host}).status_code == 200


def test_pages_of_allowed_origins_alone_may_read_what_is_answered(served: Served) -> None:
    asking = {"access-control-request-method": "POST", "access-control-request-headers": "authorization,x-stainless-os"}
    allowed = httpx.options(
        f"{served.base_url}/chat/completions", headers={"origin": ORIGIN, **asking}, trust_env=False
    )  # a preflight brings no key
    assert allowed.status_code == 200
    assert allowed.headers["access-control-allow-origin"] == ORIGIN
    assert "x-stainless-os" in allowed.headers["access-control-allow-headers"]
    assert "POST" in allowed.headers["access-control-allow-methods"]
    other = httpx.options(f"{served.base_url}/models", headers={"origin": "https://evil.example", **asking}, trust_env=False)
    assert other.status_code == 400
    assert "access-control-allow-origin" not in other.headers
    assert served.http.get("/v1/models", headers={"origin": ORIGIN}).headers["access-control-allow-origin"] == ORIGIN
    assert "access-control-allow-origin" not in served.http.get("/v1/models", headers={"origin": "null"}).headers
    refused = httpx.get(f"{served.base_url}/models", headers={"origin": ORIGIN}, trust_env=False)
    assert (refused.status_code, refused.headers["access-control-allow-origin"]) == (401, ORIGIN)


@pytest.mark.parametrize(
    ("given", "status", "code"),
    [
        ({"thumb": "up"}, 400, "invalid_request"),
        ({"id": "none", "thumb": "up"}, 404, "response_not_found"),
        ({"id": "none", "thumbs": "up"}, 400, "invalid_request"),
        ({"id": "none", "thumb": "sideways"}, 400, "invalid_request"),
        ({"id": "a b", "thumb": "up"}, 400, "invalid_request"),
        ({"id": "one", "response_id": "other", "thumb": "up"}, 400, "invalid_request"),
        ({"id": "none"}, 400, "invalid_request"),
    ],
    ids=str,
)
def test_feedback_that_cannot_be_meant_is_refused(served: Served, given: dict[str, str], status: int, code: str) -> None:
    response = served.http.post("/v1/feedback", json=given)
    assert response.status_code == status
    assert error(response)["code"] == code


def test_the_same_feedback_twice_counts_once_and_other_feedback_under_its_id_is_a_conflict(served: Served) -> None:
    answer = served.openai.chat.completions.create(model="default", messages=asked(TEXTS["loan"]))
    first = served.feedback(answer.id, thumb="up", feedback_id="mine")
    assert served.feedback(answer.id, thumb="up", feedback_id="mine").json() == first.json()
    response = served.feedback(answer.id, thumb="down", feedback_id="mine")
    assert (response.status_code, error(response)["code"]) == (409, "conflicting_feedback")


def test_a_device_without_a_model_answers_that_there_is_none_yet(tmp_path: Path) -> None:
    made = Deployment(tmp_path / "deployment")
    store = tmp_path / "store"
    with (
        Agent.enrol(made.folder, store, client_id="phone", key_from="file", masker=DigitMasker()) as agent,
        serving(agent) as served,
        pytest.raises(openai.InternalServerError, match="no release of model") as raised,
    ):
        served.openai.chat.completions.create(model="default", messages=asked("a"))
    assert raised.value.status_code == 503
    assert raised.value.code == "no_model"
    made.log.close()
