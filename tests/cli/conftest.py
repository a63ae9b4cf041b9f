"""The command line as users run it: processes, exit statuses, standard output and standard error."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from fedloop_events import types
from fedloop_events.blobs.tensors import Array
from fedloop_events.locations import DeploymentLocation
from fedloop_server.config import ServerConfig
from fedloop_server.deployment import Deployment, create_deployment
from fedloop_tasks.classification.plan import ClassificationPlan


class Ended(NamedTuple):
    """How a command ended."""

    status: int
    out: str
    err: str

    @property
    def document(self) -> dict[str, Any]:
        """The one JSON document on standard output."""
        assert self.out.endswith("\n")
        found: dict[str, Any] = json.loads(self.out)
        return found


Fedloop = Callable[..., Ended]


@pytest.fixture(scope="session")
def fedloop() -> Fedloop:
    def run(*arguments: str | Path, env: Mapping[str, str] = {}, stdin: str = "", timeout_s: float = 200) -> Ended:
        done = subprocess.run(
            [sys.executable, "-m", "fedloop_cli.main", *map(str, arguments)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )
        return Ended(done.returncode, done.stdout, done.stderr)

    return run


def release_arrays(labels: int = 2, width: int = 3) -> dict[str, Array]:
    import numpy as np

    return {
        "lora.0.query.A": np.ones((2, width), np.float32),
        "lora.0.query.B": np.zeros((width, 2), np.float32),
        "head.weight": np.zeros((labels, width), np.float32),
        "head.bias": np.zeros(labels, np.float32),
    }


def deploy(directory: Path, place: DeploymentLocation | None = None) -> Deployment:
    """A deployment without a real base model: its log can be read, and rounds can be asked for."""
    spec = types.ClassificationSpec("none", "0" * 64, ["ham", "spam"], rank=2, alpha=4.0, targets=["query"], layers=1)
    return create_deployment(directory, spec, release_arrays(), ServerConfig(plan=ClassificationPlan()), place)


@pytest.fixture(params=["folder", pytest.param("kafka", marks=pytest.mark.kafka)])
def anywhere(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """The folder of a deployment whose log is in it, or on Kafka."""
    directory = tmp_path / "deployment"
    on_kafka = request.param == "kafka"
    place = DeploymentLocation(request.getfixturevalue("kafka_url"), str(directory / "blobs")) if on_kafka else None
    deploy(directory, place).log.close()
    return directory


@pytest.fixture
def deployment_on_kafka(kafka_url: str, tmp_path: Path) -> Path:
    directory = tmp_path / "deployment"
    deploy(directory, DeploymentLocation(kafka_url, str(directory / "blobs"))).log.close()
    return directory


@pytest.fixture
def deployment(tmp_path: Path) -> Path:
    directory = tmp_path / "deployment"
    deploy(directory).log.close()
    return directory
