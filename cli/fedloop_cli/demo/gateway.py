"""The demo's gateway: `fedloop gateway` with TLS by an authority of the demo's own, but it ends when its channel does."""

from __future__ import annotations

import os
import signal
import socket
import threading
from contextlib import closing, suppress
from pathlib import Path
from typing import Final
from urllib.parse import quote

from fedloop_events import locations
from msgspec import Struct

HOST: Final = "127.0.0.1"


class GatewaySettings(Struct, frozen=True):
    """Log and blobs, the port, and the gateway's certificate and key."""

    log: str
    blobs: str | None
    port: int
    certificate: str
    key: str


def prepare(place: locations.DeploymentLocation, folder: Path) -> tuple[GatewaySettings, str]:
    """GatewaySettings of a gateway before `place`, its certificate in `folder`, and where devices find it, in all its lives."""
    from fedloop_cli.provisioning.certificates import make_ca

    authority = make_ca(folder)
    issued = authority.issue("gateway", [HOST], folder)
    with closing(socket.socket()) as free:
        free.bind((HOST, 0))
        port = free.getsockname()[1]
    terms = GatewaySettings(place.log, place.blobs, port, str(issued.certificate), str(issued.key))
    return terms, f"https://{HOST}:{port}?ca={quote(str(authority.certificate.absolute()))}"


def main(terms: GatewaySettings, channel: socket.socket) -> None:
    from fedloop_server.gateway import create_app
    from fedloop_server.gateway.listening import serve

    def watch() -> None:
        channel.recv(1)
        os.kill(os.getpid(), signal.SIGTERM)

    def listening(address: str) -> None:
        with suppress(OSError):
            channel.sendall(address.encode() + b"\n")

    threading.Thread(target=watch, daemon=True).start()
    with closing(locations.open_log(terms.log)) as log:
        app = create_app(log, locations.open_blobs(terms.blobs))
        serve(app, host=HOST, port=terms.port, tls=(Path(terms.certificate), Path(terms.key)), on_listening=listening)
