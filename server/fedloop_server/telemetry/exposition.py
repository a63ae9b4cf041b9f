"""The HTTP side of the metrics: `/metrics` for Prometheus and `/healthz` for whoever restarts what hangs."""

from __future__ import annotations

import socket
import socketserver
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Final, NamedTuple
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from fedloop_events.errors import UsageError
from prometheus_client import CollectorRegistry, make_wsgi_app

from fedloop_server.telemetry.metrics import MeteredLog

LOOPBACK: Final = "127.0.0.1"
IDLE_S: Final = 120.0
"""A loop that has not read for so long hangs: evaluating, merging and finding noise take seconds, and waits read each second."""
MOST_AT_ONCE: Final = 8
REQUEST_TIMEOUT_S: Final = 10.0


class Address(NamedTuple):
    host: str
    port: int

    @classmethod
    def parse(cls, text: str) -> Address:
        """`HOST:PORT`, `[IPV6]:PORT`, or a PORT on loopback. Raises `UsageError`."""
        host, _, port = text.rpartition(":")
        if not (port.isascii() and port.isdigit() and int(port) < 65_536):
            raise UsageError(f"{text!r} is no address to listen on", hint="write HOST:PORT, such as 127.0.0.1:9464")
        return cls(host.removeprefix("[").removesuffix("]") or LOOPBACK, int(port))


@contextmanager
def exposed(registry: CollectorRegistry, log: MeteredLog, address: Address) -> Iterator[int]:
    """Answer at `address` as long as the block lasts; the port, which is a free one for port 0. Raises `UsageError`."""
    try:
        family = socket.getaddrinfo(*address, type=socket.SOCK_STREAM)[0][0]
        server = _server(family)(tuple(address), _Handler)
    except OSError as error:
        raise UsageError(f"{address.host}:{address.port} cannot be listened on", cause=error.strerror or "") from None
    server.set_app(_application(registry, log))
    thread = threading.Thread(target=server.serve_forever, name="metrics", daemon=True)
    thread.start()
    try:
        yield server.server_port
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def exposed_at(address: str | None, registry: CollectorRegistry, log: MeteredLog) -> AbstractContextManager[object]:
    """The same at an address as text; without one nothing is exposed."""
    return nullcontext() if address is None else exposed(registry, log, Address.parse(address))


def problem(log: MeteredLog) -> str:
    """Why the server's loop counts as dead, or ""."""
    idle_s = log.idle_s
    if idle_s is None:
        return "the server has not read its log yet"
    return f"the server has not read its log for {idle_s:.0f} s" if idle_s > IDLE_S else ""


def _application(registry: CollectorRegistry, log: MeteredLog) -> Callable[..., Iterable[bytes]]:
    metrics = make_wsgi_app(registry)

    def answer(environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if environ["PATH_INFO"] == "/metrics":
            body: Iterable[bytes] = metrics(environ, start_response)
            return body
        status, text = "404 Not Found", "there are /metrics and /healthz"
        if environ["PATH_INFO"] == "/healthz":
            text = problem(log)
            status = "503 Service Unavailable" if text else "200 OK"
        start_response(status, [("Content-Type", "text/plain; charset=utf-8")])
        return [f"{text or 'ok'}\n".encode()]

    return answer


class _Handler(WSGIRequestHandler):
    timeout = REQUEST_TIMEOUT_S

    def log_message(self, format: str, *args: Any) -> None:  # noqa: A002 (its name in the base)
        """Scrapes are no news."""


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    """A thread for each request, `MOST_AT_ONCE` at most: beyond them it hangs up."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, *args: Any) -> None:
        self._places = threading.BoundedSemaphore(MOST_AT_ONCE)
        super().__init__(*args)

    def process_request(self, request: Any, client_address: Any) -> None:
        if self._places.acquire(blocking=False):
            super().process_request(request, client_address)
        else:
            self.shutdown_request(request)

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Whoever hung up while it was answered is no news either."""

    def server_bind(self) -> None:
        # (the base asks the resolver for this machine's full name, which can take seconds)
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


def _server(family: int) -> type[_Server]:
    class MetricsServer(_Server):
        address_family = family

    return MetricsServer
