"""What a device knows it answers from its own store, in a fresh process and whatever the log does."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from clients.conftest import DEAD, dead_location
from fedloop_clients import Agent
from fedloop_clients.device_view import DeviceView
from fedloop_events import topics as all_topics
from fedloop_events import types
from fedloop_events.errors import BlobError, UnreachableError, UsageError
from fedloop_events.logs.port import START, Batch, EventLog, Position

if TYPE_CHECKING:
    from clients.conftest import Deployment, DigitMasker

PROGRAM = """
import json, sys, time
from fedloop_clients import Agent

store, log, blobs = sys.argv[1:]
took = {}

def timed(what, call):
    begun = time.perf_counter()
    result = call()
    took.setdefault(what, []).append(time.perf_counter() - begun)
    return result

for _ in range(5):
    agent = timed("open", lambda: Agent.open(store, log, blobs=blobs))
    release = timed("status", agent.status).release
    response = timed("record", lambda: agent.record("my card is lost", "card-lost"))
    timed("feedback", lambda: agent.feedback(response.response_id, label="loan"))
    kept = timed("release", agent._in_force.kept)
    data = timed("tensors", lambda: agent._device.releases.tensors(kept.blob))
    assert agent.status().waiting
    timed("close", agent.close)
print(json.dumps({"release": release, "took": {what: min(times) for what, times in took.items()}}))
"""


@pytest.fixture(params=DEAD)
def dead(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    with dead_location(request.param, tmp_path) as location:
        yield location


class SlowLog:
    """A log that holds back what it reads."""

    def __init__(self, log: EventLog) -> None:
        self._log, self.asked, self.answers = log, threading.Event(), threading.Event()
        self.append, self.end, self.close = log.append, log.end, lambda: None

    def read(
        self, topics: Collection[str] = all_topics.ALL, after: Position = START, *, limit: int = 1000, wait_s: float = 0.0
    ) -> Batch:
        self.asked.set()
        assert self.answers.wait(10)
        return self._log.read(topics, after, limit=limit, wait_s=wait_s)


def in_a_fresh_process(store: Path, log: str, blobs: str) -> tuple[str, dict[str, float]]:
    command = [sys.executable, "-c", PROGRAM, str(store), log, blobs]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    document = json.loads(ended.stdout)
    return document["release"], document["took"]


def test_a_fresh_process_answers_without_a_log_that_answers(
    deployment: Deployment, tmp_path: Path, dead: str, masker: DigitMasker
) -> None:
    Agent.enrol(deployment.folder, tmp_path / "store", client_id="phone", key_from="file").close()
    blobs = dead if dead.startswith("http") else str(tmp_path / "no blobs")
    begun = time.monotonic()
    release, took = in_a_fresh_process(tmp_path / "store", dead, blobs)
    assert release == deployment.base_release
    assert {what for what, seconds in took.items() if seconds > 0.05} == set(), took
    assert time.monotonic() - begun < 20


@pytest.mark.parametrize(("kind", "taken_down"), [("http silent", False), ("folder", True)])
def test_a_command_ends_without_taking_python_down_around_a_thread_that_waits(
    deployment: Deployment, tmp_path: Path, kind: str, taken_down: bool
) -> None:
    """C++ libraries abort the process where a thread is ended in the middle of them."""
    Agent.enrol(deployment.folder, tmp_path / "store", client_id="phone", key_from="file").close()
    with dead_location(kind, tmp_path) as location:
        program = "import atexit; atexit.register(print, 'taken down'); from fedloop_cli.main import main; main()"
        where = ["--log", location, "--blobs", str(tmp_path / "no blobs")]
        command = [sys.executable, "-c", program, "agent", "status", "--store", str(tmp_path / "store"), *where]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (ended.returncode, ended.stderr) == (0, "")
    assert deployment.base_release in ended.stdout
    assert ("taken down" in ended.stdout) == taken_down


def test_what_a_loop_in_another_process_has_kept_an_open_agent_sees(
    deployment: Deployment, tmp_path: Path, masker: DigitMasker
) -> None:
    Agent.enrol(deployment.folder, tmp_path / "store", client_id="phone", key_from="file").close()
    with (
        Agent.open(tmp_path / "store", tmp_path / "gone", masker=masker) as cut_off,
        Agent.open(tmp_path / "store", masker=masker) as other,
    ):
        before = deployment.base_release
        assert cut_off.record("hello", "loan").release == before
        after = deployment.release()
        other.run(until=lambda status: status.release == after)
        assert cut_off.record("hello", "loan").release == after
        kept = cut_off._in_force.kept()
        assert (kept.release, kept.blob) == (after, deployment.base)
        assert cut_off._device.releases.tensors(kept.blob) == deployment.blobs.get(deployment.base)


def test_until_a_release_s_tensors_have_come_the_one_before_answers(deployment: Deployment, tmp_path: Path) -> None:
    with Agent.enrol(deployment.folder, tmp_path / "store", client_id="phone", key_from="file") as agent:
        before = agent._in_force.kept()
        after = deployment.release()
        shutil.move(deployment.folder / "blobs", tmp_path / "away")
        assert agent.status().release == after
        assert agent._in_force.kept() == before
        shutil.rmtree(deployment.folder / "blobs", ignore_errors=True)
        shutil.move(tmp_path / "away", deployment.folder / "blobs")
        assert agent._in_force.kept().release == after


def test_the_tensors_of_another_release_are_not_taken_for_those_that_are_kept(deployment: Deployment, tmp_path: Path) -> None:
    with Agent.enrol(deployment.folder, tmp_path / "store", client_id="phone", key_from="file") as agent:
        kept = agent._in_force.kept()
        with pytest.raises(BlobError, match="is not in the device's store"):
            agent._device.releases.tensors(types.BlobRef("0" * 64, kept.blob.size_bytes))


@pytest.mark.parametrize("meanwhile", ["another view", "a loop"])
def test_a_reading_that_ends_late_takes_nobody_s_place(deployment: Deployment, tmp_path: Path, meanwhile: str) -> None:
    """Whether the view has been replaced since it began, or a loop has begun to run, which alone changes it."""
    with Agent.enrol(deployment.folder, tmp_path / "store", client_id="phone", key_from="file") as agent:
        device, refresher, log = agent._device, agent._refresher, SlowLog(deployment.log)
        device.log = log
        before = DeviceView("phone", agent.identity.server_key, device.view.to_state())
        deployment.release()
        reading = threading.Thread(target=refresher._catch_up)
        reading.start()
        assert log.asked.wait(10)
        if meanwhile == "a loop":
            before = device.view
            refresher.running += 1
        else:
            device.view = before
        log.answers.set()
        reading.join(10)
        refresher.running = 0
        assert device.view is before


def test_a_device_that_knows_no_release_says_why(deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store, gone = tmp_path / "store", tmp_path / "gone"
    Agent.enrol(deployment.folder, store, client_id="phone", key_from="file").close()
    with Agent.open(store, gone) as agent:
        with agent._device.store.transaction() as db:
            db.execute("DELETE FROM kept WHERE name <> 'identity'")
        agent.close()
    with Agent.open(store, gone) as agent:
        with pytest.raises(UsageError, match="is known to this device") as refused:
            agent.predict("hello")
        assert "there is no deployment in" in refused.value.cause
        assert agent.status().release is None


def test_a_loop_that_waits_for_the_log_holds_up_no_answer(deployment: Deployment, tmp_path: Path, masker: DigitMasker) -> None:
    Agent.enrol(deployment.folder, tmp_path / "store", client_id="phone", key_from="file").close()
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with Agent.open(tmp_path / "store", url, masker=masker) as agent:
            agent._device.log._get()._transport.timeout_s = 3.0  # type: ignore[attr-defined]
            stop = threading.Event()
            running = threading.Thread(target=agent.run, args=(stop,))
            running.start()
            connection, took = silent.accept()[0], []
            for _ in range(5):
                begun = time.perf_counter()
                response = agent.record("hello", "loan")
                agent.feedback(response.response_id, thumb="up")
                agent.status()
                took.append(time.perf_counter() - begun)
            stop.set()
            silent.close()
            connection.close()
            running.join(60)
    assert not running.is_alive()
    assert min(took) < 0.1


def test_a_log_that_has_been_closed_is_not_opened_again(deployment: Deployment, tmp_path: Path) -> None:
    agent = Agent.enrol(deployment.folder, tmp_path / "store", client_id="phone", key_from="file")
    agent.close()
    read: Callable[[], object] = agent._device.log.end
    with pytest.raises(UnreachableError, match="closed"):
        read()
