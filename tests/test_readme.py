"""The README's commands and its Python, executed as they stand there."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
ENVIRONMENT = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"}

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


NO_NETWORK = """
import sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.gethostbyname"):
        raise PermissionError(f"{event}{arguments}")
sys.addaudithook(refuse)
"""


def block(info: str) -> list[str]:
    """The lines of the fenced block with this info string."""
    found = re.search(rf"^```{info}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)
    assert found is not None, info
    return found[1].splitlines()


def run(command: str, folder: Path) -> None:
    done = subprocess.run(["bash", "-c", command], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@contextmanager
def running(command: str, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"], cwd=folder, env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that looks like a checkout to the README's commands, with the deployment `bank` in it."""
    folder = tmp_path_factory.mktemp("readme")
    (folder / "cli").symlink_to(ROOT / "cli")
    *make, _ = block("sh server")
    for command in make:
        run(command, folder)
    return folder


def test_the_commands_by_hand_end_well(folder: Path) -> None:
    *_, serve = block("sh server")
    (*alice, run_alice), (*bob, run_bob) = block("sh alice"), block("sh bob")
    for command in (*alice, *bob):
        run(command, folder)
    with running(serve, folder) as server, running(run_alice, folder), running(run_bob, folder):
        for command in block("sh operator"):
            run(command, folder)
        assert server.poll() is None


def test_the_python_for_a_device_runs_without_a_network(folder: Path) -> None:
    code = "\n".join(block("python")).replace('"alice"', '"dave"')
    assert 8 <= len(code.splitlines()) <= 12
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK + code], cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "2 published, masked; 1 to learn from"
