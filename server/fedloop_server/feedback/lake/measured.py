"""The tables of what was measured: metrics by window, drift, and what was expected."""

from __future__ import annotations

from typing import Final

from fedloop_events import topics, types
from fedloop_events.envelope import Record

from fedloop_server.feedback.lake import tables
from fedloop_server.feedback.lake.tables import Row, Table

_METRICS: Final = (topics.METRICS,)


def _windowed(record: Record, window: types.MetricsWindowed) -> Row:
    latency = window.latency
    quantiles = (None, None, None, 0) if latency is None else (latency.p50, latency.p95, latency.p99, latency.count)
    return (
        record.id,
        window.use_case,
        tables.day_of(window.start_ms),
        window.release,
        window.width,
        window.start_ms,
        window.language,
        window.feedback,
        window.satisfied,
        window.satisfied_of,
        window.correct,
        window.correct_of,
        window.sentiment_sum,
        window.sentiment_of,
        window.answers,
        *quantiles,
        tables.as_json(window.signals),
        window.masked,
        window.quarantined,
        window.late,
    )


METRICS: Final = Table(
    "metrics",
    _METRICS,
    {
        "event_id": "id",
        "use_case": "id",
        "day": "day",
        "release": "id",
        "width": "id",
        "start_at": "time",
        "language": "id",
        "feedback": "int",
        "satisfied": "float",
        "satisfied_of": "int",
        "correct": "int",
        "correct_of": "int",
        "sentiment_sum": "float",
        "sentiment_of": "int",
        "answers": "int",
        "latency_p50_s": "float",
        "latency_p95_s": "float",
        "latency_p99_s": "float",
        "latency_of": "int",
        "signals": "text",
        "masked": "int",
        "quarantined": "int",
        "late": "int",
    },
    {types.MetricsWindowed: _windowed},
    divided_by=tables.BY_USE_CASE,
)


def _drifted(record: Record, drift: types.DriftDetected) -> Row:
    return (
        record.id,
        drift.use_case,
        tables.day_of(drift.at_ms),
        drift.metric,
        tables.as_json(drift.detectors),
        drift.at_ms,
        drift.before,
        drift.after,
        drift.statistic,
        drift.seen,
    )


DRIFT: Final = Table(
    "drift",
    _METRICS,
    {
        "event_id": "id",
        "use_case": "id",
        "day": "day",
        "metric": "id",
        "detectors": "text",
        "at": "time",
        "before": "float",
        "after": "float",
        "statistic": "float",
        "seen": "int",
    },
    {types.DriftDetected: _drifted},
    divided_by=tables.BY_USE_CASE,
)


def _forecast(record: Record, forecast: types.MetricForecast) -> Row:
    return (
        record.id,
        forecast.use_case,
        tables.day_of(forecast.after_ms),
        forecast.metric,
        forecast.width,
        forecast.after_ms,
        forecast.horizon,
        forecast.expected,
        forecast.low,
        forecast.high,
        forecast.anomaly,
        forecast.bound,
        forecast.crosses_ms,
    )


FORECASTS: Final = Table(
    "forecasts",
    _METRICS,
    {
        "event_id": "id",
        "use_case": "id",
        "day": "day",
        "metric": "id",
        "width": "id",
        "after": "time",
        "horizon": "int",
        "expected": "float",
        "low": "float",
        "high": "float",
        "anomaly": "float",
        "bound": "float",
        "crosses_at": "time",
    },
    {types.MetricForecast: _forecast},
    divided_by=tables.BY_USE_CASE,
)
