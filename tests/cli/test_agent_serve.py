"""`fedloop agent serve` as a process: started, asked by the official client, stopped, and started again."""

from __future__ import annotations

import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from clients.chatted import chatted_in
from clients.classified import TEXTS, Classified, classified_in
from clients.fake_upstream import fake_upstream
from clients.fake_vllm import FakeVllm
from fedloop_cli import main
from fedloop_clients import Agent
from fedloop_clients.sidecar.access import KEY_FILE
from fedloop_events import types


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Classified]:
    made = classified_in(tmp_path_factory.mktemp("served"))
    yield made
    made.log.close()


@pytest.fixture
def store(classified: Classified, tmp_path: Path) -> Path:
    Agent.enrol(classified.folder, tmp_path / "store", key_from="file").close()
    return tmp_path / "store"


class Process:
    """`fedloop agent serve`, once it listens."""

    def __init__(self, *arguments: str) -> None:
        command = [sys.executable, "-m", "fedloop_cli.main", "agent", "serve", "--port", "0", "--json", *arguments]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=os.environ)
        assert self.process.stdout is not None
        self.printed = self.process.stdout.readline()
        document = json.loads(self.printed)
        self.base_url, self.key = document["base_url"], Path(document["key_file"]).read_text().strip()

    def feedback(self, response_id: str) -> Any:
        """What is answered to a thumb up."""
        return httpx.post(
            f"{self.base_url}/feedback",
            json={"id": response_id, "thumb": "up"},
            headers={"authorization": f"Bearer {self.key}"},
            trust_env=False,
        ).json()

    def ends(self, how: signal.Signals) -> int:
        self.process.send_signal(how)
        return self.process.wait(60)


@contextmanager
def served(*arguments: str) -> Iterator[Process]:
    made = Process(*arguments)
    try:
        yield made
    finally:
        made.process.kill()
        made.process.wait()
        assert made.process.stdout is not None
        made.process.stdout.close()


def test_a_device_is_served_with_a_key_of_its_own_and_takes_part_in_rounds_meanwhile(classified: Classified, store: Path) -> None:
    with served("--store", str(store)) as device:
        assert stat.S_IMODE((store / KEY_FILE).stat().st_mode) == 0o600
        assert device.key not in device.printed
        with openai.OpenAI(base_url=device.base_url, api_key=device.key, max_retries=0) as client:
            answer = client.chat.completions.create(model="default", messages=[{"role": "user", "content": TEXTS["loan"]}])
            assert answer.choices[0].message.content == "loan"
        with Agent.open(store) as agent:
            assert httpx.get(agent.feedback_url(answer.id), trust_env=False).status_code == 200
        given = device.feedback(answer.id)
        wait_for(lambda: given["id"] in [each.feedback_id for each in classified.appended(types.FeedbackRecorded)])
        assert device.ends(signal.SIGTERM) == 0
        key = device.key
    with served("--store", str(store), "--no-rounds") as device:
        assert device.key == key
        assert device.ends(signal.SIGINT) == 130


def test_feedback_that_was_answered_survives_a_kill(classified: Classified, store: Path) -> None:
    with Agent.open(store) as agent:
        response = agent.record(TEXTS["loan"], "loan").response_id
    with served("--store", str(store), "--no-rounds") as device:
        given = device.feedback(response)
        device.process.kill()
        device.process.wait(60)
    with Agent.open(store) as agent:
        assert agent.knows(given["id"])


def test_the_release_is_handed_to_the_upstream_and_answers_there(tmp_path: Path) -> None:
    chatted = chatted_in(tmp_path / "deployment")
    chatted.enrol(tmp_path / "store").close()
    with fake_upstream() as fake:
        vllm = FakeVllm(fake)
        options = ("--store", str(tmp_path / "store"), "--no-rounds", "--model-dir", str(chatted.base_folder))
        with served(*options, "--upstream", fake.url, "--hand-releases", "vllm") as device:
            name = f"fedloop-{chatted.base_release}"
            with openai.OpenAI(base_url=device.base_url, api_key=device.key, max_retries=0) as client:
                wait_for(lambda: "fedloop" in [each.id for each in client.models.list()], 180)
                answer = client.chat.completions.create(model="fedloop", messages=[{"role": "user", "content": "hello"}])
            assert answer.choices[0].message.content == "Hello there"
            assert vllm.adapters == {name: str(tmp_path / "store" / "upstream" / name)}
            assert device.ends(signal.SIGTERM) == 0
    chatted.log.close()


def wait_for(condition: Any, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_cannot_be_served_is_refused(store: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str, status: int) -> str:
        assert main.run(["agent", "serve", "--port", "0", *arguments]) == status
        return capsys.readouterr().err

    here = ("--store", str(store))
    for origin in ("*", "null", "https://app.example/page", "ftp://app.example"):
        assert "no origin of a web page" in refused(*here, "--allow-origin", origin, status=2)
    key = store / KEY_FILE
    key.write_text("short\n")
    key.chmod(0o600)
    assert "holds no key" in refused(*here, status=1)
    key.chmod(0o644)
    assert "can be read by other users" in refused(*here, status=1)
    assert "enrol this device first" in refused("--store", str(store / "none"), status=1)
    key.unlink()
    assert "closed set of words" in refused(*here, "--upstream", "http://127.0.0.1:1/v1", status=2)
    assert "there is nobody" in refused(*here, "--hand-releases", "vllm", status=2)
    assert "is for --hand-releases" in refused(*here, "--releases-folder", "out", status=2)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        assert "cannot listen" in refused(*here, "--port", str(taken.getsockname()[1]), status=3)
