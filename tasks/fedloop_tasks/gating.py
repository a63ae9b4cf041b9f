"""The gate: whether a candidate is worse than the release in force by more than a margin, beyond what chance explains.

A paired bootstrap over the held-out examples (Efron & Tibshirani 1993, "An Introduction to the Bootstrap", chapters 8 and 13;
for comparing two systems on one set Koehn 2004, "Statistical Significance Tests for Machine Translation Evaluation").
"""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from numpy.typing import NDArray

from fedloop_tasks.evaluation import Measured, Scores
from fedloop_tasks.task import Verdict

NOT_FINITE: Final = "not-finite"
WORSE: Final = "worse"
"""Why a candidate is rejected."""
CONFIDENCE: Final = 0.95
"""One-sided: so rarely, at most, is a candidate that is worse by no more than the margin rejected."""
_RESAMPLES: Final = 2_000
_SEED: Final = 1
_GROUPS: Final = 4_096
"""Of larger sets so many groups are drawn from, in place of examples: what it takes is bounded."""
_TIE: Final = 1e-9
"""A candidate that is worse by the margin exactly passes, however the last bit was rounded."""


def gate(candidate: Measured, incumbent: Measured, margin: float) -> Verdict:
    """Whether a candidate may take the place of the release in force, by the candidate's leading metric; `detail` says both
    values and the interval of their difference.

    It is rejected if it is worse by more than `margin`, and by so much that fewer than one in twenty samples of examples like
    these would show it no worse than that: the upper bound of the difference, at `CONFIDENCE`, lies below -`margin`. Where one of
    the two has no scores by example, or not as many as the other, what there is decides: the bare difference. So it does on a set
    so small that no sample of it differs. What is not finite is rejected; beside an incumbent that has no finite value anything
    passes that has.

    A function of its arguments, the same on every machine. Raises ValueError for evaluations on different held-out sets.
    """
    if candidate.dataset_sha256 != incumbent.dataset_sha256:
        raise ValueError("two evaluations on different held-out sets say nothing about each other")
    name, now, before = candidate.leading, candidate.score, incumbent.metrics.get(candidate.leading, math.nan)
    if not math.isfinite(now):
        return Verdict(NOT_FINITE, f"{name} is not a finite number")
    if not math.isfinite(before):
        return Verdict(detail=f"{name} {now:.4g}, in force none that is a finite number")
    better = 1 if candidate.higher_is_better else -1
    difference = better * (now - before)
    drawn = _differences(candidate.scores, incumbent.scores) if incumbent.leading == name else None
    low, high, by = difference, difference, "no scores by example"
    if drawn is not None:
        ranked = np.sort(better * drawn)
        low, high = (min(difference, _quantile(ranked, 1 - CONFIDENCE)), max(difference, _quantile(ranked, CONFIDENCE)))
        by = f"90 % interval {low:+.4g} to {high:+.4g}"
    detail = f"{name} {now:.4g}, in force {before:.4g}: a gain of {difference:+.4g} ({by}), at least {0 - margin:g} is needed"
    return Verdict(WORSE if high < -margin - _TIE else "", detail[:200])


def _quantile(ranked: NDArray[np.float64], part: float) -> float:
    """The smallest of these that at least this part of them does not exceed."""
    return float(ranked[max(math.ceil(part * len(ranked) - _TIE), 1) - 1])


def _differences(candidate: Scores | None, incumbent: Scores | None) -> NDArray[np.float64] | None:
    """The candidate's metric less the incumbent's on samples of the examples, drawn with replacement, the same for both; None if
    they cannot be compared one by one.

    Numbers are drawn from a stream that numpy never changes (NEP 19), and added in one order: the bytes do not depend on the
    machine.
    """
    if candidate is None or incumbent is None or len(candidate.values) != len(incumbent.values):
        return None
    sums = _grouped(
        np.stack(
            [
                candidate.values * candidate.weights,
                candidate.weights,
                incumbent.values * incumbent.weights,
                incumbent.weights,
            ]
        )
    )
    count = sums.shape[1]
    totals, source = np.zeros((4, _RESAMPLES)), np.random.PCG64(_SEED)
    for _ in range(count):
        totals += sums[:, (source.random_raw(_RESAMPLES) >> np.uint64(32)) * np.uint64(count) >> np.uint64(32)]
    with np.errstate(all="ignore"):
        found = totals[0] / totals[1] - totals[2] / totals[3]
    # A sample of examples that all weigh nothing has no metric.
    finite: NDArray[np.float64] = found[np.isfinite(found)]
    return finite if len(finite) else None


def _grouped(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """`sums` [4, n] by example, or of `_GROUPS` groups of them."""
    if sums.shape[1] <= _GROUPS:
        return sums
    grouped = np.zeros((len(sums), _GROUPS))
    for start in range(0, sums.shape[1], _GROUPS):
        part = sums[:, start : start + _GROUPS]
        grouped[:, : part.shape[1]] += part
    return grouped
