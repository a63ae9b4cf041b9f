"""Topic `metrics`: what the feedback pipeline measures of each use case, and what it concludes from that."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta, Struct

from fedloop_events import topics
from fedloop_events.types.fields import (
    Count,
    Identifier,
    Line,
)
from fedloop_events.types.payload import Audience
from fedloop_events.types.scored import Language, Share, UseCaseEvent

Finite = Annotated[float, Meta(ge=-1e12, le=1e12)]
Width = Literal["1m", "1h", "1d"]


class Quantiles(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Of response times in seconds, within 1% of each (DDSketch, Masson et al. 2019, VLDB 12)."""

    count: Count
    p50: Finite
    p95: Finite
    p99: Finite


class MetricsWindowed(UseCaseEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One window of one use case, release and language, closed: each `*_of` counts what a rate is of.

    What is counted was given within the window by the devices' clocks, and was recorded no later than a grace after its end by
    the log's own. What came later stands in `late` of the window in which it came.
    """

    topic = topics.METRICS
    type_name = "io.fedloop.metrics.windowed.v1"
    audience = Audience.NOBODY

    release: Identifier
    width: Width
    start_ms: Count
    language: Language | None = None
    feedback: Count = 0
    satisfied: Annotated[float, Meta(ge=0, le=1e12)] = 0.0
    satisfied_of: Count = 0
    correct: Count = 0
    correct_of: Count = 0
    sentiment_sum: Finite = 0.0
    sentiment_of: Count = 0
    answers: Count = 0
    """As the devices' summaries count them, with feedback or without."""
    latency: Quantiles | None = None
    signals: dict[Line, Count] = {}
    masked: Count = 0
    quarantined: Count = 0
    late: Count = 0

    @property
    def satisfaction(self) -> float | None:
        return self.satisfied / self.satisfied_of if self.satisfied_of else None

    @property
    def accuracy(self) -> float | None:
        return self.correct / self.correct_of if self.correct_of else None


class DriftDetected(UseCaseEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A metric, or what users ask, is no longer what it was: which detectors say so, and from what to what it went."""

    topic = topics.METRICS
    type_name = "io.fedloop.drift.detected.v1"
    audience = Audience.NOBODY

    metric: Literal["satisfaction", "accuracy", "labels", "embeddings"]
    detectors: list[Identifier]
    at_ms: Count
    """By the time at which what showed it was given."""
    before: Finite | None = None
    after: Finite | None = None
    """The metric, where it is one number."""
    statistic: Finite | None = None
    """Of input drift: the population stability index, or the two-sample test's p value."""
    seen: Count = 0
    """Observations since the last drift, or the beginning."""


class MetricForecast(UseCaseEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What is expected of a metric after a closed window, with an interval that should hold nine times of ten.

    `anomaly` says how unusual the window was itself, from 0 to 1; `crosses_ms` when the bound will be crossed if it goes on so.
    """

    topic = topics.METRICS
    type_name = "io.fedloop.metric.forecast.v1"
    audience = Audience.NOBODY

    metric: Literal["satisfaction", "accuracy"]
    width: Width
    after_ms: Count
    """The end of the window that was seen last."""
    horizon: Annotated[int, Meta(ge=1, le=1000)]
    """Windows ahead."""
    expected: Finite
    low: Finite
    high: Finite
    anomaly: Share = 0.0
    bound: Finite | None = None
    crosses_ms: Count | None = None


class TriggerMuted(UseCaseEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The operator wants a trigger to ask for no rounds before a time (0: it may again)."""

    topic = topics.METRICS
    type_name = "io.fedloop.trigger.muted.v1"
    audience = Audience.NOBODY

    trigger: Identifier
    until_ms: Count
    reason: Line = ""


class TriggerFired(UseCaseEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A person or a program says that what a trigger of kind "event" waits for has happened."""

    topic = topics.METRICS
    type_name = "io.fedloop.trigger.fired.v1"
    audience = Audience.NOBODY

    trigger: Identifier
    reason: Line = ""
