"""What a release is worth on the server's held-out set, and what that figure is made of, example by example."""

from __future__ import annotations

import math
from typing import Final

import numpy as np
from fedloop_events.blobs.tensors import Array
from msgspec import Struct
from numpy.typing import ArrayLike, NDArray

_CLOSE: Final = 1e-4
"""Relative: a model may have made the metric in float32, and in another order."""


class Scores(Struct, frozen=True, eq=False):
    """What a metric is made of: example i of the held-out set scores `values[i]` and counts `weights[i]`, float64 [n] each.

    The metric is sum(values * weights) / sum(weights): for accuracy 0 or 1, and 1; for the loss per token an answer's mean loss,
    and its tokens. The examples are in the set's order, so that two releases' scores can be compared one by one.
    """

    values: NDArray[np.float64]
    weights: NDArray[np.float64]

    @classmethod
    def of(cls, values: ArrayLike, weights: ArrayLike | None = None) -> Scores:
        """Each example counts the same, unless `weights` say otherwise. Raises ValueError unless it is two lists of numbers as
        long as each other, the weights finite, none below 0, and together above 0."""
        scores = np.array(values, dtype=np.float64)
        counts = np.ones(scores.shape) if weights is None else np.array(weights, dtype=np.float64)
        if scores.ndim != 1 or scores.shape != counts.shape:
            raise ValueError(f"scores of shape {scores.shape} and weights of shape {counts.shape} are of no list of examples")
        if not np.isfinite(counts).all() or (counts < 0).any() or not counts.sum() > 0:
            raise ValueError("the weights of examples are finite numbers, none below 0, and not all 0")
        return cls(scores, counts)

    @property
    def mean(self) -> float:
        """The metric; NaN if a value is."""
        with np.errstate(all="ignore"):
            return float((self.values * self.weights).sum() / self.weights.sum())

    def arrays(self) -> dict[str, Array]:
        """As they are stored."""
        return {"values": self.values, "weights": self.weights}


class Measured(Struct, frozen=True, eq=False):
    """Named metrics of a release on the held-out set of `examples` examples; `leading` names the one that decides.

    A metric may be NaN or infinite: that of a model which training has ruined. `scores` are those of the leading one. Raises
    ValueError if it is not among the metrics, or is not what its scores make.
    """

    metrics: dict[str, float]
    leading: str
    examples: int
    dataset_sha256: str
    higher_is_better: bool = True
    """Of the leading metric: more is better for accuracy, less for a loss."""
    scores: Scores | None = None

    def __post_init__(self) -> None:
        if self.leading not in self.metrics:
            raise ValueError(f"the metric {self.leading} leads, and has no value")
        if self.scores is None:
            return
        if len(self.scores.values) != self.examples:
            raise ValueError(f"there are {len(self.scores.values):,} scores of {self.examples:,} examples")
        mean = self.scores.mean
        if math.isfinite(self.score) and not math.isclose(mean, self.score, rel_tol=_CLOSE, abs_tol=_CLOSE * 1e-2):
            raise ValueError(f"the scores make a {self.leading} of {mean}, not of {self.score}")

    @property
    def score(self) -> float:
        """The leading metric's value."""
        return self.metrics[self.leading]
