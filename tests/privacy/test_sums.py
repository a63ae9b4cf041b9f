"""One noisy sum per group has sensitivity clip norm, and noise sigma times it."""

from __future__ import annotations

import numpy as np
import pytest
from fedloop_events.types import Mechanism
from fedloop_privacy.dp.accounting import MechanismError
from fedloop_privacy.dp.sums import SumsError, group_sums
from numpy.typing import NDArray


class Seeded:
    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def uniform53(self, n: int) -> NDArray[np.float64]:
        return self._rng.random(n)


def terms(noise_multiplier: float, clip_norm: float = 1.0, divisor: float = 1.0, **other: float) -> Mechanism:
    return Mechanism(
        sampling_rate=other.get("sampling_rate", 1.0),
        noise_multiplier=noise_multiplier,
        clip_norm=clip_norm,
        steps=int(other.get("steps", 1)),
        divisor=divisor,
    )


def unit_rows(n: int, d: int, seed: int) -> NDArray[np.float64]:
    rows = np.random.default_rng(seed).normal(size=(n, d))
    unit: NDArray[np.float64] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


def test_sums_are_those_of_each_group_when_noise_is_negligible() -> None:
    rows, groups = unit_rows(50, 8, 0), np.arange(50) % 3
    got = group_sums(rows, groups, 4, terms(1e-9))
    want = np.stack([rows[groups == c].sum(axis=0) for c in range(4)])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_one_example_more_moves_the_sums_by_no_more_than_the_clip_norm_under_one_randomness() -> None:
    rows, groups = unit_rows(20, 8, 1) * 100, np.arange(20) % 3
    with_last = group_sums(rows, groups, 3, terms(1.0, clip_norm=0.5), Seeded(7))
    without = group_sums(rows[:-1], groups[:-1], 3, terms(1.0, clip_norm=0.5), Seeded(7))
    assert np.linalg.norm(with_last - without) == pytest.approx(0.5, rel=1e-5)


def test_noise_has_the_standard_deviation_of_the_terms_and_reaches_empty_groups() -> None:
    noise = group_sums(np.zeros((0, 300)), [], 300, terms(2.0, clip_norm=0.5, divisor=4.0), Seeded(8))
    assert noise.std() == pytest.approx(2.0 * 0.5 / 4.0, rel=0.01)


def test_a_row_that_is_not_finite_counts_as_zero() -> None:
    rows = np.array([[np.nan, 1.0], [np.inf, 0.0], [0.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(group_sums(rows, [0, 0, 0, 0], 1, terms(1e-9)), [[0.0, 1.0]], atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "groups"),
    [(np.zeros((2, 3)), [0]), (np.zeros(3), [0, 1, 0]), (np.zeros((1, 3)), [2]), (np.zeros((1, 3)), [-1])],
)
def test_rows_and_groups_that_do_not_fit_are_refused(rows: NDArray[np.float64], groups: list[int]) -> None:
    with pytest.raises(SumsError):
        group_sums(rows, groups, 2, terms(1.0))


@pytest.mark.parametrize("wrong", [terms(1.0, steps=2), terms(1.0, sampling_rate=0.5)])
def test_terms_that_are_not_one_release_of_everything_are_refused(wrong: Mechanism) -> None:
    with pytest.raises(SumsError, match="one release"):
        group_sums(np.zeros((1, 3)), [0], 2, wrong)


def test_terms_without_noise_are_refused() -> None:
    with pytest.raises(MechanismError):
        group_sums(np.zeros((1, 3)), [0], 2, terms(0.0))
