"""A strategy of our own around any other one: what it aggregates is recorded before it is used."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final

from fedloop_events.errors import UsageError
from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Strategy

from fedloop_server.flower.grid import LogGrid

ARRAYS: Final = "arrays"
_METRICS: Final = "metrics"


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
