"""Running the server of a deployment: what it is given, what it shows while it runs, and how it ends."""

from __future__ import annotations

import os
import threading
import time
import urllib.request
from contextlib import closing
from pathlib import Path
from socket import socket
from typing import Any

import msgspec
import numpy as np
import pytest
from devices import CONFIG, PLAN, SPEC, World, evaluate, initial_arrays
from fedloop_events import types
from fedloop_events.envelope import Record
from fedloop_events.errors import LogChangedError, UsageError
from fedloop_events.locations import locate, open_blobs
from fedloop_events.logs.port import read_all
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_events.writer import EventWriter
from fedloop_server import config as configuration
from fedloop_server import serving
from fedloop_server.config import ServerConfig
from fedloop_server.deployment import Deployment
from fedloop_server.rounds.planner import Planner
from fedloop_server.serving import serve
from fedloop_tasks.classification.plan import ClassificationPlan
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


def test_a_server_sweeps_its_blob_store_beside_its_rounds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "FIRST_SWEEP_S", 0.0)
    world, stop = World(tmp_path / "deployment"), threading.Event()
    place = locate(world.folder)
    blobs = open_blobs(place.blobs)
    old, young = blobs.put([b"old"]), blobs.put([b"young"])
    named = sorted(set(blobs.all()) - {old.sha256, young.sha256})
    for sha256, days in ((old.sha256, 7.1), (young.sha256, 6.9), *((each, 100) for each in named)):
        written_s = time.time() - days * 24 * 3600
        os.utime(tmp_path / "deployment" / "blobs" / sha256[:2] / sha256[2:], (written_s, written_s))
    running = threading.Thread(target=serve, args=(world.folder, place, stop, make_evaluate))
    running.start()
    end = time.monotonic() + 30
    while blobs.exists(old):
        assert time.monotonic() < end
        threading.Event().wait(0.01)
    stop.set()
    running.join(30)
    assert sorted(blobs.all()) == sorted([*named, young.sha256])


def test_a_server_that_is_to_stop_ends_before_it_decides_anything(tmp_path: Path) -> None:
    world = World(tmp_path / "deployment")
    stop = threading.Event()
    stop.set()
    assert serve(world.folder, locate(world.folder), stop, make_evaluate) == 0
    assert world.payloads(types.EpochStarted) == []


def test_a_log_that_was_cut_off_is_not_served_unless_the_loss_is_accepted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    world, stop = World(tmp_path / "deployment"), threading.Event()
    for name in ("ann", "bob"):
        world.device(name)
    world.request(1)
    with world.serving():
        assert serve(world.folder, locate(world.folder), stop, make_evaluate, until_idle=True) == 1
    whole = list(read_all(world.log))
    cut = len(whole) - 5
    world.log.close()
    for path in world.folder.glob("log.sqlite*"):
        path.unlink()
    restored = SqliteLog(world.folder / "log.sqlite")
    restored.append(whole[:cut])
    with pytest.raises(LogChangedError, match=f"the log ends before event .*: it has {cut}") as refused:
        serve(world.folder, locate(world.folder), stop, make_evaluate, until_idle=True)
    assert "--accept-loss" in refused.value.hint
    requested = [types.RoundRequested(world.devices["ann"].origin, "main", f"q{number}") for number in range(9)]
    EventWriter(restored, world.writer.key).append(*requested)
    with pytest.raises(LogChangedError, match="is not the one that was read there"):
        serve(world.folder, locate(world.folder), stop, make_evaluate)
    assert restored.end().offsets["log"] == cut + 9, "it has begun no epoch"
    stop.set()
    serve(world.folder, locate(world.folder), stop, make_evaluate, accept_loss=True)
    assert "what is lost is accepted: event" in caplog.text
    serve(world.folder, locate(world.folder), stop, make_evaluate)
    restored.close()


def test_a_deployment_whose_making_was_cut_short_is_not_served(tmp_path: Path) -> None:
    with pytest.raises(UsageError):
        serve(tmp_path, locate(tmp_path), threading.Event(), make_evaluate)


@pytest.mark.parametrize(
    ("edited", "named"),
    [
        ({"plan": msgspec.structs.replace(PLAN, epsilon=1e-5, delta=1e-9, planned_rounds=10_000)}, "epsilon = 1e-05"),
        ({"max_upload_bytes": 50}, "max_upload_bytes = 50"),
    ],
)
def test_a_configuration_that_no_round_can_run_with_is_refused_before_anything_is_decided(
    tmp_path: Path, edited: dict[str, Any], named: str
) -> None:
    world = World(tmp_path / "deployment", CONFIG)
    impossible = configuration.dump(msgspec.structs.replace(CONFIG, **edited))
    (world.folder / "server" / "server.toml").write_text(impossible)
    events = list(read_all(world.log))
    with pytest.raises(UsageError, match=named):
        serve(world.folder, locate(world.folder), threading.Event(), make_evaluate, until_idle=True)
    assert list(read_all(world.log)) == events


def test_a_model_whose_rounds_no_event_can_hold_is_refused() -> None:
    arrays = {f"lora.{layer}.query.{part}": np.zeros((1, 1), np.float32) for layer in range(2_000) for part in "AB"}
    with pytest.raises(UsageError, match="4000 tensors"):
        Planner(ServerConfig(plan=ClassificationPlan(epsilon=None))).check(arrays)


def test_what_the_check_has_found_is_kept_for_the_first_round(tmp_path: Path) -> None:
    planner = Planner(CONFIG)
    planner.check(initial_arrays())
    planner.keep_in(tmp_path / "plan.json")
    assert (tmp_path / "plan.json").exists()
    kept = Planner(CONFIG, cache=tmp_path / "plan.json")
    assert kept.terms("sums") == planner.terms("sums")
