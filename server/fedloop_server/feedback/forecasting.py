"""An online forecast of a rate that is counted by windows: its level, its trend if there is one, and how far both may be trusted.

Measured against river's forecasters on the same series (`benchmarks/drift.py`): what most matters is how many observations a
window has, and theirs do not take it.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from msgspec import Struct, field

FEWEST: Final = 10
"""Windows before anything is expected."""
LEVEL_KEPT: Final = 0.88
TREND_KEPT: Final = 0.95
"""How much a window's weight is kept with each window after it: about 8, and 20, windows count."""
SIGNIFICANT: Final = 3.0
"""Standard errors from which on a slope is believed: it is asked for after every window."""
DAMPED: Final = 0.85
"""How much of a slope is expected to be left with each window: a fall that has ended looks like a slope for a while."""
SCORES: Final = 200
"""Errors that the width of the interval rests on."""
FEWEST_SCORES: Final = 20
MISSED: Final = 0.1
"""The share of intervals that are to miss."""
STEP: Final = 0.02
LEAST_VARIANCE: Final = 0.01
FARTHEST: Final = 1000
"""Windows ahead within which a crossing is looked for."""
_NORMAL_90: Final = 1.645


class Pending(Struct):
    """A forecast that has not come to its window yet."""

    target: int
    expected: float
    scale: float
    half_width: float


class Slope(Struct):
    """Sums of a weighted regression over windows, the last of which is at 0."""

    weight: float = 0.0
    at: float = 0.0
    at_at: float = 0.0
    value: float = 0.0
    at_value: float = 0.0


class Series(Struct):
    """One metric by windows of one width. At most as many `pending` as windows in the horizon, and `SCORES` scores."""

    index: int = 0
    """Of the last window, counted from 1970."""
    windows: int = 0
    weight: float = 0.0
    value: float = 0.0
    excess: float = 1.0
    """How much more than by chance of its few observations a window differs from the level (a ratio of variances)."""
    slope: Slope = field(default_factory=Slope)
    pending: list[Pending] = []
    scores: list[float] = []
    misses: float = MISSED
    """The share that is aimed at, so that `MISSED` comes out."""


class Forecast(NamedTuple):
    """Of the window at `horizon`; `level` and `slope` are by window, `slope` 0 unless it is significant."""

    expected: float
    low: float
    high: float
    anomaly: float
    level: float
    slope: float

    def crosses(self, bound: float) -> int | None:
        """In how many windows the level is below `bound` if it goes on so: 0 if it is, None if not within `FARTHEST`."""
        if self.level < bound:
            return 0
        if self.slope >= 0:
            return None
        ahead = math.floor((bound - self.level) / self.slope) + 1
        return ahead if ahead <= FARTHEST else None


def observe(series: Series, index: int, total: float, count: int, horizon: int) -> Forecast | None:
    """Take in the window `index`, later than all before it, with `count` observations that add up to `total`; what is expected of
    the window `horizon` after it, from `FEWEST` windows on."""
    rate, anomaly = total / count, 0.0
    if series.windows >= FEWEST:
        anomaly = _surprise(series, rate, count)
    _settle(series, index, rate)
    _take_in(series, index, rate, count)
    if series.windows < FEWEST:
        return None
    level, slope = _trend(series)
    expected = min(1.0, max(0.0, level + slope * _damped(horizon)))
    typical = series.weight * (1 - LEVEL_KEPT)
    scale = math.sqrt(_variance(level) * series.excess / max(1.0, typical))
    half_width = _quantile(series) * scale
    series.pending.append(Pending(index + horizon, expected, scale, half_width))
    low, high = max(0.0, expected - half_width), min(1.0, expected + half_width)
    return Forecast(expected, low, high, anomaly, level, slope)


def _damped(horizon: int) -> float:
    return DAMPED * (1 - DAMPED**horizon) / (1 - DAMPED)


def _variance(rate: float) -> float:
    return max(LEAST_VARIANCE, rate * (1 - rate))


def _surprise(series: Series, rate: float, count: int) -> float:
    """How rarely a window of so many observations is as far from what was expected, from 0 to 1; learns how far they are."""
    level, slope = _trend(series)
    expected = min(1.0, max(0.0, level + slope * _damped(1)))
    chance = _variance(expected) * (1 / count + 1 / max(1.0, series.weight))
    squared = (rate - expected) ** 2 / chance
    anomaly = math.erf(math.sqrt(squared / series.excess / 2))
    # Bounded, so that one strange window does not make all that follow look usual.
    series.excess = max(1.0, series.excess + 0.05 * (min(squared, 9 * series.excess) - series.excess))
    return anomaly


def _settle(series: Series, index: int, rate: float) -> None:
    """Compare with what was expected of this window: adaptive conformal inference (Gibbs and Candes 2021, NeurIPS 34)."""
    due = [each for each in series.pending if each.target == index]
    series.pending = [each for each in series.pending if each.target > index]
    for each in due:
        error = abs(rate - each.expected)
        aimed = series.misses + STEP * (MISSED - (error > each.half_width))
        series.misses = min(0.5, max(0.005, aimed))
        series.scores.append(error / each.scale)
        del series.scores[:-SCORES]


def _quantile(series: Series) -> float:
    count = len(series.scores)
    if count < FEWEST_SCORES:
        return _NORMAL_90
    place = math.ceil((count + 1) * (1 - series.misses))
    return sorted(series.scores)[min(place, count) - 1]


def _take_in(series: Series, index: int, rate: float, count: int) -> None:
    passed = index - series.index if series.windows else 0
    series.index, series.windows = index, series.windows + 1
    kept = LEVEL_KEPT**passed
    series.weight = series.weight * kept + count
    series.value = series.value * kept + count * rate
    sums, kept = series.slope, TREND_KEPT**passed
    sums.at_at = kept * (sums.at_at - 2 * passed * sums.at + passed**2 * sums.weight)
    sums.at = kept * (sums.at - passed * sums.weight)
    sums.at_value = kept * (sums.at_value - passed * sums.value)
    sums.weight, sums.value = kept * sums.weight + count, kept * sums.value + count * rate


def _trend(series: Series) -> tuple[float, float]:
    """Where the rate is, and by how much it changes with each window: 0 unless that is significant."""
    sums, level = series.slope, series.value / series.weight
    spread = sums.at_at - sums.at**2 / sums.weight
    if spread <= 0:
        return level, 0.0
    slope = (sums.at_value - sums.at * sums.value / sums.weight) / spread
    if abs(slope) < SIGNIFICANT * math.sqrt(_variance(level) * series.excess / spread):
        return level, 0.0
    return (sums.value - slope * sums.at) / sums.weight, slope
