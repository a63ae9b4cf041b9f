"""Flower's own transport as a peer: a SuperLink and its SuperNodes as processes on loopback, and one run on them.

The run's `ServerApp` and `ClientApp` are `server` and `client` below, the same program as for the other candidates.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

LIMIT_S: Final = 300.0
_RESULT: Final = "FEDLOOP_BENCH_RESULT"
_APP: Final = """
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "rounds"
version = "1.0.0"
dependencies = []
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "fedloop"
[tool.flwr.app.components]
serverapp = "rounds:server"
clientapp = "rounds:client"
[tool.flwr.app.config]
clients = {clients}
megabytes = {megabytes}
rounds = {rounds}
"""
_CODE: Final = """
from benchmarks import superlink, trivial
server = superlink.server
client = trivial.trivial_app()
"""

server = ServerApp()


@server.main()
def _main(grid: Grid, context: Context) -> None:
    from benchmarks.trivial import timed_rounds

    clients, megabytes, rounds = (int(str(context.run_config[name])) for name in ("clients", "megabytes", "rounds"))
    result = Path(os.environ[_RESULT])
    part = result.with_suffix(".part")
    part.write_text(str(timed_rounds(grid, clients, megabytes, rounds)))
    part.rename(result)


def seconds_a_round(folder: Path, clients: int, megabytes: int, rounds: int) -> float:
    """The median of the seconds a round takes after the first. Raises TimeoutError if the run does not end in `LIMIT_S`."""
    port, *node_ports = _free_ports(1 + clients)
    environment, result = _prepare(folder, port, clients, megabytes, rounds)
    scripts = Path(sys.executable).parent
    with ExitStack() as stack:

        def start(name: str, *arguments: str) -> None:
            log = stack.enter_context((folder / f"{name}-{len(list(folder.iterdir()))}.log").open("wb"))
            # A session of its own, so that the processes which it starts end with it.
            process = subprocess.Popen(
                [scripts / name, *arguments], env=environment, stdout=log, stderr=log, start_new_session=True, cwd=folder
            )
            stack.callback(_end, process)

        start("flower-superlink", "--insecure", "--port", str(port), "--disable-runtime-dependency-installation")
        _wait_for_port(port)
        for number, node_port in enumerate(node_ports):
            node = ["--insecure", "--superlink", f"127.0.0.1:{port}", "--port", str(node_port)]
            start("flower-supernode", *node, "--node-config", f"partition-id={number}")
        subprocess.run(
            [scripts / "flwr", "run", folder / "app", "local"],
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=LIMIT_S,
        )
        deadline = time.monotonic() + LIMIT_S
        while not result.exists():
            if time.monotonic() > deadline:
                raise TimeoutError("the run on the SuperLink did not end")
            time.sleep(0.2)
    return float(result.read_text())


def _prepare(folder: Path, port: int, clients: int, megabytes: int, rounds: int) -> tuple[dict[str, str], Path]:
    home, app, result = folder / "home", folder / "app", folder / "result"
    home.mkdir()
    app.mkdir()
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "local"\n[superlink.local]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    (app / "pyproject.toml").write_text(_APP.format(clients=clients, megabytes=megabytes, rounds=rounds))
    (app / "rounds.py").write_text(_CODE)
    root = Path(__file__).resolve().parent.parent
    flower = {"FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    ours = {_RESULT: str(result), "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    scripts = {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"}
    return os.environ | flower | ours | scripts, result


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


def _wait_for_port(port: int) -> None:
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        with socket.socket() as probe:
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.1)
    raise TimeoutError("the SuperLink did not start")


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started: its session has its own process id."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
