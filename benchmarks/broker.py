"""A Kafka broker of the benchmark's own: the one that `make kafka` starts, in a folder and on a port of its own."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.harness import scratch

_BROKERS = Path(__file__).resolve().parent.parent / "deploy" / "kafka" / "brokers.py"


@contextmanager
def broker() -> Iterator[str]:
    """The address of a new, empty broker that runs as long as the block lasts."""
    with scratch() as folder:
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = str(free.getsockname()[1])
        try:
            _call("start", "--dir", str(folder), "--port", port)
            yield f"127.0.0.1:{port}"
        finally:
            _call("stop", "--dir", str(folder))


def _call(*arguments: str) -> None:
    # Nothing is captured: the broker itself would hold the pipe open.
    subprocess.run([sys.executable, str(_BROKERS), *arguments], stdout=subprocess.DEVNULL, check=True)
