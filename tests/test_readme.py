"""The README's commands and its Python, executed as they stand there."""

from __future__ import annotations

import os
import re
import secrets
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

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


def exported(info: str, *replaced: tuple[str, str]) -> dict[str, str]:
    """The variables that a block exports, with the README's addresses replaced by the test's."""
    (line,) = block(info)
    for old, new in replaced:
        assert old in line
        line = line.replace(old, new)
    return dict(each.split("=", 1) for each in line.partition("#")[0].split()[1:])


def run(command: str, folder: Path, variables: Mapping[str, str] = {}) -> None:
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env={**ENVIRONMENT, **variables}, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"


@contextmanager
def running(command: str, folder: Path, variables: Mapping[str, str] = {}) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        ["bash", "-c", f"exec {command}"],
        cwd=folder,
        env={**ENVIRONMENT, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        yield process
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.communicate()
            raise


class Walk(NamedTuple):
    """Where the walk takes place: in a folder, or, if terminal 1 has variables, on Kafka."""

    folder: Path
    server: Mapping[str, str]


@pytest.fixture(scope="module", params=["folder", pytest.param("kafka", marks=pytest.mark.kafka)])
def walk(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Walk:
    """A folder that looks like a checkout to the README's commands, with the deployment `bank` in it."""
    folder = tmp_path_factory.mktemp("readme")
    variables: dict[str, str] = {}
    (folder / "cli").symlink_to(ROOT / "cli")
    if request.param == "kafka":
        broker = request.getfixturevalue("kafka")
        variables = exported("sh kafka", ("127.0.0.1:9092/bank", f"{broker}/test-readme-{secrets.token_hex(4)}"))
    *make, _ = block("sh server")
    for command in make:
        run(command, folder, variables)
    return Walk(folder, variables)


@contextmanager
def through_the_gateway(walk: Walk) -> Iterator[Mapping[str, str]]:
    """The variables of the terminal of a device that comes through the gateway, while that runs; on Kafka alone."""
    if not walk.server:
        yield {}
        return
    (serve,) = block("sh gateway")
    with running(serve.partition("#")[0].replace("8443", "0"), walk.folder) as gateway:
        assert gateway.stdout is not None
        address = gateway.stdout.readline().split()[-1]
        yield exported("sh devices", ("http://127.0.0.1:8443", address))


def _shorter(commands: list[str], walk: Walk) -> list[str]:
    """The second time with fewer messages: masking them takes most of the walk."""
    return [re.sub(r"\b30([01])\b", r"12\1", each) if walk.server else each for each in commands]


def test_the_commands_by_hand_end_well(walk: Walk) -> None:
    """On Kafka, Alice's device comes to the broker itself and Bob's through the gateway."""
    folder = walk.folder
    *_, serve = block("sh server")
    (*alice, run_alice), (*bob, run_bob) = (_shorter(block(f"sh {name}"), walk) for name in ("alice", "bob"))
    with through_the_gateway(walk) as bobs:
        for command in alice:
            run(command, folder)
        for command in bob:
            run(command, folder, bobs)
        with running(serve, folder) as server, running(run_alice, folder), running(run_bob, folder, bobs):
            for command in block("sh operator"):
                run(command, folder)
            assert server.poll() is None


def test_the_python_for_a_device_runs_without_a_network(tmp_path: Path) -> None:
    (tmp_path / "cli").symlink_to(ROOT / "cli")
    *make, _ = block("sh server")
    for command in make:
        run(command, tmp_path)
    code = "\n".join(block("python"))
    assert 8 <= len(code.splitlines()) <= 12
    done = subprocess.run(
        [sys.executable, "-c", NO_NETWORK + code], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "2 published, masked; 1 to learn from"
