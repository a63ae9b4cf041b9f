"""Adapter training whose products are averaged, not their factors: FlexLoRA (Bai et al. 2024, arXiv 2402.11505).

The mean of B and the mean of A multiply to something else than the mean of what the devices trained. Here the weighted mean of
their products B A is taken, and the release gets its best approximation of the adapter's rank.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Final

import numpy as np
from fedloop_events.blobs.tensors import Array, TensorSpec
from fedloop_events.types import RoundOpened

from fedloop_tasks.linalg.lowrank import Products
from fedloop_tasks.programs import factors
from fedloop_tasks.programs.adapter import AdapterTraining
from fedloop_tasks.task import Arrays

ROW_NORM: Final = 1 / math.sqrt(3)
"""Of A's rows in a release: that of a first release's, uniform on +-1/sqrt(in). B has the singular values, divided by this."""


class SvdTraining(AdapterTraining):
    """As `fedavg` on the device. A device may train the first components of the adapters alone: those of a release are ordered,
    the most important first."""

    def __init__(self, name: str) -> None:
        super().__init__(name, freezes_a=False)
        self.combines = best_factors

    def smaller(self, opened: RoundOpened, base: Arrays) -> list[list[TensorSpec]]:
        return smaller_ranks(self.specs(opened, base))


def smaller_ranks(specs: list[TensorSpec]) -> list[list[TensorSpec]]:
    """What updates of all ranks below that of the adapters hold, the largest first; none where only one factor is uploaded, or
    ranks differ."""
    adapters = factors.pairs([each.name for each in specs])
    ranks = {each.shape[0] for each in specs if each.name.endswith(".A")}
    single = [each.name for each in specs if each.name.endswith((".A", ".B")) and each.name[:-2] not in adapters]
    if len(ranks) != 1 or single:
        return []
    return [factors.of_rank(specs, rank) for rank in range(ranks.pop() - 1, 0, -1)]


def best_factors(opened: RoundOpened, base: Arrays, mean: Arrays, updates: Iterable[tuple[Arrays, float]]) -> dict[str, Array]:
    """See `Combine`. Tensors that are no factor of an adapter are averaged.

    Where the products have a smaller rank than the adapter, B has columns of zeros and A the base's rows, so that what is left
    can be trained. Memory: two times the updates' adapters together, or the products where those are smaller.
    """
    products = {name: Products(mean[name + ".B"].shape[0], mean[name + ".A"].shape[1]) for name in factors.pairs(opened.upload)}
    for arrays, share in updates:
        for name, each in products.items():
            each.add(arrays[name + ".B"].astype(np.float64) * share, arrays[name + ".A"].astype(np.float64))
    combined = dict(mean)
    for name, each in products.items():
        before, dtype = base[name + ".A"], mean[name + ".A"].dtype
        left, right = each.best(len(before))
        empty = np.logical_not(right.any(axis=1))
        combined[name + ".A"] = np.where(empty[:, None], before, right * ROW_NORM).astype(dtype)
        combined[name + ".B"] = (left / ROW_NORM).astype(dtype)
    return combined
