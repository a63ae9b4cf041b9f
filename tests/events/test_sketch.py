"""Quantiles from counts: within 1% of numpy's, merged or not, by the same bins as the paper's authors' library."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
from ddsketch.mapping import LogarithmicMapping
from fedloop_events import sketch
from hypothesis import example, given
from hypothesis import strategies as st

SECONDS = st.floats(1e-5, 864_000)


@given(st.lists(SECONDS, min_size=1, max_size=200), st.lists(SECONDS, max_size=50), st.floats(0, 1))
@example([0.001, 0.002, 700.0], [], 0.99)
def test_quantiles_of_merged_counts_are_within_one_percent_of_numpys(first: list[float], second: list[float], q: float) -> None:
    merged = Counter(map(sketch.bin_of, first)) + Counter(map(sketch.bin_of, second))
    assert sketch.quantile(merged, q) == pytest.approx(np.quantile([*first, *second], q, method="lower"), rel=0.01 + 1e-9)


@given(SECONDS)
def test_bins_are_those_of_ddsketch(seconds: float) -> None:
    assert abs(sketch.bin_of(seconds) - LogarithmicMapping(0.01).key(seconds)) <= (1 if near_a_bound(seconds) else 0)


def near_a_bound(seconds: float) -> bool:
    return sketch.bin_of(seconds * (1 - 1e-12)) != sketch.bin_of(seconds * (1 + 1e-12))


@pytest.mark.parametrize(
    ("seconds", "number"), [(0.0, sketch.FIRST), (-1.0, sketch.FIRST), (1e-9, sketch.FIRST), (1.0, 0), (1e300, sketch.LAST)]
)
def test_no_time_is_without_a_bin(seconds: float, number: int) -> None:
    assert sketch.bin_of(seconds) == number


def test_a_quantile_of_nothing_is_none() -> None:
    with pytest.raises(ValueError, match="of nothing"):
        sketch.quantile({}, 0.5)
