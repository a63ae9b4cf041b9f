"""A gateway in this process, over a deployment in a folder, with TLS by an authority of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import samples
import uvicorn
from fedloop_cli.certificates import make_ca
from fedloop_events.blobs import BlobStore
from fedloop_events.gateway import GatewayLog
from fedloop_events.log import EventLog
from fedloop_events.sqlite import SqliteLog
from fedloop_server.gateway import Limits, create_app
from fedloop_server.gateway.serving import Server, listen, settings


class Served:
    """A gateway that answers at `url`; `app` is its application."""

    def __init__(self, log: EventLog, blobs: BlobStore, folder: Path, limits: Limits | None = None) -> None:
        self.log, self.blobs = log, blobs
        ca = make_ca(folder / "tls")
        issued = ca.issue("gateway", ["localhost", "127.0.0.1"], folder / "tls")
        self.ca = ca.certificate
        self.app = create_app(log, blobs, limits=limits)
        self._listening = listen("127.0.0.1", 0)
        self.port = self._listening.getsockname()[1]
        self.address = f"https://localhost:{self.port}"
        self.url = f"{self.address}?ca={quote(str(self.ca))}"
        self._ready = threading.Event()
        config = uvicorn.Config(self.app, **settings((issued.certificate, issued.key)))
        self._server = Server(config, self.app, lambda address: self._ready.set())
        self._thread = threading.Thread(target=self._server.run, args=([self._listening],), daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(30)

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        self._listening.close()

    def as_client(self, name: str) -> GatewayLog:
        """The log as `name` ("server" too) reaches it, with the key that the samples give it."""
        return GatewayLog(self.url, identity=(name, samples.key(name)))

    def blobs_of(self, name: str) -> BlobStore:
        store = BlobStore(self.url)
        store.identify(name, samples.key(name))
        return store


def provision(log: EventLog, *clients: str) -> None:
    """Create the samples' deployment, with `clients` enrolled by the samples' keys."""
    log.append([samples.signed(samples.created(), by="server")])
    if clients:
        log.append([samples.signed(samples.enrolled(name, str(number))) for number, name in enumerate(clients, 11)])


@contextlib.contextmanager
def serving(folder: Path, *clients: str, log: EventLog | None = None, limits: Limits | None = None) -> Iterator[Served]:
    """A gateway over a deployment of the samples, with `clients` enrolled."""
    held = log if log is not None else SqliteLog(folder / "log.sqlite")
    provision(held, *clients)
    served = Served(held, BlobStore(folder / "blobs"), folder, limits)
    served.start()
    try:
        yield served
    finally:
        served.stop()
        if log is None:
            held.close()
