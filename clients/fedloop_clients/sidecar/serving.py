"""Serving the sidecar to this machine, and beside it the device's loop: one process is the on-device agent."""

from __future__ import annotations

import logging
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Final

import uvicorn
from fedloop_events.errors import FedloopError, UnreachableError
from starlette.types import ASGIApp

from fedloop_clients.agent import Agent

HOST: Final = "127.0.0.1"
KEEP_ALIVE_S: Final = 30
DRAIN_S: Final = 5
MOST_CONNECTIONS: Final = 512
ROUNDS_THREAD: Final = "fedloop-rounds"
"""The name of the thread of the device's loop."""
SOON_S: Final = 2.0
SWITCH_S: Final = 0.0005
"""For so long the thread that writes an answer may keep the interpreter from the one that sends it; Python's 5 ms delay words."""
_BACKLOG: Final = 256

_logger = logging.getLogger(__name__)


class SidecarServer(uvicorn.Server):
    """Reports when it listens, and leaves to its caller what a signal means."""

    def __init__(self, app: ASGIApp, listening: socket.socket, on_listening: Callable[[str], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                http="httptools",
                ws="none",
                lifespan="off",
                access_log=False,
                log_config=None,
                server_header=False,
                proxy_headers=False,
                limit_concurrency=MOST_CONNECTIONS,
                timeout_keep_alive=KEEP_ALIVE_S,
                timeout_graceful_shutdown=DRAIN_S,
                backlog=_BACKLOG,
            )
        )
        self._listening, self._on_listening = listening, on_listening
        self.interrupted = False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The first SIGTERM or SIGINT lets answers end that are under way, the second cuts them."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self.handle_exit) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.interrupted = self.interrupted or sig == signal.SIGINT
        self.force_exit = self.should_exit
        self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            host, port = self._listening.getsockname()[:2]
            self._on_listening(f"http://{host}:{port}")

    def serve_here(self) -> bool:
        """Until SIGTERM or SIGINT; whether it was SIGINT."""
        sys.setswitchinterval(SWITCH_S)
        self.run(sockets=[self._listening])
        return self.interrupted


def listen(port: int) -> socket.socket:
    """A socket of this machine alone; a free port, if it is 0. Raises `UnreachableError`."""
    listening = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((HOST, port))
    except OSError as error:
        listening.close()
        raise UnreachableError(
            f"the sidecar cannot listen at {HOST}:{port}", cause=error.strerror or str(error), hint="choose another --port"
        ) from None
    return listening


@contextmanager
def rounds(agent: Agent) -> Iterator[None]:
    """Within it the device's loop runs in a thread: it masks, publishes and takes part in rounds. Where it cannot go on (another
    process runs it, the client was revoked) a warning says so, and answering goes on."""
    stop = threading.Event()

    def run() -> None:
        try:
            agent.run(stop)
        except FedloopError as error:
            _logger.warning("no part is taken in rounds: %s", error.message)

    thread = threading.Thread(target=run, name=ROUNDS_THREAD, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(SOON_S)
        if thread.is_alive():
            _logger.warning("a round is under way that has been paid for: it is waited for, and a second Ctrl-C gives it up")
            thread.join()
