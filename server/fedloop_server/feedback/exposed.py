"""The pipeline's metrics for Prometheus: how far it is behind, and what it found since this process began."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator

from fedloop_events import topics, types
from fedloop_events.types import Payload
from prometheus_client import CollectorRegistry
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from fedloop_server.feedback.pipeline import Pipeline
from fedloop_server.telemetry.metrics import MeteredLog, registry_of, total

MAX_USE_CASES = 100


class Found:
    """What a pipeline has emitted since it began, in counts; at most `MAX_USE_CASES` use cases."""

    def __init__(self) -> None:
        self.emitted: Counter[str] = Counter()
        self.held_back: Counter[str] = Counter()
        self.late = 0
        self.latest: dict[str, types.MetricsWindowed] = {}
        """By use case, the last window of a minute that was closed and says how content users were."""

    def add(self, payload: Payload) -> None:
        self.emitted[payload.type_name.removeprefix("io.fedloop.")] += 1
        match payload:
            case types.EventQuarantined():
                self.held_back[payload.reason] += 1
            case types.MetricsWindowed(width="1m"):
                self.late += payload.late
                if payload.satisfied_of and (payload.use_case in self.latest or len(self.latest) < MAX_USE_CASES):
                    self.latest[payload.use_case] = payload
            case _:
                pass


class PipelineCollector:
    """Asked from another thread than the pipeline's: what grows meanwhile is copied, which no other thread interrupts."""

    def __init__(self, pipeline: Pipeline, found: Found, log: MeteredLog, clock: Callable[[], float] = time.time) -> None:
        self._pipeline, self._found, self._log, self._clock = pipeline, found, log, clock

    def collect(self) -> Iterator[Metric]:
        read = CounterMetricFamily("fedloop_feedback_read", "Events that the pipeline read.", labels=["topic"])
        for topic in topics.ALL:
            read.add_metric([topic], self._log.read_by_topic[topic])
        yield read
        yield total("fedloop_feedback_emitted", "Events that the pipeline emitted.", "type", self._found.emitted)
        yield total("fedloop_feedback_held_back", "Events that the second gate held back.", "reason", self._found.held_back)
        meaning = "Events of feedback that are malformed, or not authentic."
        yield CounterMetricFamily("fedloop_feedback_refused", meaning, self._pipeline.refused)
        meaning = "Feedback that came too late for its own minute."
        yield CounterMetricFamily("fedloop_feedback_late", meaning, self._found.late)
        behind = GaugeMetricFamily("fedloop_feedback_behind_seconds", "Up to how long ago everything has been taken in.")
        if complete_ms := self._pipeline.complete_ms:
            behind.add_metric([], max(0.0, self._clock() - complete_ms / 1000))
        yield behind
        for name in ("satisfaction", "accuracy"):
            meaning = f"The {name} in the last minute that was closed, by use case."
            gauge = GaugeMetricFamily(f"fedloop_feedback_{name}", meaning, labels=["use_case"])
            for use_case, window in sorted(self._found.latest.copy().items()):
                value: float | None = getattr(window, name)
                if value is not None:
                    gauge.add_metric([use_case], value)
            yield gauge


def registry(pipeline: Pipeline, found: Found, log: MeteredLog) -> CollectorRegistry:
    """The pipeline's metrics, and the process's own."""
    return registry_of(PipelineCollector(pipeline, found, log))
