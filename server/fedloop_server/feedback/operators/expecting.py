"""What is expected of satisfaction and accuracy next, and when a bound will be crossed if it goes on so, by use case."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import ClassVar, Final, Literal

from fedloop_events import topics
from fedloop_events.envelope import Record
from fedloop_events.types import MetricForecast, MetricsWindowed, Payload
from msgspec import Struct

from fedloop_server.feedback import forecasting
from fedloop_server.feedback.forecasting import Series
from fedloop_server.feedback.operator import Emit

Metric = Literal["satisfaction", "accuracy"]
METRICS: Final[tuple[Metric, ...]] = ("satisfaction", "accuracy")
Expected = Literal["1m", "1h"]
WIDTH_MS: Final[Mapping[Expected, int]] = MappingProxyType({"1m": 60_000, "1h": 3_600_000})
HORIZON: Final[Mapping[Expected, int]] = MappingProxyType({"1m": 15, "1h": 24})
"""A quarter of an hour ahead, and a day."""


class Tally(Struct):
    total: float = 0.0
    count: int = 0


class Width(Struct):
    """The window that is being added up, and each metric's past."""

    start_ms: int = 0
    tallies: dict[Metric, Tally] = {}
    series: dict[Metric, Series] = {}


class ExpectState(Struct):
    """One use case: two widths of two metrics. At most 16 KiB, whatever has been taken in."""

    widths: dict[Expected, Width] = {}


class Expect:
    """Emits a `MetricForecast` for each metric after each window of a minute and of an hour, once one of a later start has come.

    Windows of the same start are added up, whatever their release and language. `bounds` are those below which a metric is not
    to fall. A window that comes after one of a later start is not counted.
    """

    name: ClassVar[str] = "expect"
    version: ClassVar[int] = 1
    topics: ClassVar[tuple[str, ...]] = (topics.METRICS,)
    state_type: type[ExpectState] = ExpectState

    def __init__(self, bounds: Mapping[Metric, float] = MappingProxyType({})) -> None:
        self._bounds = bounds

    def key(self, record: Record, payload: Payload) -> str | None:
        return payload.key if isinstance(payload, MetricsWindowed) and payload.width != "1d" else None

    def apply(self, state: ExpectState, record: Record, payload: Payload) -> Iterator[Emit]:
        assert isinstance(payload, MetricsWindowed)
        assert payload.width != "1d"
        width = state.widths.setdefault(payload.width, Width())
        if payload.start_ms < width.start_ms:
            return
        if payload.start_ms > width.start_ms:
            for metric in METRICS:
                yield from self._closed(width, payload.width, metric, payload)
            width.start_ms, width.tallies = payload.start_ms, {}
        _add(width, "satisfaction", payload.satisfied, payload.satisfied_of)
        _add(width, "accuracy", payload.correct, payload.correct_of)

    def advance(self, key: str, state: ExpectState, now_ms: int) -> Iterator[Emit]:
        return iter(())

    def _closed(self, kept: Width, width: Expected, metric: Metric, of: MetricsWindowed) -> Iterator[Emit]:
        """The forecast after the window that was added up, if it has anything of this metric."""
        tally = kept.tallies.get(metric)
        if tally is None:
            return
        lasts_ms, horizon, bound = WIDTH_MS[width], HORIZON[width], self._bounds.get(metric)
        series = kept.series.setdefault(metric, Series())
        forecast = forecasting.observe(series, kept.start_ms // lasts_ms, tally.total, tally.count, horizon)
        if forecast is None:
            return
        after_ms = kept.start_ms + lasts_ms
        ahead = None if bound is None else forecast.crosses(bound)
        found = MetricForecast(
            of.origin,
            of.use_case,
            metric,
            width,
            after_ms,
            horizon,
            forecast.expected,
            forecast.low,
            forecast.high,
            anomaly=forecast.anomaly,
            bound=bound,
            crosses_ms=None if ahead is None else after_ms + ahead * lasts_ms,
        )
        yield Emit(found, of=(of.use_case, width, kept.start_ms, metric), time_ms=after_ms)


def _add(width: Width, metric: Metric, total: float, count: int) -> None:
    if count:
        tally = width.tallies.setdefault(metric, Tally())
        tally.total += total
        tally.count += count
