"""Predicting, as a whole and with a real model, takes no longer for a log that is away."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import pytest
from clients.classified import TEXTS, Classified
from clients.conftest import DEAD, dead_location
from fedloop_clients import Agent

pytestmark = pytest.mark.slow
PROCESSES: Final = 5
"""So many are tried until one is quick."""

PROGRAM = """
import json, sys, time
from clients.conftest import DigitMasker
from fedloop_clients import Agent

def timed(call, *given):
    begun = time.perf_counter()
    found = call(*given)
    return time.perf_counter() - begun, found

store, log, blobs = sys.argv[1:]
agent = Agent.open(store, log, blobs=blobs, masker=DigitMasker())
kept = agent._device.releases.current("default")
with agent._device.models.borrowed(kept.spec) as held:
    model = held.load(kept.blob, agent._device.releases.tensors, agent._device.personal)
    model.predict(["hello"])
    model_s = min(timed(model.predict, [f"can I have a loan of {number}"])[0] for number in range(20))
took, responses = zip(*(timed(agent.predict, f"can I have a loan, please, of {number}") for number in range(10)))
assert {each.label for each in responses} == {"loan"}, responses
assert all(each.response_id for each in responses)
agent.close()
print(json.dumps({"first": took[0] - model_s, "best": min(took) - model_s}))
"""


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("predicting")
    deployment = Classified(folder / "deployment")
    deployment.register()
    deployment.arrays = deployment.model.initial_arrays(0)
    deployment.arrays["head.weight"] = deployment.model.embed(list(TEXTS.values()))
    deployment.release()
    Agent.enrol(deployment.folder, folder / "store", client_id="phone", key_from="file").close()
    yield folder / "store"
    deployment.log.close()


def beyond_the_model(store: Path, log: str, blobs: str) -> dict[str, float]:
    """Seconds that predicting takes in a fresh process beyond what its model computes."""
    command = [sys.executable, "-c", PROGRAM, str(store), log, blobs]
    environment = {"PYTHONPATH": ":".join(sys.path), "PATH": "", "OMP_NUM_THREADS": "1"}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False, env=environment)
    assert ended.returncode == 0, ended.stderr
    found: dict[str, float] = json.loads(ended.stdout)
    return found


@pytest.mark.parametrize("kind", DEAD)
def test_predicting_waits_for_no_log_that_is_away(store: Path, tmp_path: Path, kind: str) -> None:
    with dead_location(kind, tmp_path) as dead:
        blobs = dead if kind.startswith("http") else str(tmp_path / "no blobs")
        # Some 30 ms the first time; the machine may be busy with what the reading thread imports, or with other tests: a wait for
        # the log would be there in every process.
        found = list[dict[str, float]]()
        while len(found) < PROCESSES:
            found.append(beyond_the_model(store, dead, blobs))
            if found[-1]["best"] < 0.05 and found[-1]["first"] < 0.25:
                return
    raise AssertionError(found)
