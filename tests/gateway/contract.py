"""The gateway as one more `EventLog` for the contract suite: its reader and writer acts for the deployment's server."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import msgspec
import samples
from fedloop_events import topics
from fedloop_events.logs.http import GatewayLog
from fedloop_events.logs.port import START, Batch, EventLog, Position
from gateway.harness import Served, serving

CLIENTS = ("device-0", "device-1", "device-2")
"""Those that the suite's events are by: a gateway takes no others'."""


class ProvisionedLog(GatewayLog):
    """A log that begins after the deployment was created and its clients were enrolled."""

    def __init__(self, url: str, begin: Position) -> None:
        super().__init__(url, identity=("server", samples.key("server")))
        self._begin = begin

    def read(
        self, topics: Collection[str] = topics.ALL, after: Position = START, *, limit: int = 1000, wait_s: float = 0.0
    ) -> Batch:
        return super().read(topics, after if after.offsets else self._begin, limit=limit, wait_s=wait_s)


@contextmanager
def gateway(folder: Path, log: EventLog) -> Iterator[Served]:
    """A gateway over `log`, which is then closed; for `open_gateway(where(served))` in any process while it lasts."""
    with closing(log), serving(folder, *CLIENTS, log=log) as served:
        yield served


def where(served: Served) -> str:
    return msgspec.json.encode((served.url, served.log.end())).decode()


def open_gateway(place: str) -> EventLog:
    """Another connection to the gateway at `where`."""
    url, begin = msgspec.json.decode(place, type=tuple[str, Position])
    return ProvisionedLog(url, begin)
