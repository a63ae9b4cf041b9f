"""Serving the application: uvicorn with TLS, with bounds on what a connection may be before it is a request."""

from __future__ import annotations

import asyncio
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, Final

import uvicorn
from fastapi import FastAPI
from fedloop_events.errors import UnreachableError
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fedloop_server.gateway import problems

HEADER_TIMEOUT_S: Final = 10.0
KEEP_ALIVE_S: Final = 30
DRAIN_S: Final = 10
MAX_CONNECTIONS: Final = 4_096
_MOST_HEADER_BYTES: Final = 32_768


class Protocol(HttpToolsProtocol):
    """uvicorn's (as of 0.49), which waits for a request for ever and takes headers of any length."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._header_bytes = 0
        self._impatience: asyncio.TimerHandle | None = self.loop.call_later(HEADER_TIMEOUT_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._be_patient()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._header_bytes = 0
        self._be_patient()
        self._impatience = self.loop.call_later(HEADER_TIMEOUT_S, self._give_up)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._impatience is not None:  # the header goes on
            self._header_bytes += len(data)
            if self._header_bytes > _MOST_HEADER_BYTES and not self.transport.is_closing():
                self._refuse("headers", "the header is too long")

    def on_headers_complete(self) -> None:
        self._be_patient()
        super().on_headers_complete()

    def _refuse(self, code: str, detail: str) -> None:
        body = problems.body(code, detail)
        status = problems.CODES[code][0]
        lines = (
            f"HTTP/1.1 {status} {problems.CODES[code][1]}",
            f"content-type: {problems.MEDIA_TYPE}",
            f"content-length: {len(body)}",
            "connection: close",
        )
        self.transport.write("\r\n".join((*lines, "", "")).encode() + body)
        self.transport.close()

    def _be_patient(self) -> None:
        if self._impatience is not None:
            self._impatience.cancel()
            self._impatience = None

    def _give_up(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


class GatewayServer(uvicorn.Server):
    """Says when it listens, lets those who wait go before it drains, and leaves to its caller what a signal means."""

    def __init__(self, config: uvicorn.Config, app: FastAPI, on_listening: Callable[[str], None]) -> None:
        super().__init__(config)
        self._app, self._on_listening = app, on_listening
        self.interrupted = False

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """The first SIGTERM or SIGINT drains, the second ends it at once. (uvicorn would raise them again at the end.)"""
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
            host, port = self.servers[0].sockets[0].getsockname()[:2]
            scheme = "https" if self.config.is_ssl else "http"
            self._on_listening(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.gateway.feed.begin_stop()
        hurry = asyncio.create_task(self._let_go())
        await super().shutdown(sockets)
        hurry.cancel()

    async def _let_go(self) -> None:
        """Cut connections on which nothing is under way: their closing would wait for the other side's."""
        while True:
            await asyncio.sleep(0.1)
            if not self.server_state.tasks:
                for connection in list(self.server_state.connections):
                    connection.transport.abort()


def serve(
    app: FastAPI,
    *,
    host: str,
    port: int,
    tls: tuple[Path, Path] | None,
    on_listening: Callable[[str], None] = lambda address: None,
) -> bool:
    """Serve `app` until SIGTERM or SIGINT, and end when every request that had begun is answered; whether it was SIGINT.

    `tls` is certificate and key. Raises `UnreachableError` if the address cannot be had, `UsageError` if the log belongs to no
    deployment, and what the log raises.
    """
    app.state.gateway.feed.prepare()
    listening = listen(host, port)
    try:
        config = uvicorn.Config(app, **settings(tls))
        server = GatewayServer(config, app, on_listening)
        server.run(sockets=[listening])
        return server.interrupted
    finally:
        listening.close()


def settings(tls: tuple[Path, Path] | None) -> dict[str, Any]:
    return {
        "http": Protocol,
        "ws": "none",
        "access_log": False,
        "log_config": None,
        "proxy_headers": False,
        "server_header": False,
        "limit_concurrency": MAX_CONNECTIONS,
        "timeout_keep_alive": KEEP_ALIVE_S,
        "timeout_graceful_shutdown": DRAIN_S,
        "backlog": 1024,
        "ssl_certfile": None if tls is None else str(tls[0]),
        "ssl_keyfile": None if tls is None else str(tls[1]),
    }


def listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        listening = socket.socket(family, kind, protocol)
        try:
            listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listening.bind(address)
        except BaseException:
            listening.close()
            raise
    except OSError as error:
        raise UnreachableError(f"the gateway cannot listen at {host}:{port}", cause=error.strerror or str(error)) from None
    return listening
