"""Strategies of our own, as Flower has them: federated LoRA over the log, and recorded aggregation for any other strategy."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from fedloop_events.blobs.reader import TensorReader
from fedloop_events.blobs.store import BlobStore
from fedloop_events.blobs.tensors import specs
from fedloop_events.errors import UsageError
from fedloop_events.flower.records import array_record
from fedloop_events.types import RoundOpened
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedloop_server.aggregation.merging import merge
from fedloop_server.flower.grid import LogGrid

ARRAYS: Final = "arrays"
_METRICS: Final = "metrics"


class FederatedLora(Strategy):
    """One round of federated LoRA under the terms of `opened`: its cohort trains on its base release, and `merge` merges.

    Agents take the terms from the `RoundOpened` that they have read in the log; an instruction carries the base release alone,
    by the name of its blob. Fewer accepted updates than the quorum give no arrays: the round is then to be aborted.
    """

    def __init__(self, opened: RoundOpened, blobs: BlobStore) -> None:
        self.opened, self._blobs = opened, blobs
        self._grid: LogGrid | None = None

    def base(self) -> ArrayRecord:
        """The base release, read when asked."""
        reader = TensorReader(self._blobs)
        return array_record(reader, self.opened.base, specs(reader.tensors(self.opened.base)))

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """One message for each client of the cohort. Raises UsageError for another grid, or a client that is not enrolled."""
        if not isinstance(grid, LogGrid):
            raise UsageError("federated LoRA runs on a LogGrid alone")
        self._grid = grid
        content = RecordDict({ARRAYS: arrays})
        return [Message(content, grid.node_id(client_id), MessageType.TRAIN) for client_id in self.opened.cohort]

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """The merged release of the updates that the round's `RoundClosed` lists."""
        closed = None if self._grid is None else self._grid.closed
        if closed is None or len(closed.accepted) < self.opened.quorum:
            return None, None
        base = TensorReader(self._blobs).tensors(self.opened.base)
        merged = merge(self._blobs, self.opened, base, closed.accepted)
        record = ArrayRecord()
        for name, values in merged.items():
            record[name] = Array(values)
        return record, None

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """No messages: candidates are evaluated on the server's held-out set."""
        return []

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return None

    def summary(self) -> None:
        """Nothing: the round's terms are in the log."""


class Durable(Strategy):
    """Any strategy, with each aggregate recorded in the log before it is used.

    For strategies that draw noise, as Flower's DP wrappers do: `Durable(DifferentialPrivacyServerSideFixedClipping(...))`. A run
    that is started again gets the recorded aggregate, so that one noisy result leaves the server for one set of updates. The
    inner strategy aggregates again all the same, to bring the state of server optimisers up to date; what it draws then is
    dropped. State that depends on drawn noise itself (adaptive clipping norms) is not recorded.
    """

    def __init__(self, strategy: Strategy) -> None:
        self.strategy = strategy
        self._grid: LogGrid | None = None

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """As the inner strategy. Raises UsageError if the grid is no `LogGrid`."""
        if not isinstance(grid, LogGrid):
            raise UsageError("an aggregate is recorded on a LogGrid alone")
        self._grid = grid
        return self.strategy.configure_train(server_round, arrays, config, grid)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the inner strategy gave the first time."""
        arrays, metrics = self.strategy.aggregate_train(server_round, replies)
        if self._grid is None:
            raise UsageError("nothing was configured that could be aggregated")
        given = {ARRAYS: arrays, _METRICS: metrics}
        recorded = self._grid.record(lambda: RecordDict({name: value for name, value in given.items() if value is not None}))
        return recorded.array_records.get(ARRAYS), recorded.metric_records.get(_METRICS)

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        self.strategy.summary()
