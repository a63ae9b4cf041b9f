"""The demo's processes: started, started again when they are killed, and never left behind."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedloop_events.errors import FedloopError

MOST_RESTARTS: Final = 5
END_TIMEOUT_S: Final = 20.0


class Child:
    """One process. What it prints is kept in files, of all its lives; `on_line` is told each line of standard output.

    It ends when its standard input is closed, so it does not outlive this process either.
    """

    def __init__(self, name: str, module: str, argument: str, folder: Path, on_line: Callable[[str], None] | None = None) -> None:
        self.name = name
        self.restarts = 0
        self._command = [sys.executable, "-m", module, argument]
        self._folder, self._on_line = folder, on_line
        self._sent: list[str] = []
        self._lock = threading.Lock()
        self._start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def files(self) -> list[Path]:
        """Everything that it has printed."""
        return [self._folder / f"{self.name}.out", self._folder / f"{self.name}.err"]

    def send(self, line: str) -> None:
        """Write a line to its standard input; a later life of it gets all lines again."""
        with self._lock:
            self._sent.append(line)
            self._write(line)

    def look(self) -> bool:
        """Start it again if it has ended; whether it had. Raises `FedloopError` if it does not stay up."""
        status = self._process.poll()
        if status is None:
            return False
        if self.restarts >= MOST_RESTARTS:
            last = self.files[1].read_text(errors="replace").strip().splitlines()[-1:]
            raise FedloopError(
                f"{self.name} ended {self.restarts + 1} times, last with status {status}",
                cause=last[0] if last else "",
                hint=f"see {self.files[1]}",
            )
        with self._lock:
            self.restarts += 1
            self._start()
            for line in self._sent:
                self._write(line)
        return True

    def end(self) -> None:
        """Let it finish what it does, and kill it if that takes too long."""
        with self._lock:
            try:
                if self._process.stdin is not None:
                    self._process.stdin.close()
            except OSError:
                pass

    def join(self) -> None:
        """Wait for its end."""
        try:
            self._process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()

    def kill(self) -> None:
        self._process.kill()

    def _start(self) -> None:
        environment = os.environ | {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
        with self.files[1].open("ab") as errors:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environment,
                start_new_session=True,  # Ctrl-C is for the demo alone: it ends its children in order
            )
        self._reader = threading.Thread(target=self._read, args=(self._process,), daemon=True)
        self._reader.start()

    def _write(self, line: str) -> None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(line.encode() + b"\n")
            self._process.stdin.flush()
        except OSError:
            pass  # it has been killed: `look` starts it again, and sends everything again

    def _read(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        with self.files[0].open("ab") as kept:
            for line in process.stdout:
                kept.write(line)
                kept.flush()
                if self._on_line is not None:
                    self._on_line(line.decode(errors="replace").rstrip("\n"))
