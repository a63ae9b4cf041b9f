"""What a window adds up, in whole numbers: the order of additions changes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from fedloop_events import sketch
from fedloop_events.types import FeedbackScored, MetricsWindowed, Quantiles, UsageCounted, Width
from msgspec import Struct

WIDTHS_MS: Final[Mapping[Width, int]] = {"1m": 60_000, "1h": 3_600_000, "1d": 24 * 3_600_000}
OTHER: Final = "other"
"""What is counted under this name is of more signals, or releases, than are counted by name."""
_MAX_SIGNALS: Final = 64
_MAX: Final = 2**53 - 1
"""The largest `Count`."""
_UNIT: Final = 1_000_000
_BETWEEN: Final = " "
"""Of a release and a language in a group's name: neither has one."""


def group(release: str, language: str | None) -> str:
    return f"{release}{_BETWEEN}{language or ''}"


def split(name: str) -> tuple[str, str | None]:
    """The release and the language of a group."""
    release, _, language = name.partition(_BETWEEN)
    return release, language or None


class Sums(Struct, omit_defaults=True):
    """Of one window, release and language. Shares are in millionths. It holds fewer than 1,400 bins and 65 signals."""

    feedback: int = 0
    satisfied: int = 0
    satisfied_of: int = 0
    correct: int = 0
    correct_of: int = 0
    sentiment: int = 0
    sentiment_of: int = 0
    answers: int = 0
    bins: dict[int, int] = {}
    signals: dict[str, int] = {}
    masked: int = 0
    quarantined: int = 0
    late: int = 0

    def add_feedback(self, scored: FeedbackScored) -> None:
        self.feedback += 1
        self.masked = min(self.masked + scored.masked, _MAX)
        if scored.satisfaction is not None:
            self.satisfied += round(scored.satisfaction * _UNIT)
            self.satisfied_of += 1
        if scored.correct is not None:
            self.correct += scored.correct
            self.correct_of += 1
        if scored.sentiment is not None:
            self.sentiment += round(scored.sentiment * _UNIT)
            self.sentiment_of += 1
        if (signal := scored.reaction.signal) is not None:
            signal = signal if signal in self.signals or len(self.signals) < _MAX_SIGNALS else OTHER
            self.signals[signal] = self.signals.get(signal, 0) + 1

    def add_usage(self, counted: UsageCounted) -> None:
        self.quarantined = min(self.quarantined + counted.quarantined, _MAX)
        self.answers = min(self.answers + counted.answers, _MAX)
        for name, count in counted.latency.items():
            self._add_times(int(name), count)

    def windowed(
        self, origin: str, use_case: str, release: str, language: str | None, width: Width, start_ms: int
    ) -> MetricsWindowed:
        return MetricsWindowed(
            origin,
            use_case,
            release=release,
            width=width,
            start_ms=start_ms,
            language=language,
            feedback=self.feedback,
            satisfied=self.satisfied / _UNIT,
            satisfied_of=self.satisfied_of,
            correct=self.correct,
            correct_of=self.correct_of,
            sentiment_sum=self.sentiment / _UNIT,
            sentiment_of=self.sentiment_of,
            answers=self.answers,
            latency=_quantiles(self.bins),
            signals=dict(sorted(self.signals.items())),
            masked=self.masked,
            quarantined=self.quarantined,
            late=self.late,
        )

    def _add_times(self, number: int, count: int) -> None:
        number = sketch.clamped(number)
        self.bins[number] = min(self.bins.get(number, 0) + count, _MAX)


def _quantiles(bins: Mapping[int, int]) -> Quantiles | None:
    count = sum(bins.values())
    if not count:
        return None
    p50, p95, p99 = (sketch.quantile(bins, q) for q in (0.5, 0.95, 0.99))
    return Quantiles(min(count, _MAX), p50, p95, p99)
