"""Rounds in which training costs nothing, so that what is left is the transport."""

from __future__ import annotations

import statistics
import time
from itertools import pairwise

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg

TENSORS = 8
LIMIT_S = 300.0


def trivial_app() -> ClientApp:
    """Adds the client's number to what it gets."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = np.float32(float(str(context.node_config["partition-id"])))
        arrays = ArrayRecord(
            {name: Array(array.numpy() + number) for name, array in message.content.array_records["arrays"].items()}
        )
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    return app


def timed_rounds(grid: Grid, clients: int, megabytes: int, rounds: int) -> float:
    """Run FedAvg; the median of the seconds between the ends of consecutive rounds."""
    ends: list[float] = []

    def at_end(_: int, __: ArrayRecord) -> None:
        ends.append(time.perf_counter())

    elements = megabytes * 1_000_000 // 4 // TENSORS
    arrays = ArrayRecord({f"layer-{i}": Array(np.zeros(elements, np.float32)) for i in range(TENSORS)})
    strategy = FedAvg(fraction_evaluate=0.0, min_train_nodes=clients, min_available_nodes=clients)
    result = strategy.start(grid, arrays, num_rounds=rounds, timeout=LIMIT_S, evaluate_fn=at_end)
    mean = rounds * (clients - 1) / 2
    assert np.allclose(result.arrays["layer-0"].numpy(), mean), "every client took part in every round"
    return statistics.median(later - earlier for earlier, later in pairwise(ends[1:]))
