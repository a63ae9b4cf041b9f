"""River's ADWIN and Page-Hinkley as values that can be kept, and their vote on one metric.

This is the one place that knows what river's detectors are made of, as read in river 0.26.1: ADWIN's window is a buffer of a few
rows of buckets, which its compiled half gives and takes as bytes; Page-Hinkley is six numbers. Restored, they go on exactly.
"""

from __future__ import annotations

import math
from typing import Final, NamedTuple

from fedloop_events.errors import UsageError
from msgspec import Struct, field

ADWIN: Final = "adwin"
PAGE_HINKLEY: Final = "page-hinkley"

ADWIN_DELTA: Final = 0.08
"""Bifet and Gavalda (2007): of one test. Alone it would raise a false alarm in every twentieth quiet stream or so."""
HINKLEY_DELTA: Final = 0.01
"""Changes of less than a point are not looked for."""
HINKLEY_VARIANCES: Final = 250.0
"""The threshold, in variances of the metric: a threshold of its own for each level would be wrong at every other."""
LEAST_VARIANCE: Final = 0.02
"""Of a metric that has hardly varied, such as one that was 1 a hundred times."""
FEWEST: Final = 100
"""Observations before Page-Hinkley judges: a mean of fewer is luck."""
STEP: Final = 32
MARKS: Final = 32
"""A change is placed among the last 32 times 32 observations."""
VOTE_HOLDS: Final = 1000
"""Observations for which a vote counts: one detector is slower than the other by hundreds where the change is small."""


class Vote(Struct):
    """A detector's last word: at which observation, and whether the metric rose."""

    at: int
    up: bool


class Hinkley(Struct):
    """Page-Hinkley's numbers."""

    seen: float = 0.0
    mean: float = 0.0
    increase: float = 0.0
    decrease: float = 0.0
    least: float | None = None
    """Of `increase`; None before the first observation."""
    most: float = -1.0
    """Of `decrease`."""


class Watched(Struct):
    """One metric since its last drift, or the beginning. At most 8 KiB: of a window ADWIN keeps six buckets for each doubling."""

    seen: int = 0
    total: float = 0.0
    squares: float = 0.0
    adwin: bytes = b""
    """Empty before the first observation, and after it saw a change: it begins anew."""
    hinkley: Hinkley = field(default_factory=Hinkley)
    votes: dict[str, Vote] = {}
    marks: list[float] = []
    """`total` after each of the last multiples of `STEP` observations: places where a change may have begun."""

    @property
    def variance(self) -> float:
        return max(LEAST_VARIANCE, self.squares / self.seen - (self.total / self.seen) ** 2)


class Change(NamedTuple):
    """A drift that the detectors agree on: the metric's mean before and after it, and of how many observations that is."""

    before: float
    after: float
    seen: int


class Jury:
    """The two detectors, which are given a metric's state for each observation: they remember nothing themselves.

    Raises UsageError if river is not installed.
    """

    def __init__(self) -> None:
        try:
            from river import drift, stats  # seconds of imports, which only a pipeline needs
        except ImportError:
            hint = "pip install 'fedloop[feedback]'"
            raise UsageError("drift needs the package river, which is not installed", hint=hint) from None
        self._adwin = drift.ADWIN(delta=ADWIN_DELTA)  # type: ignore[no-untyped-call]
        self._hinkley = drift.PageHinkley(min_instances=FEWEST, delta=HINKLEY_DELTA)
        self._mean = stats.Mean._from_state
        self._new_adwin: bytes = self._adwin._helper.__getstate__()

    def observe(self, watched: Watched, value: float) -> Change | None:
        """Take in one observation, from 0 to 1; the change, if both detectors have now seen one in the same direction."""
        watched.seen += 1
        watched.total += value
        watched.squares += value * value
        if watched.seen % STEP == 0:
            watched.marks.append(watched.total)
            del watched.marks[:-MARKS]
        self._ask_adwin(watched, value)
        self._ask_hinkley(watched, value)
        if len(watched.votes) < 2 or (change := _agreed(watched)) is None:
            return None
        watched.seen, watched.total, watched.squares = 0, 0.0, 0.0
        watched.adwin, watched.hinkley, watched.votes, watched.marks = b"", Hinkley(), {}, []
        return change

    def _ask_adwin(self, watched: Watched, value: float) -> None:
        detector = self._adwin
        detector._drift_detected = False
        detector._helper.__setstate__(watched.adwin or self._new_adwin)
        width, total = detector.width + 1, detector.total + value
        detector.update(value)  # type: ignore[no-untyped-call]
        if detector.drift_detected:
            # It has dropped what was before the change.
            before = (total - detector.total) / (width - detector.width)
            watched.votes[ADWIN] = Vote(watched.seen, detector.estimation > before)
            watched.adwin = b""
        else:
            watched.adwin = detector._helper.__getstate__()

    def _ask_hinkley(self, watched: Watched, value: float) -> None:
        detector, kept = self._hinkley, watched.hinkley
        detector._drift_detected = False
        detector.threshold = HINKLEY_VARIANCES * watched.variance
        detector._x_mean = self._mean(kept.seen, kept.mean)
        detector._sum_increase, detector._sum_decrease = kept.increase, kept.decrease
        detector._min_increase = math.inf if kept.least is None else kept.least
        detector._max_decrease = kept.most  # type: ignore[assignment]
        detector.update(value)  # type: ignore[no-untyped-call]
        kept.seen, kept.mean = detector._x_mean.n, detector._x_mean.get()
        kept.increase, kept.decrease = detector._sum_increase, detector._sum_decrease
        kept.least, kept.most = detector._min_increase, float(detector._max_decrease)
        if detector.drift_detected:
            up = kept.increase - kept.least > detector.threshold
            watched.votes[PAGE_HINKLEY] = Vote(watched.seen, up)
            watched.hinkley = Hinkley()


def _agreed(watched: Watched) -> Change | None:
    """What both detectors have voted for of late, cut where the observations differ most; None if they have not."""
    one, other = watched.votes.values()
    if one.up != other.up or watched.seen - min(one.at, other.at) > VOTE_HOLDS:
        return None
    found, most = None, 0.0
    for number, total in enumerate(reversed(watched.marks)):
        before = STEP * (watched.seen // STEP - number)
        after = watched.seen - before
        if not after:
            continue
        change = Change(total / before, (watched.total - total) / after, watched.seen)
        contrast = before * after * (change.after - change.before) ** 2
        if (change.after > change.before) == one.up and contrast > most:
            found, most = change, contrast
    return found
