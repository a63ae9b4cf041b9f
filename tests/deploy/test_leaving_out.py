"""Where no broker can be had: tests that need one are left out, the last line says so, and in CI that is a failure."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import brokers
import pytest

SUITE: Final = """
import pytest

def test_with_an_address(kafka): pass
def test_with_a_log(kafka_url): pass
def test_with_rights(secure_kafka): pass
@pytest.mark.kafka
def test_with_brokers_of_its_own(): pass
@pytest.mark.kafka
def test_not_asked_for(): pass
def test_without(): pass
@pytest.mark.timeout(600)
def test_that_takes_long(): pass
"""
WORKERS: Final = ("-n", "2")
Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """pytest over `SUITE` with our conftest, on a machine with neither Java nor Maven nor Docker."""
    shutil.copy(Path(__file__).parents[1] / "conftest.py", tmp_path)
    (tmp_path / "test_suite.py").write_text(SUITE)
    (tmp_path / "pytest.ini").write_text("[pytest]\n")

    def run(*arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "pytest", "-k", "not asked", "--strict-markers", *arguments, str(tmp_path)]
        variables = {"PATH": "", "PYTHONPATH": str(Path(brokers.__file__).parent), "HOME": os.environ.get("HOME", "")}
        return subprocess.run(
            command, capture_output=True, text=True, env=variables | env, cwd=tmp_path, timeout=120, check=False
        )

    return run


def last_line(done: subprocess.CompletedProcess[str]) -> str:
    return done.stdout.strip().splitlines()[-1]


@pytest.mark.parametrize("how", [(), ("-q",), WORKERS])
def test_the_last_line_says_how_many_and_why(run: Run, how: tuple[str, ...]) -> None:
    done = run(*how)
    assert (done.returncode, done.stderr) == (0, "")
    assert "2 passed" in done.stdout
    assert last_line(done).startswith("4 Kafka tests were left out: no Java and no Maven, no Docker, and FEDLOOP_TEST_KAFKA")


@pytest.mark.parametrize("how", [(), WORKERS])
def test_in_ci_the_run_fails_though_every_test_passed(run: Run, how: tuple[str, ...]) -> None:
    done = run(*how, CI="true")
    assert done.returncode == 1
    assert "2 passed" in done.stdout
    assert last_line(done).startswith("FAILED: 4 Kafka tests were left out")


def test_with_a_named_broker_only_those_that_start_their_own_are_left_out(run: Run) -> None:
    done = run("--collect-only", "-q", FEDLOOP_TEST_KAFKA="127.0.0.1:1")
    assert "test_with_an_address" in done.stdout
    assert "test_with_a_log" in done.stdout
    assert last_line(done) == "2 Kafka tests were left out: no Java and no Maven"


def test_who_may_take_long_begins_early_with_workers(run: Run) -> None:
    done = run("-v", "-n", "1", "-m", "not kafka")
    assert done.returncode == 0
    first, second = (done.stdout.index(f"PASSED test_suite.py::{name}") for name in ("test_that_takes_long", "test_without"))
    assert first < second


def test_an_error_of_pytest_itself_in_every_worker_fails_the_run(run: Run, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("def pytest_collection_modifyitems(): raise ValueError('on purpose')")
    done = run(*WORKERS, "-p", "broken")
    assert "on purpose" in done.stdout
    assert done.returncode == 3


def test_a_run_that_asks_for_no_kafka_says_nothing(run: Run) -> None:
    done = run("-m", "not kafka", CI="true")
    assert done.returncode == 0
    assert "left out" not in done.stdout
    assert "2 passed" in done.stdout
