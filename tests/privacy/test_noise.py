"""Noise has the distribution it claims, comes from the operating system, and never fails at the ends of its range."""

from __future__ import annotations

import os

import numpy as np
import pytest
from fedloop_privacy.dp.noise import NoiseError, SystemSource, gaussian, poisson_sample
from numpy.typing import NDArray
from scipy import stats


class Seeded:
    """A known sequence, so that no statistical test can fail by chance."""

    def __init__(self, seed: int) -> None:
        self._rng = np.random.default_rng(seed)

    def uniform53(self, n: int) -> NDArray[np.float64]:
        return self._rng.random(n)


class Constant:
    def __init__(self, value: float) -> None:
        self._value = value

    def uniform53(self, n: int) -> NDArray[np.float64]:
        return np.full(n, self._value)


LAST = 1 - 2.0**-53


def test_gaussian_is_normal_with_the_standard_deviation_asked_for() -> None:
    draws = gaussian((400, 501), 2.5, Seeded(1)).ravel()
    assert stats.kstest(draws, "norm", args=(0.0, 2.5)).pvalue > 0.01
    assert abs(draws.std() / 2.5 - 1) < 0.005
    assert abs(float(stats.kurtosis(draws))) < 0.05


def test_gaussian_draws_are_independent_of_each_other() -> None:
    draws = gaussian(200_000, 1.0, Seeded(2))
    for lag in (1, 2, 100_000):  # Box and Muller's pairs stand half a block apart
        assert abs(np.corrcoef(draws[:-lag], draws[lag:])[0, 1]) < 0.01
        assert abs(np.corrcoef(draws[:-lag] ** 2, draws[lag:] ** 2)[0, 1]) < 0.01


def test_each_gaussian_draw_sums_four_normals() -> None:
    source = Seeded(3)
    counted = 0

    class Counting:
        def uniform53(self, n: int) -> NDArray[np.float64]:
            nonlocal counted
            counted += n
            return source.uniform53(n)

    gaussian(1000, 1.0, Counting())
    assert counted == 4 * 1000


@pytest.mark.parametrize("shape", [0, 1, 7, (), (3, 0), (2, 3, 5)])
def test_gaussian_has_the_shape_asked_for(shape: int | tuple[int, ...]) -> None:
    draws = gaussian(shape, 1.0)
    assert draws.shape == ((shape,) if isinstance(shape, int) else shape)
    assert draws.dtype == np.float64


@pytest.mark.parametrize("value", [0.0, 0.5, LAST])
def test_gaussian_is_finite_at_the_ends_of_the_uniform_range(value: float) -> None:
    assert np.isfinite(gaussian(9, 1.0, Constant(value))).all()


def test_zero_standard_deviation_gives_zeros() -> None:
    assert not gaussian(10, 0.0).any()


@pytest.mark.parametrize("std", [-1.0, float("nan"), float("inf")])
def test_a_standard_deviation_that_no_draw_can_honour_is_refused(std: float) -> None:
    with pytest.raises(NoiseError, match="standard deviation"):
        gaussian(3, std)


def test_poisson_sampling_takes_each_example_independently_at_its_rate() -> None:
    source = Seeded(4)
    taken = np.zeros((2000, 50))
    for row in taken:
        row[poisson_sample(50, 0.3, source)] = 1
    assert np.abs(taken.mean(axis=0) - 0.3).max() < 0.04
    sizes = taken.sum(axis=1)
    assert abs(sizes.mean() - 15) < 0.3
    assert abs(sizes.var() / (50 * 0.3 * 0.7) - 1) < 0.1  # shuffled batches of fixed size have variance 0


def test_poisson_sampling_compares_strictly_so_that_rate_one_takes_all_and_the_rate_is_exact() -> None:
    assert poisson_sample(5, 1.0, Constant(LAST)).tolist() == [0, 1, 2, 3, 4]
    assert poisson_sample(5, 0.25, Constant(0.25)).tolist() == []
    assert poisson_sample(5, 0.25, Constant(0.25 - 2.0**-53)).tolist() == [0, 1, 2, 3, 4]


def test_poisson_sample_of_nobody_is_empty() -> None:
    assert poisson_sample(0, 0.5).tolist() == []


@pytest.mark.parametrize(("n", "rate"), [(5, 0.0), (5, 1.5), (5, float("nan")), (-1, 0.5)])
def test_a_sampling_rate_that_no_draw_can_honour_is_refused(n: int, rate: float) -> None:
    with pytest.raises(NoiseError, match="rate"):
        poisson_sample(n, rate)


def test_system_source_gives_exact_53_bit_values_below_one() -> None:
    draws = SystemSource().uniform53(4096)
    words = (draws * 2.0**53).astype(np.uint64)
    assert (words.astype(np.float64) * 2.0**-53 == draws).all()
    assert words.max() < 2**53
    assert np.bitwise_or.reduce(words) == 2**53 - 1  # every bit is 1 somewhere and 0 somewhere: fails once in 2^4090
    assert np.bitwise_and.reduce(words) == 0


def test_default_randomness_is_the_operating_systems(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "urandom", lambda size: b"\xff" * size)
    assert poisson_sample(3, 1.0).tolist() == [0, 1, 2]
    assert (gaussian(4, 1.0) == gaussian(4, 1.0)).all()
    monkeypatch.undo()
    assert (gaussian(4, 1.0) != gaussian(4, 1.0)).all()
