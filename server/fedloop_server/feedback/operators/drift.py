"""Drift: whether satisfaction, accuracy, or what users ask is no longer what it was, by use case.

Observations come in the order of topic `scored`, which is the same however often and by whomever it is read.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import ClassVar, Literal

from fedloop_events import topics
from fedloop_events.envelope import Record
from fedloop_events.types import DriftDetected, FeedbackScored, Payload
from msgspec import Struct, field

from fedloop_server.feedback import detectors, embedding_shift, label_shift
from fedloop_server.feedback.detectors import Watched
from fedloop_server.feedback.embedding_shift import Embed, Embedded
from fedloop_server.feedback.label_shift import Labels
from fedloop_server.feedback.operator import Emit

Metric = Literal["satisfaction", "accuracy", "labels", "embeddings"]


class DriftState(Struct):
    """One use case: at most 128 KiB, whatever has been taken in, and 64 KiB where nothing embeds."""

    satisfaction: Watched = field(default_factory=Watched)
    accuracy: Watched = field(default_factory=Watched)
    labels: Labels = field(default_factory=Labels)
    embeddings: Embedded = field(default_factory=Embedded)


class Drift:
    """Emits a `DriftDetected` with the feedback that shows it; what is watched then begins anew.

    Of quiet streams of 4,000 observations of a metric at most 2 of 100 raise an alarm. A label is what the model predicted, or
    else what the user said.
    Texts are compared by what `embed` makes of them: where there is none, embeddings are not watched. Raises UsageError if river
    is not installed.
    """

    name: ClassVar[str] = "drift"
    version: ClassVar[int] = 1
    topics: ClassVar[tuple[str, ...]] = (topics.SCORED,)
    state_type = DriftState

    def __init__(self, embed: Embed | None = None) -> None:
        self._jury, self._embed = detectors.Jury(), embed

    def key(self, record: Record, payload: Payload) -> str | None:
        return payload.key if isinstance(payload, FeedbackScored) else None

    def apply(self, state: DriftState, record: Record, payload: Payload) -> Iterator[Emit]:
        assert isinstance(payload, FeedbackScored)
        if payload.satisfaction is not None:
            yield from self._metric("satisfaction", state.satisfaction, payload.satisfaction, payload)
        if payload.correct is not None:
            yield from self._metric("accuracy", state.accuracy, float(payload.correct), payload)
        if label := payload.reaction.predicted or payload.reaction.label:
            seen = state.labels.seen + 1
            if (index := label_shift.observe(state.labels, label)) is not None:
                yield _emit(payload, "labels", [label_shift.NAME], statistic=index, seen=seen)
        if self._embed is not None:
            seen, text = state.embeddings.seen + 1, payload.reaction.text.text
            if (p_value := embedding_shift.observe(state.embeddings, text, self._embed, payload.use_case)) is not None:
                yield _emit(payload, "embeddings", [embedding_shift.NAME], statistic=p_value, seen=seen)

    def advance(self, key: str, state: DriftState, now_ms: int) -> Iterator[Emit]:
        return iter(())

    def _metric(self, metric: Metric, watched: Watched, value: float, scored: FeedbackScored) -> Iterator[Emit]:
        change = self._jury.observe(watched, value)
        if change is not None:
            agreed = [detectors.ADWIN, detectors.PAGE_HINKLEY]
            yield _emit(scored, metric, agreed, before=change.before, after=change.after, seen=change.seen)


def _emit(scored: FeedbackScored, metric: Metric, agreed: list[str], *, seen: int, **values: float | None) -> Emit:
    return Emit(DriftDetected(scored.origin, scored.use_case, metric, agreed, scored.given_ms, seen=seen, **values))
