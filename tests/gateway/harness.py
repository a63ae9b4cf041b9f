"""A gateway in this process, over a deployment in a folder, with TLS by an authority of its own."""

from __future__ import annotations

import contextlib
import hashlib
import ssl
import threading
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from urllib.parse import quote

import httpx
import samples
import uvicorn
from fedloop_cli.provisioning.certificates import make_ca
from fedloop_events.blobs.store import BlobStore
from fedloop_events.envelope import Event
from fedloop_events.logs.http import GatewayLog, cloudevents, signing
from fedloop_events.logs.port import EventLog
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_server.gateway import Limits, create_app, problems
from fedloop_server.gateway.connections import Connections, Network
from fedloop_server.gateway.listening import GatewayServer, listen, settings


class Served:
    """A gateway that answers at `url`; `app` is its application."""

    def __init__(
        self,
        log: EventLog,
        blobs: BlobStore,
        folder: Path,
        limits: Limits | None = None,
        proxies: Collection[Network] = (),
    ) -> None:
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
        self._raw: Raw | None = None
        config = uvicorn.Config(self.app, **settings((issued.certificate, issued.key), proxies))
        bounds = limits or Limits()
        self.connections = Connections(bounds.connections, bounds.connections_each, proxies)
        self._server = GatewayServer(config, self.app, lambda address: self._ready.set(), self.connections)
        self._thread = threading.Thread(target=self._server.run, args=([self._listening],), daemon=True)

    def start(self) -> None:
        self._thread.start()
        assert self._ready.wait(30)

    @property
    def raw(self) -> Raw:
        if self._raw is None:
            self._raw = Raw(self.address, self.ca)
        return self._raw

    def stop(self) -> None:
        if self._raw is not None:
            self._raw.close()
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


class Raw:
    """Requests made by hand, so that anything about them can be wrong."""

    def __init__(self, address: str, ca: Path) -> None:
        tls = ssl.create_default_context(cafile=str(ca))
        self._client = httpx.Client(base_url=address, verify=tls, trust_env=False, timeout=30)

    def __call__(
        self,
        method: str,
        target: str,
        by: str | None = None,
        body: bytes = b"",
        *,
        key: str | None = None,
        content_type: str | None = cloudevents.BATCH_TYPE,
        headers: Mapping[str, str] = {},
        signed_body: bytes | None = None,
        age_s: int = 0,
    ) -> httpx.Response:
        """Signed as `by` (None: not at all) with the samples' key of that name, or of `key`; `headers` outweigh all others."""
        request = self._client.build_request(method, target, content=body or None)
        if body and content_type:
            request.headers["content-type"] = content_type
        if by is not None:
            request.headers.update(self.signature(request, by, body if signed_body is None else signed_body, key, age_s))
        request.headers.update(headers)
        return self._client.send(request)

    def signature(self, request: httpx.Request, by: str, body: bytes, key: str | None = None, age_s: int = 0) -> dict[str, str]:
        path, _, query = request.url.raw_path.decode().partition("?")
        return signing.sign(
            request.method,
            request.headers["host"],
            path,
            query,
            content_sha256=hashlib.sha256(body).digest(),
            client_id=by,
            key=samples.key(key or by),
            now_s=int(time.time()) - age_s,
        )

    def append(self, by: str | None, *events: Event, key: str | None = None) -> httpx.Response:
        return self("POST", "/v1/events", by, cloudevents.encode_batch(events), key=key)

    def close(self) -> None:
        self._client.close()


def code(response: httpx.Response) -> str:
    """What a problem is."""
    assert response.headers["content-type"] == problems.MEDIA_TYPE
    document = response.json()
    assert set(document) == {"type", "title", "status", "detail"}
    assert document["status"] == response.status_code == problems.CODES[document["type"].removeprefix(problems.PREFIX)][0]
    if response.status_code in {429, 503}:
        assert int(response.headers["retry-after"]) >= 1
    return str(document["type"].removeprefix(problems.PREFIX))


def provision(log: EventLog, *clients: str) -> None:
    """Create the samples' deployment, with `clients` enrolled by the samples' keys."""
    log.append([samples.signed(samples.created(), by="server")])
    if clients:
        log.append([samples.signed(samples.enrolled(name, str(number))) for number, name in enumerate(clients, 11)])


@contextlib.contextmanager
def serving(
    folder: Path,
    *clients: str,
    log: EventLog | None = None,
    limits: Limits | None = None,
    proxies: Collection[Network] = (),
) -> Iterator[Served]:
    """A gateway over a deployment of the samples, with `clients` enrolled."""
    held = log if log is not None else SqliteLog(folder / "log.sqlite")
    provision(held, *clients)
    served = Served(held, BlobStore(folder / "blobs"), folder, limits, proxies)
    served.start()
    try:
        yield served
    finally:
        served.stop()
        if log is None:
            held.close()
