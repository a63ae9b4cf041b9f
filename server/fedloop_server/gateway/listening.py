"""Serving the application: uvicorn with TLS, with bounds on what a connection may be before it is a request."""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
import threading
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Final

import uvicorn
from fastapi import FastAPI
from fedloop_events.errors import UnreachableError
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from fedloop_server.gateway import problems
from fedloop_server.gateway.connections import Connection, Connections, Network, raise_open_files
from fedloop_server.gateway.limits import Limits

HEADER_TIMEOUT_S: Final = 10.0
"""For a TLS handshake, and for a request's header."""
UNREAD_TIMEOUT_S: Final = 60.0
"""How long an answer waits that nobody reads on."""
KEEP_ALIVE_S: Final = 30
DRAIN_S: Final = 10
MOST_PIPELINED: Final = 16
"""Requests that may come on a connection before the first of them is answered."""
ACCEPT_PAUSE_S: Final = 0.1
_MOST_HEADER_BYTES: Final = 32_768

_logger = logging.getLogger(__name__)


class Protocol(HttpToolsProtocol):
    """uvicorn's (as of 0.49), which waits for ever for a request and for whoever reads the answer, and takes headers of any
    length and any number of requests at once."""

    def __init__(self, connection: Connection, config: uvicorn.Config, server: uvicorn.Server) -> None:
        super().__init__(config, server.server_state, server.lifespan.state)
        self._connection = connection
        self._header_bytes = 0
        self._impatience: asyncio.TimerHandle | None = None
        self._unread: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._connection.close = transport.abort
        self._impatience = self.loop.call_later(HEADER_TIMEOUT_S, self._give_up)

    def connection_lost(self, exc: Exception | None) -> None:
        self._connection.gone()
        self._be_patient()
        self.resume_writing()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unread = self._unread or self.loop.call_later(UNREAD_TIMEOUT_S, self.transport.abort)

    def resume_writing(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None
        super().resume_writing()

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
        self._connection.busy()
        if len(self.pipeline) >= MOST_PIPELINED:
            self.transport.abort()
        super().on_headers_complete()

    def on_response_complete(self) -> None:
        if not self.pipeline:
            self._connection.idle()
        super().on_response_complete()

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
    """Says when it listens, lets those who wait go before it drains, and leaves to its caller what a signal means.

    It accepts by itself, for uvicorn learns of a connection only when its TLS handshake has ended.
    """

    def __init__(
        self, config: uvicorn.Config, app: FastAPI, on_listening: Callable[[str], None], connections: Connections
    ) -> None:
        super().__init__(config)
        self._app, self._on_listening, self._connections = app, on_listening, connections
        self.interrupted = False
        self._accepting: asyncio.Task[None] | None = None
        self._beginning: set[asyncio.Task[None]] = set()

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
        assert sockets is not None
        await super().startup(sockets=[])
        if self.started:
            listening = sockets[0]
            listening.settimeout(0)
            listening.listen(self.config.backlog)
            self._accepting = asyncio.create_task(self._accept(listening))
            host, port = listening.getsockname()[:2]
            scheme = "https" if self.config.is_ssl else "http"
            self._on_listening(f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._app.state.gateway.feed.begin_stop()
        if self._accepting is not None:
            self._accepting.cancel()
        for task in self._beginning:
            task.cancel()
        hurry = asyncio.create_task(self._let_go())
        await super().shutdown(sockets)
        hurry.cancel()

    async def _accept(self, listening: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                accepted, address = await loop.sock_accept(listening)
            except OSError as error:  # it has gone again, or the machine has no more open files
                _logger.warning("a connection cannot be accepted: %s", error.strerror)
                self._connections.make_room()
                await asyncio.sleep(ACCEPT_PAUSE_S)
                continue
            self._begin(accepted, address[0])
            await asyncio.sleep(0)  # who connects again and again keeps nobody else waiting

    def _begin(self, accepted: socket.socket, host: str) -> None:
        connection = self._connections.admit(host, accepted.close)
        if connection is None:
            accepted.close()
            return
        task = asyncio.create_task(self._connect(accepted, connection))
        connection.close = task.cancel
        self._beginning.add(task)
        task.add_done_callback(partial(self._begun, accepted, connection))

    async def _connect(self, accepted: socket.socket, connection: Connection) -> None:
        """The TLS handshake; from then on the protocol has the connection."""
        tls = self.config.ssl
        await asyncio.get_running_loop().connect_accepted_socket(
            partial(Protocol, connection, self.config, self),
            accepted,
            ssl=tls,
            ssl_handshake_timeout=HEADER_TIMEOUT_S if tls else None,
        )

    def _begun(self, accepted: socket.socket, connection: Connection, task: asyncio.Task[None]) -> None:
        self._beginning.discard(task)
        error = None if task.cancelled() else task.exception()
        if task.cancelled() or error is not None:
            connection.gone()
            accepted.close()
        if error is not None and not isinstance(error, OSError):  # which is a handshake that was none
            _logger.error("a connection could not begin", exc_info=error)

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
    proxies: Collection[Network] = (),
    on_listening: Callable[[str], None] = lambda address: None,
) -> bool:
    """Serve `app` until SIGTERM or SIGINT, and end when every request that had begun is answered; whether it was SIGINT.

    `tls` is certificate and key. What comes from one of the `proxies` comes from the address that it forwards for. Raises
    `UnreachableError` if the address cannot be had, `UsageError` if the log belongs to no deployment, and what the log raises.
    """
    limits: Limits = app.state.gateway.limits
    app.state.gateway.feed.prepare()
    listening = listen(host, port)
    try:
        total = raise_open_files(limits.connections)
        if total < limits.connections:
            _logger.warning(
                "the gateway holds %d connections at once and not %d, for this process may open no more files (ulimit -n)",
                total,
                limits.connections,
            )
        config = uvicorn.Config(app, **settings(tls, proxies))
        server = GatewayServer(config, app, on_listening, Connections(total, limits.connections_each, proxies))
        server.run(sockets=[listening])
        return server.interrupted
    finally:
        listening.close()


def settings(tls: tuple[Path, Path] | None, proxies: Collection[Network] = ()) -> dict[str, Any]:
    return {
        "http": "httptools",
        "ws": "none",
        "access_log": False,
        "log_config": None,
        "proxy_headers": bool(proxies),
        "forwarded_allow_ips": [str(each) for each in proxies],
        "server_header": False,
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
