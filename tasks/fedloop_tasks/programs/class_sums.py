"""Class sums: a classifier's head from one noisy sum of embeddings per class, the first release of a private run.

The head is the normalised sums; no training is needed, and under DP it is worth as much as eight rounds of DP-SGD.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, Literal, NamedTuple, Protocol

import numpy as np
from fedloop_events.blobs.tensors import Array, TensorSpec
from fedloop_events.errors import TensorError
from fedloop_events.types import RoundOpened
from fedloop_privacy.dp.sums import group_sums, row_norms
from numpy.typing import ArrayLike, NDArray

from fedloop_tasks.task import Arrays, TermsError

NAME: Final = "sums"
"""The program, and the one tensor of its updates."""
HEAD, BIAS = "head.weight", "head.bias"
HEAD_SCALE: Final = 7.0
"""Norm of a head's rows where a round names none; 5 and 10 do as well."""


class Embedded(NamedTuple):
    """Unit vectors [n, d], the number of each one's class, and how many classes there are."""

    rows: NDArray[np.float32]
    of_class: NDArray[np.int64]
    classes: int


class Embeds(Protocol):
    """What class sums ask of a model."""

    def embedded(self, examples: Any) -> Embedded:
        """The examples whose class is one of the model's."""


class ClassSums:
    """Each device uploads the sum of the embeddings of each class [classes, d]; their total becomes the head."""

    name = NAME
    kind: Literal["sums", "train"] = "sums"
    combines: Literal["sum", "mean"] = "sum"
    from_base = False

    def upload(self, release: Sequence[str]) -> list[str]:
        return [NAME]

    def specs(self, opened: RoundOpened, base: Arrays) -> list[TensorSpec]:
        if HEAD not in base:
            raise TensorError(f"the base release has no {HEAD}")
        return [TensorSpec(NAME, "F32", base[HEAD].shape)]

    def smaller(self, opened: RoundOpened, base: Arrays) -> list[list[TensorSpec]]:
        return []

    def largest(self, base: Arrays) -> Arrays:
        return base

    def compute(self, model: Embeds, examples: Sequence[Any], opened: RoundOpened) -> dict[str, Array]:
        """See `Program`; raises `SumsError` for a mechanism that is not one release of everything."""
        if opened.upload != [NAME]:
            raise TermsError(f"a round of sums has one tensor, {NAME!r}, to upload")
        rows, of_class, classes = model.embedded(examples)
        if opened.mechanism is not None:
            return {NAME: group_sums(rows, of_class, classes, opened.mechanism)}
        total = np.zeros((classes, rows.shape[1]))
        np.add.at(total, of_class, rows.astype(np.float64))
        return {NAME: total.astype(np.float32)}

    def apply(self, opened: RoundOpened, base: Arrays, combined: Arrays) -> dict[str, Array]:
        """The head has rows of the round's hyperparameter `head_scale`, its bias is zero."""
        head = head_from_sums(combined[NAME], opened.hyperparameters.get("head_scale", HEAD_SCALE))
        return dict(base) | {HEAD: head, BIAS: np.zeros_like(base[BIAS])}


def head_from_sums(total: ArrayLike, scale: float = HEAD_SCALE) -> NDArray[np.float32]:
    """The rows of `total` [classes, d], each scaled to norm `scale`; a row of zeros, or one that is not finite, becomes
    zeros."""
    rows = np.asarray(total, dtype=np.float64)
    finite = np.where(np.isfinite(rows).all(axis=1, keepdims=True), rows, 0.0)
    head: NDArray[np.float32] = (finite / row_norms(rows) * scale).astype(np.float32)
    return head
