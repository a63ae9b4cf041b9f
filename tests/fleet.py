"""A deployment in a folder with simulated clients, for tests of the server's Flower side."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import numpy as np
from fedloop_events.blobs.store import BlobStore
from fedloop_events.envelope import decode
from fedloop_events.logs.port import read_all
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_events.signatures import SigningKey
from fedloop_events.types import DeploymentCreated, Payload
from fedloop_events.writer import EventWriter
from fedloop_server.flower.admission import Admission
from fedloop_server.flower.grid import LogGrid
from fedloop_server.flower.journal import start_epoch
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from simulated import SimulatedClient

ORIGIN = "tests"
RUN = "run"
P = TypeVar("P", bound=Payload)
ServesMessage = Callable[[Message, Context], Message]


class Deployment:
    """A log, a blob store and the server's key in `folder`."""

    def __init__(self, folder: Path, key: SigningKey | None = None) -> None:
        self.folder, self.key = folder, key or SigningKey.generate()
        self.log, self.blobs = SqliteLog(folder / "log.sqlite"), BlobStore(folder / "blobs")
        self.writer = EventWriter(self.log, self.key)
        if not self.payloads():
            self.writer.append(DeploymentCreated(origin=ORIGIN, public_key=self.key.public_key))

    def payloads(self) -> list[Payload]:
        return [payload for record in read_all(self.log) if (payload := decode(record)) is not None]

    def of(self, kind: type[P]) -> list[P]:
        return [payload for payload in self.payloads() if isinstance(payload, kind)]

    def grid(self, *, server_id: str = "server", admission: Admission | None = None, run_id: str = RUN) -> LogGrid:
        """A grid of a server that takes the run over."""
        epoch = start_epoch(self.log, self.writer, run_id=run_id, server_id=server_id)
        return LogGrid(self.log, self.blobs, self.writer, run_id=run_id, epoch=epoch, admission=admission)

    def client(self, number: int, app: ServesMessage) -> SimulatedClient:
        """An enrolled client, which is told its number as `number` in its node configuration."""
        config: dict[str, bool | float | int | str] = {"number": number}
        client = SimulatedClient(self.log, self.blobs, f"client-{number}", app, node_id=node_id(number), node_config=config)
        client.enrol()
        return client


def node_id(number: int) -> int:
    """Above 2^63, as Flower's own node ids can be."""
    return 2**64 - 1 - number


@contextmanager
def serving(*clients: SimulatedClient) -> Iterator[None]:
    """Threads that serve as long as the block lasts."""
    stop = threading.Event()
    threads = [threading.Thread(target=client.run, args=(stop,)) for client in clients]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def regression_app(before_reply: Callable[[int], None] = lambda number: None) -> ClientApp:
    """Each client takes some gradient steps of a linear regression on its own data; `before_reply` is told its number."""
    app = ClientApp()

    def data(context: Context) -> tuple[np.ndarray, np.ndarray]:
        random = np.random.default_rng(int(context.node_config["number"]))
        x = random.normal(size=(32, 6))
        return x, x @ np.arange(6.0)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        x, y = data(context)
        arrays = message.content.array_records["arrays"]
        weights, bias = (array.numpy() for array in arrays.values())
        for _ in range(5):
            weights -= (0.1 * x.T @ (x @ weights - y) / len(y)).astype(np.float32)
        calls = context.state.metric_records.get("calls", MetricRecord({"n": 0}))
        context.state["calls"] = MetricRecord({"n": int(str(calls["n"])) + 1})
        number = int(context.node_config["number"])
        before_reply(number)
        metrics = MetricRecord({"num-examples": 10 + number, "loss": float(np.square(x @ weights - y).mean())})
        reply = ArrayRecord({"weights": Array(weights), "bias": Array(np.asarray(bias + np.float32(number)))})
        return Message(RecordDict({"arrays": reply, "metrics": metrics}), reply_to=message)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        x, y = data(context)
        weights = message.content.array_records["arrays"]["weights"].numpy()
        before_reply(int(context.node_config["number"]))
        metrics = MetricRecord({"num-examples": 10, "loss": float(np.square(x @ weights - y).mean())})
        return Message(RecordDict({"metrics": metrics}), reply_to=message)

    return app


def initial_arrays() -> ArrayRecord:
    return ArrayRecord({"weights": Array(np.zeros(6, np.float32)), "bias": Array(np.zeros((), np.float32))})


def as_bytes(arrays: ArrayRecord | None) -> dict[str, bytes]:
    """The values, bit by bit."""
    assert arrays is not None
    return {name: array.numpy().tobytes() for name, array in arrays.items()}
