"""A release's tensors by their names: the factors of adapters, A [r, in] and B [out, r], and updates that hold a part of them.

Beside the factors that are trained an adapter may have fixed ones, of a rank of their own: `<adapter>.fixed.A` and `.fixed.B`.
The model adds their product to the adapter's, scaled like it; they come with the release, and are neither trained nor uploaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

import numpy as np
from fedloop_events.blobs.tensors import Array, TensorSpec
from msgspec.structs import replace

FIXED: Final = ".fixed"


def pairs(names: Sequence[str]) -> list[str]:
    """The adapters of which both factors are among the names, those that are fixed apart."""
    known = set(names)
    return [name[:-2] for name in names if name.endswith(".A") and not is_fixed(name) and name[:-2] + ".B" in known]


def is_fixed(name: str) -> bool:
    return name[:-2].endswith(FIXED) and name.endswith((".A", ".B"))


def whole(arrays: Mapping[str, Array], name: str) -> tuple[Array, Array]:
    """A and B of an adapter, the fixed components after those that are trained."""
    a, b, fixed = arrays[name + ".A"], arrays[name + ".B"], name + FIXED
    if fixed + ".A" not in arrays:
        return a, b
    return np.concatenate([a, arrays[fixed + ".A"]]), np.concatenate([b, arrays[fixed + ".B"]], axis=1)


def of_rank(specs: Sequence[TensorSpec], rank: int) -> list[TensorSpec]:
    """An update in which of every adapter the first `rank` components are: rows of A, columns of B."""
    made = []
    adapters = set(pairs([each.name for each in specs]))
    for each in specs:
        if each.name[:-2] in adapters:
            out, into = each.shape
            each = replace(each, shape=(rank, into) if each.name.endswith(".A") else (out, rank))
        made.append(each)
    return made
