"""One Gaussian release of sums: rows of bounded norm, added up by the group that each belongs to."""

from __future__ import annotations

import numpy as np
from fedloop_events.errors import FedloopError
from fedloop_events.types import Mechanism
from numpy.typing import ArrayLike, NDArray

from fedloop_privacy.dp.accounting import validate
from fedloop_privacy.dp.noise import SYSTEM, RandomSource, gaussian


class SumsError(FedloopError):
    """Rows, groups or terms of which no sum with a bounded sensitivity can be made."""


def group_sums(
    rows: ArrayLike, groups: ArrayLike, count: int, terms: Mechanism, source: RandomSource = SYSTEM
) -> NDArray[np.float32]:
    """The sum of the rows [n, d] of each of `count` groups, divided by `terms.divisor` and with noise: float32 [count, d].

    Each row is clipped to L2 norm `terms.clip_norm`, so one row more or less moves one row of the sums by no more than
    that, and N(0, (noise_multiplier x clip_norm)^2) is added to every coordinate in float64: one Gaussian mechanism, whatever
    the groups. A row that is not finite counts as zero. `n` may be 0.

    Raises SumsError unless rows are [n, d], groups n whole numbers in [0, count), and `terms` one step at sampling rate 1;
    MechanismError for terms out of range.
    """
    validate(terms)
    if terms.steps != 1 or terms.sampling_rate != 1:
        raise SumsError(f"sums are one release of all examples, not {terms.steps} steps at rate {terms.sampling_rate:g}")
    values, of_group = np.asarray(rows, dtype=np.float64), np.asarray(groups, dtype=np.int64)
    if values.ndim != 2 or of_group.shape != values.shape[:1]:
        raise SumsError(f"rows must be [n, d] and groups [n], not {list(values.shape)} and {list(of_group.shape)}")
    if of_group.size and not (of_group.min() >= 0 and of_group.max() < count):
        raise SumsError(f"groups must be in [0, {count})")
    total = np.zeros((count, values.shape[1]))
    np.add.at(total, of_group, _clipped(values, terms.clip_norm))
    noise = gaussian(total.shape, terms.noise_multiplier * terms.clip_norm, source)
    return ((total + noise) / terms.divisor).astype(np.float32)


def row_norms(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Norms [n, 1], 1 where the row is zero or not finite; column by column, so that no machine adds in another order."""
    squares = np.zeros(len(rows))
    with np.errstate(invalid="ignore", over="ignore"):
        for column in rows.T:
            squares += column * column
    norms = np.sqrt(squares)[:, np.newaxis]
    return np.where((norms > 0) & np.isfinite(norms), norms, 1.0)


def _clipped(rows: NDArray[np.float64], most: float) -> NDArray[np.float64]:
    finite = np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, 0.0)
    clipped: NDArray[np.float64] = finite * np.minimum(1.0, most / row_norms(finite))
    return clipped
