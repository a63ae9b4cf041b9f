"""Running the server of a deployment: what it is given, what it shows while it runs, and how it ends."""

from __future__ import annotations

import threading
import urllib.request
from contextlib import closing
from pathlib import Path
from socket import socket

import msgspec
import pytest
from devices import CONFIG, SPEC, World, evaluate
from fedloop_events import types
from fedloop_events.envelope import Record
from fedloop_events.errors import UsageError
from fedloop_events.locations import locate
from fedloop_server.deployment import Deployment
from fedloop_server.serving import serve
from fedloop_tasks.table import task_of
from fedloop_tasks.task import Evaluate, Task


def make_evaluate(deployment: Deployment, task: Task) -> Evaluate:
    assert task.summary() == task_of(SPEC).summary()
    assert deployment.folder.name == "server"
    return evaluate


def test_a_server_runs_rounds_shows_new_events_alone_and_its_metrics(tmp_path: Path) -> None:
    world = World(tmp_path / "deployment", msgspec.structs.replace(CONFIG, quorum_wait_s=60.0))
    for name in ("ann", "bob"):
        world.device(name)
    world.request(2)
    with closing(socket()) as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    seen: list[types.Payload] = []
    scraped: list[str] = []

    def on_event(record: Record, payload: types.Payload) -> None:
        seen.append(payload)
        if isinstance(payload, types.RoundOpened):
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=10) as answer:
                scraped.append(answer.read().decode())

    place = locate(world.folder)
    with world.serving():
        ended = serve(
            world.folder, place, threading.Event(), make_evaluate, rounds=1, on_event=on_event, metrics=f"127.0.0.1:{port}"
        )
    assert ended == 1
    assert not any(isinstance(payload, types.RoundRequested) for payload in seen)
    assert sum(isinstance(payload, types.ReleasePublished) for payload in seen) == 1
    assert "fedloop_rounds_waiting" in scraped[0]
    with world.serving():
        assert serve(world.folder, place, threading.Event(), make_evaluate, until_idle=True) == 1


def test_a_server_that_is_to_stop_ends_before_it_decides_anything(tmp_path: Path) -> None:
    world = World(tmp_path / "deployment")
    stop = threading.Event()
    stop.set()
    assert serve(world.folder, locate(world.folder), stop, make_evaluate) == 0
    assert world.payloads(types.EpochStarted) == []


def test_a_deployment_whose_making_was_cut_short_is_not_served(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        serve(tmp_path, locate(tmp_path), threading.Event(), make_evaluate)
