"""A classifier head from one noisy sum of embeddings per class: the first release of a private run.

The head is the normalised sums; no training is needed, and under DP it is worth as much as eight rounds of DP-SGD.
"""

from __future__ import annotations

import numpy as np
from fedloop_events.errors import FedloopError
from fedloop_events.types import Mechanism
from numpy.typing import ArrayLike, NDArray

from fedloop_privacy.accounting import validate
from fedloop_privacy.noise import SYSTEM, RandomSource, gaussian

HEAD_SCALE = 7.0
"""Norm of a head's rows; 5 and 10 do as well."""


class SumsError(FedloopError):
    """Embeddings, labels or terms of which no sum with a bounded sensitivity can be made."""


def class_sums(
    embeddings: ArrayLike, labels: ArrayLike, classes: int, terms: Mechanism, source: RandomSource = SYSTEM
) -> NDArray[np.float32]:
    """The sum of embeddings [n, d] of each class, divided by `terms.divisor` and with noise: float32 [classes, d].

    Each row is clipped to L2 norm `terms.clip_norm`, so one example more or less moves one row of the sums by no more than
    that, and N(0, (noise_multiplier x clip_norm)^2) is added to every coordinate in float64: one Gaussian mechanism, whatever
    the classes. A row that is not finite counts as zero. `n` may be 0.

    Raises SumsError unless embeddings are [n, d], labels n whole numbers in [0, classes), and `terms` one step at sampling
    rate 1; MechanismError for terms out of range.
    """
    validate(terms)
    if terms.steps != 1 or terms.sampling_rate != 1:
        raise SumsError(f"class sums are one release of all examples, not {terms.steps} steps at rate {terms.sampling_rate:g}")
    rows, of_class = np.asarray(embeddings, dtype=np.float64), np.asarray(labels, dtype=np.int64)
    if rows.ndim != 2 or of_class.shape != rows.shape[:1]:
        raise SumsError(f"embeddings must be [n, d] and labels [n], not {list(rows.shape)} and {list(of_class.shape)}")
    if of_class.size and not (of_class.min() >= 0 and of_class.max() < classes):
        raise SumsError(f"labels must be in [0, {classes})")
    total = np.zeros((classes, rows.shape[1]))
    np.add.at(total, of_class, _clipped(rows, terms.clip_norm))
    noise = gaussian(total.shape, terms.noise_multiplier * terms.clip_norm, source)
    return ((total + noise) / terms.divisor).astype(np.float32)


def head_from_sums(total: ArrayLike, scale: float = HEAD_SCALE) -> NDArray[np.float32]:
    """The rows of `total` [classes, d], each scaled to norm `scale`; a row of zeros, or one that is not finite, becomes
    zeros."""
    rows = np.asarray(total, dtype=np.float64)
    return (_clipped(rows, np.inf) / _norms(rows) * scale).astype(np.float32)


def _clipped(rows: NDArray[np.float64], most: float) -> NDArray[np.float64]:
    finite = np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, 0.0)
    norms = _norms(finite)
    clipped: NDArray[np.float64] = finite * np.minimum(1.0, most / norms)
    return clipped


def _norms(rows: NDArray[np.float64]) -> NDArray[np.float64]:
    """Norms [n, 1], 1 where the row is zero or not finite; column by column, so that no machine adds in another order."""
    squares = np.zeros(len(rows))
    with np.errstate(invalid="ignore", over="ignore"):
        for column in rows.T:
            squares += column * column
    norms = np.sqrt(squares)[:, np.newaxis]
    return np.where((norms > 0) & np.isfinite(norms), norms, 1.0)
