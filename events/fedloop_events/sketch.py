"""Quantiles of times that many devices measured, from counts that merge by addition.

DDSketch (Masson, Rim, Lee 2019, "DDSketch: A Fast and Fully-Mergeable Quantile Sketch with Relative-Error Guarantees", PVLDB
12(12), sections 2.1 and 2.2) with a relative error of 1%: bin i holds the seconds in (g ** (i - 1), g ** i], g = 1.01 / 0.99.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Final

_GAMMA: Final = 1.01 / 0.99
_LOG_GAMMA: Final = math.log(_GAMMA)
FIRST: Final = math.ceil(math.log(1e-6) / _LOG_GAMMA)
LAST: Final = -FIRST
"""A microsecond and 11 days, so that a sketch has fewer than 1,400 bins. What is shorter or longer is taken for that."""


def bin_of(seconds: float) -> int:
    """The bin of a time; one that is not above 0 is in the first."""
    return clamped(math.ceil(math.log(seconds) / _LOG_GAMMA)) if seconds > 0 else FIRST


def clamped(number: int) -> int:
    """The bin that stands for a number that somebody else claims to be one."""
    return min(max(number, FIRST), LAST)


def quantile(bins: Mapping[int, int], q: float) -> float:
    """The `q` quantile in seconds, within 1% of the value of that rank (numpy's method "lower"). `bins` count one or more."""
    rank, passed = math.floor(q * (sum(bins.values()) - 1)), 0
    for number in sorted(bins):
        passed += bins[number]
        if passed > rank:
            return float(2 * _GAMMA**number / (_GAMMA + 1))
    raise ValueError("a quantile of nothing")
