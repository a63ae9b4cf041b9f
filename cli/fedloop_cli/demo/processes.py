"""The demo's processes: started, started again when they are killed, and never left behind."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Final, Literal

import msgspec
from fedloop_events.errors import FedloopError
from fedloop_tasks.table import name_of
from fedloop_tasks.task import Task

from fedloop_cli.demo.nursery import Order

MOST_RESTARTS: Final = 5
END_TIMEOUT_S: Final = 20.0


class Nursery:
    """Starts the nursery of a deployment of `task`, and it again if it is killed. What it forks is not its any more, and lives
    on."""

    def __init__(self, folder: Path, task: type[Task]) -> None:
        self._errors, self._task = folder / "nursery.err", name_of(task)
        self._start()

    def spawn(self, order: Order) -> tuple[int, socket.socket]:
        """A new process: its id, and this end of its channel. Raises `FedloopError` if the nursery cannot be started."""
        ours, theirs = socket.socketpair()
        with theirs:
            for _ in range(2):
                with suppress(OSError):
                    socket.send_fds(self._control, [msgspec.json.encode(order)], [theirs.fileno()])
                    if answer := self._control.recv(64):
                        return int(answer), ours
                self.end()
                self._start()
        raise FedloopError("the demo's processes cannot be started", cause=_last_line(self._errors))

    def end(self) -> None:
        self._control.close()
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _start(self) -> None:
        quiet = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "FLWR_TELEMETRY_ENABLED": "0"}
        self._control, theirs = socket.socketpair()
        with theirs, self._errors.open("ab") as errors:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "fedloop_cli.demo.nursery", self._task],
                stdin=theirs.fileno(),
                stdout=errors,
                stderr=errors,
                env=os.environ | quiet,
                start_new_session=True,
            )


def _last_line(path: Path) -> str:
    return "".join(path.read_text(errors="replace").strip().splitlines()[-1:]) if path.exists() else ""


class Child:
    """One process, over all its lives. `on_line` is called with each line from its channel; what it prints is kept in files.

    It ends when its channel is closed, so it does not outlive this process either.
    """

    def __init__(
        self,
        name: str,
        nursery: Nursery,
        role: Literal["device", "feedback", "gateway", "server"],
        terms: str,
        folder: Path,
        on_line: Callable[[bytes], None] | None = None,
    ) -> None:
        self.name = name
        self.files = [folder / f"{name}.out", folder / f"{name}.err"]
        """Everything that it has printed."""
        self.restarts = 0
        self._order = Order(role, terms, *map(str, self.files))
        self._nursery, self._on_line = nursery, on_line
        self._sent: list[bytes] = []
        self._start()

    def send(self, line: bytes) -> None:
        """Send it a line; a later life of it is sent everything again."""
        self._sent.append(line)
        self._note(line)

    def look(self) -> bool:
        """Start it again if it has ended; whether it had. Raises `FedloopError` if it does not stay up."""
        if self._reader.is_alive():
            return False
        if self.restarts >= MOST_RESTARTS:
            cause = _last_line(self.files[1])
            raise FedloopError(f"{self.name} ended {self.restarts + 1} times", cause=cause, hint=f"see {self.files[1]}")
        self.restarts += 1
        self._channel.close()
        self._start()
        for line in self._sent:
            self._note(line)
        return True

    def end(self) -> None:
        """Let it finish what it does."""
        with suppress(OSError):
            self._channel.shutdown(socket.SHUT_WR)

    def join(self) -> None:
        """Wait for its end, and kill it if that takes too long."""
        self._reader.join(END_TIMEOUT_S)
        if self._reader.is_alive():
            self.kill()
            self._reader.join()
        self._channel.close()

    def kill(self) -> None:
        with suppress(OSError):
            os.kill(self.pid, signal.SIGKILL)

    def _start(self) -> None:
        self.pid, self._channel = self._nursery.spawn(self._order)
        self._reader = threading.Thread(target=self._read, args=(self._channel,), daemon=True)
        self._reader.start()

    def _note(self, line: bytes) -> None:
        with suppress(OSError):  # it has been killed: `look` starts it again, and sends everything again
            self._channel.sendall(line + b"\n")

    def _read(self, channel: socket.socket) -> None:
        """Until the kernel closes the channel's other end, with the process."""
        with suppress(OSError), channel.makefile("rb") as lines:
            for line in lines:
                if self._on_line is not None:
                    self._on_line(line)
