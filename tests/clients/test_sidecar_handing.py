"""Releases are handed to the server that answers in the device's place: each once, and what goes wrong harms nothing else."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import pytest
from clients.chatted import Chatted, chatted_in
from clients.fake_upstream import document, fake_upstream
from clients.fake_vllm import FakeVllm
from clients.sidecar_served import Served, serving
from fedloop_clients import Agent
from fedloop_clients.sidecar import handing
from fedloop_clients.sidecar.handing import Handing, ToFile, ToVllm
from fedloop_clients.sidecar.upstream import Upstream
from fedloop_tasks.task import Streamed

ASKED: Any = [{"role": "user", "content": "hello"}]


@pytest.fixture
def vllm() -> Iterator[FakeVllm]:
    with fake_upstream() as made:
        yield FakeVllm(made)


@pytest.fixture(scope="module")
def chatted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chatted]:
    made = chatted_in(tmp_path_factory.mktemp("handing") / "deployment")
    yield made
    made.log.close()


@pytest.fixture
def agent(chatted: Chatted, tmp_path: Path) -> Iterator[Agent]:
    with chatted.enrol(tmp_path / "store") as agent:
        yield agent


@pytest.fixture
def upstream(agent: Agent, vllm: FakeVllm) -> Upstream:
    return Upstream(agent, vllm.fake.url)


@pytest.fixture
def served(agent: Agent, upstream: Upstream) -> Iterator[Served]:
    with serving(agent, upstream) as made:
        yield made


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def train(chatted: Chatted, agent: Agent, seed: int) -> str:
    """A new release that the device has."""
    release = chatted.train(seed)
    until(lambda: agent.release == release)
    return release


def ask(served: Served, model: str = "fedloop") -> Any:
    return served.openai.chat.completions.create(model=model, messages=ASKED)


def test_vllm_loads_the_release_and_answers_with_it(
    agent: Agent, vllm: FakeVllm, upstream: Upstream, served: Served, tmp_path: Path
) -> None:
    ToVllm(agent, upstream, tmp_path / "handed").hand()
    name = f"fedloop-{agent.release}"
    folder = tmp_path / "handed" / name
    assert vllm.adapters == {name: str(folder)}
    assert ask(served).choices[0].message.content == "Hello there"
    assert vllm.fake.requests[-1][2]["model"] == name
    ask(served, "base")
    assert vllm.fake.requests[-1][2]["model"] == "base"
    assert [each.id for each in served.openai.models.list()] == ["fedloop", "base", name]

    _, export = agent.export("peft")
    card, weights = (export.files[each] for each in ("README.md", "adapter_model.safetensors"))
    assert (folder / "adapter_model.safetensors").read_bytes() == weights
    assert isinstance(card, bytes)
    assert card.decode().count("Not known to the device that wrote this") == 3
    assert "not evaluated" not in card.decode()
    assert "nothing of a user went in" not in card.decode()


def test_a_release_is_handed_once_also_after_a_restart_and_again_if_vllm_has_lost_it(
    agent: Agent, vllm: FakeVllm, upstream: Upstream, tmp_path: Path
) -> None:
    hands = ToVllm(agent, upstream, tmp_path / "handed")
    hands.hand()
    hands.hand()
    again = Upstream(agent, vllm.fake.url)
    ToVllm(agent, again, tmp_path / "handed").hand()
    assert again.adapter == f"fedloop-{agent.release}"
    assert vllm.told("load") == [again.adapter]
    vllm.adapters.clear()
    hands.hand()
    assert vllm.told("load") == [again.adapter] * 2
    assert vllm.told("unload") == []


def test_a_new_release_takes_the_place_of_the_one_before_which_is_unloaded_and_deleted_later(
    agent: Agent, chatted: Chatted, vllm: FakeVllm, upstream: Upstream, served: Served, tmp_path: Path
) -> None:
    folder = tmp_path / "handed"
    folder.mkdir()
    (folder / "fedloop-of-somebody").mkdir()
    (folder / ".fedloop-0000.cut-short").mkdir()
    hands = ToVllm(agent, upstream, folder)
    hands.hand()
    before = upstream.adapter
    release = train(chatted, agent, 1)
    hands.hand()
    assert set(vllm.adapters) == {before, f"fedloop-{release}"}
    ask(served)
    assert vllm.fake.requests[-1][2]["model"] == upstream.adapter == f"fedloop-{release}"
    hands.hand()
    assert set(vllm.adapters) == {upstream.adapter}
    assert sorted(each.name for each in folder.iterdir()) == sorted([upstream.adapter, "fedloop-of-somebody"])
    count = len(vllm.told("unload"))
    hands.hand()
    assert len(vllm.told("unload")) == count == 1


REFUSALS = {
    "not at run time": (document("404 Not Found", {"detail": "Not Found"}), "VLLM_ALLOW_RUNTIME_LORA_UPDATING"),
    "a wrong rank": (document("400 Bad Request", {"error": {"message": "rank 64 is greater"}}), "rank 64 is greater"),
    "a failure": (document("500 Internal Server Error", b"oops"), "status 500"),
    "a wrong key": (document("401 Unauthorized", {"error": "Unauthorized"}), "status 401"),
    "nothing": (b"", "broke off"),
}


@pytest.mark.parametrize("refusal", REFUSALS)
def test_a_refusal_is_one_line_answers_go_on_and_it_is_tried_again(
    agent: Agent,
    vllm: FakeVllm,
    upstream: Upstream,
    served: Served,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    refusal: str,
) -> None:
    vllm.refuses, what = REFUSALS[refusal]
    steps = Handing(ToVllm(agent, upstream, tmp_path / "handed"))
    steps.step()
    steps.step()
    (line,) = caplog.messages
    assert what in line
    assert "\n" not in line
    assert ask(served, "base").choices[0].message.content == "Hello there"
    vllm.refuses = None
    steps.step()
    assert set(vllm.adapters) == {f"fedloop-{agent.release}"}
    assert len(caplog.messages) == 1


def test_a_server_that_is_away_is_one_line(
    agent: Agent, vllm: FakeVllm, upstream: Upstream, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    steps = Handing(ToVllm(agent, upstream, tmp_path / "handed"))
    vllm.fake.close_listener()
    until(lambda: not vllm.fake._server.is_serving())
    steps.step()
    steps.step()
    (line,) = caplog.messages
    assert "no server answers" in line


@pytest.mark.parametrize("kind", ["vllm", "llama.cpp"])
def test_a_folder_that_cannot_be_made_is_one_line_that_names_it(
    agent: Agent, upstream: Upstream, tmp_path: Path, caplog: pytest.LogCaptureFixture, kind: handing.Kind
) -> None:
    (tmp_path / "handed").write_text("a file")
    steps = Handing(handing.to(kind, agent, upstream, tmp_path / "handed"))
    steps.step()
    steps.step()
    (line,) = caplog.messages
    assert str(tmp_path / "handed") in line
    (tmp_path / "handed").unlink()
    steps.step()
    assert any((tmp_path / "handed").iterdir())


def test_a_base_that_is_not_there_is_one_line(
    chatted: Chatted, upstream: Upstream, agent: Agent, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    agent.close()
    with Agent.open(tmp_path / "store") as without:
        steps = Handing(ToVllm(without, upstream, tmp_path / "handed"))
        steps.step()
        steps.step()
    (line,) = caplog.messages
    assert "base" in line


def test_llama_cpp_is_handed_a_file_and_its_operator_one_line_for_each_release(
    agent: Agent, chatted: Chatted, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "handed" / "adapter.gguf"
    hands = ToFile(agent, tmp_path / "handed")
    for each in (hands, hands, ToFile(agent, tmp_path / "handed")):
        each.hand()
    (line,) = caplog.messages
    assert line.endswith(f"restart it with --lora {path}")
    assert name_in(path) == f"default {agent.release}"
    release = train(chatted, agent, 2)
    hands.hand()
    assert name_in(path) == f"default {release}"
    assert len(caplog.messages) == 2
    _, export = agent.export("gguf")
    made = export.files["adapter.gguf"]
    assert isinstance(made, Streamed)
    assert path.read_bytes() == b"".join(made.chunks)
    assert "Not known to the device" in path.with_name("README.md").read_text()


def name_in(path: Path) -> str:
    field = gguf.GGUFReader(path).get_field("general.name")
    assert field is not None
    return str(field.contents())


def test_a_server_that_hangs_holds_up_neither_answers_nor_the_end(
    agent: Agent, vllm: FakeVllm, upstream: Upstream, served: Served, tmp_path: Path
) -> None:
    asked, go_on = threading.Event(), asyncio.Event()

    async def hang(writer: asyncio.StreamWriter) -> None:
        if vllm.fake.requests[-1][0].startswith("POST /v1/load_lora_adapter"):
            asked.set()
            await go_on.wait()
        await vllm.answer(writer)

    vllm.fake.answer = hang
    with handing.handing(ToVllm(agent, upstream, tmp_path / "handed")):
        assert asked.wait(60)
        assert ask(served, "base").choices[0].message.content == "Hello there"
        (thread,) = [each for each in threading.enumerate() if each.name == handing.THREAD]
        assert thread.daemon
    assert thread.is_alive()
    vllm.fake._loop.call_soon_threadsafe(go_on.set)
    thread.join(60)
    assert not thread.is_alive()


def test_a_name_for_the_model_that_is_not_handed_goes_there_as_it_is(vllm: FakeVllm, served: Served) -> None:
    response = served.http.post("/v1/chat/completions", json={"model": "fedloop", "messages": ASKED})
    assert response.status_code == 404
    assert json.loads(response.text)["error"]["code"] == "model_not_found"
    assert [each.id for each in served.openai.models.list()] == ["base"]
