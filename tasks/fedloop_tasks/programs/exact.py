"""Adapter training whose merge loses nothing: what the factors of one rank cannot hold is kept in fixed ones (see `factors`).

`stack` is FLoRA (Wang et al. 2024, arXiv 2409.05976): the devices' weighted products become fixed, stacked, and the adapter
begins anew. `residual` is FedEx-LoRA (Singhal et al. 2024, arXiv 2410.09432): both factors are averaged, and what the mean of the
products is more than the product of the means becomes fixed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from fedloop_events.blobs.tensors import Array, TensorSpec
from fedloop_events.types import RoundOpened

from fedloop_tasks.linalg.lowrank import Products
from fedloop_tasks.programs import factors
from fedloop_tasks.programs.adapter import AdapterTraining
from fedloop_tasks.programs.factors import FIXED
from fedloop_tasks.programs.svd import smaller_ranks
from fedloop_tasks.task import Arrays


class ExactTraining(AdapterTraining):
    """As `fedavg` on the device. The rank of the fixed factors grows with each update, up to that of the matrix: from there on
    one of them is the sum, the other one the identity."""

    def __init__(self, name: str, *, begins_anew: bool) -> None:
        super().__init__(name, freezes_a=False)
        self._begins_anew = begins_anew
        self.combines = stacked if begins_anew else averaged

    def smaller(self, opened: RoundOpened, base: Arrays) -> list[list[TensorSpec]]:
        """A mean of factors of different ranks would be one of components that have nothing to do with each other."""
        return smaller_ranks(self.specs(opened, base)) if self._begins_anew else []

    def apply(self, opened: RoundOpened, base: Arrays, combined: Arrays) -> dict[str, Array]:
        trained = {name: combined.get(name, values) for name, values in base.items() if not factors.is_fixed(name)}
        names = [f"{name}{FIXED}.{factor}" for name in factors.pairs(list(trained)) for factor in "AB"]
        fixed = {name: values for name in names if (values := combined.get(name, base.get(name))) is not None}
        return trained | fixed

    def largest(self, base: Arrays) -> dict[str, Array]:
        made = {name: values for name, values in base.items() if not factors.is_fixed(name)}
        for name in factors.pairs(list(made)):
            out, into = len(base[name + ".B"]), base[name + ".A"].shape[1]
            for factor, shape in (("A", (min(out, into), into)), ("B", (out, min(out, into)))):
                made[f"{name}{FIXED}.{factor}"] = np.broadcast_to(np.zeros((), base[name + ".A"].dtype), shape)
        return made


def stacked(opened: RoundOpened, base: Arrays, mean: Arrays, updates: Iterable[tuple[Arrays, float]]) -> dict[str, Array]:
    """See `Combine`. Tensors that are no factor of an adapter are averaged. A is drawn anew, as that of a first release is, by
    the round's number, and B is zero.

    Memory: two times the updates' adapters and the fixed factors together, or the products where those are smaller.
    """
    sums = _fixed(opened, base)
    for arrays, share in updates:
        for name, each in sums.items():
            each.add(arrays[name + ".B"].astype(np.float64) * share, arrays[name + ".A"].astype(np.float64))
    random = np.random.Generator(np.random.PCG64(opened.number))
    combined = dict(mean)
    for name in sums:
        a, b = mean[name + ".A"], mean[name + ".B"]
        combined[name + ".A"] = np.asarray((2 * random.random(a.shape) - 1) / math.sqrt(a.shape[1]), a.dtype)
        combined[name + ".B"] = np.zeros_like(b)
    return combined | _as_factors(sums, mean)


def averaged(opened: RoundOpened, base: Arrays, mean: Arrays, updates: Iterable[tuple[Arrays, float]]) -> dict[str, Array]:
    """See `Combine`. All are averaged. The mean of B A, less the product of the means, is that of (B - mean B) (A - mean A).
    Memory as for `stacked`."""
    sums = _fixed(opened, base)
    centre = {name: values.astype(np.float64) for name, values in mean.items()}
    for arrays, share in updates:
        for name, each in sums.items():
            b, a = (arrays[key].astype(np.float64) - centre[key] for key in (name + ".B", name + ".A"))
            each.add(b * share, a)
    return dict(mean) | _as_factors(sums, mean)


def _fixed(opened: RoundOpened, base: Arrays) -> dict[str, Products]:
    """What is fixed in the base, by the adapters that the round trains."""
    found = {}
    for name in factors.pairs(opened.upload):
        found[name] = Products(len(base[name + ".B"]), base[name + ".A"].shape[1])
        if (before := base.get(f"{name}{FIXED}.B")) is not None:
            found[name].add(before.astype(np.float64), base[f"{name}{FIXED}.A"].astype(np.float64))
    return found


def _as_factors(sums: dict[str, Products], like: Arrays) -> dict[str, Array]:
    made: dict[str, Array] = {}
    for name, each in sums.items():
        left, right = each.factors()
        if len(right):
            dtype = like[name + ".A"].dtype
            made |= {f"{name}{FIXED}.A": right.astype(dtype), f"{name}{FIXED}.B": left.astype(dtype)}
    return made
