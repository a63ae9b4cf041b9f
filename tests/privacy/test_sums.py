"""One noisy sum per class has sensitivity clip norm, noise sigma times it, and gives a usable head."""

from __future__ import annotations

import numpy as np
import pytest
from fedloop_events.types import Mechanism
from fedloop_privacy.accounting import MechanismError
from fedloop_privacy.sums import SumsError, class_sums, head_from_sums
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


def test_sums_are_those_of_each_class_when_noise_is_negligible() -> None:
    rows, labels = unit_rows(50, 8, 0), np.arange(50) % 3
    got = class_sums(rows, labels, 4, terms(1e-9))
    want = np.stack([rows[labels == c].sum(axis=0) for c in range(4)])
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, want, atol=1e-6)


def test_one_example_more_moves_the_sums_by_no_more_than_the_clip_norm_under_one_randomness() -> None:
    rows, labels = unit_rows(20, 8, 1) * 100, np.arange(20) % 3
    with_last = class_sums(rows, labels, 3, terms(1.0, clip_norm=0.5), Seeded(7))
    without = class_sums(rows[:-1], labels[:-1], 3, terms(1.0, clip_norm=0.5), Seeded(7))
    assert np.linalg.norm(with_last - without) == pytest.approx(0.5, rel=1e-5)


def test_noise_has_the_standard_deviation_of_the_terms_and_reaches_empty_classes() -> None:
    noise = class_sums(np.zeros((0, 300)), [], 300, terms(2.0, clip_norm=0.5, divisor=4.0), Seeded(8))
    assert noise.std() == pytest.approx(2.0 * 0.5 / 4.0, rel=0.01)


def test_a_row_that_is_not_finite_counts_as_zero() -> None:
    rows = np.array([[np.nan, 1.0], [np.inf, 0.0], [0.0, 1.0], [0.0, 0.0]])
    np.testing.assert_allclose(class_sums(rows, [0, 0, 0, 0], 1, terms(1e-9)), [[0.0, 1.0]], atol=1e-6)


@pytest.mark.parametrize(
    ("rows", "labels"),
    [(np.zeros((2, 3)), [0]), (np.zeros(3), [0, 1, 0]), (np.zeros((1, 3)), [2]), (np.zeros((1, 3)), [-1])],
)
def test_embeddings_and_labels_that_do_not_fit_are_refused(rows: NDArray[np.float64], labels: list[int]) -> None:
    with pytest.raises(SumsError):
        class_sums(rows, labels, 2, terms(1.0))


@pytest.mark.parametrize("wrong", [terms(1.0, steps=2), terms(1.0, sampling_rate=0.5)])
def test_terms_that_are_not_one_release_of_everything_are_refused(wrong: Mechanism) -> None:
    with pytest.raises(SumsError, match="one release"):
        class_sums(np.zeros((1, 3)), [0], 2, wrong)


def test_terms_without_noise_are_refused() -> None:
    with pytest.raises(MechanismError):
        class_sums(np.zeros((1, 3)), [0], 2, terms(0.0))


def test_head_rows_have_the_scale_and_zero_rows_stay_zero() -> None:
    head = head_from_sums([[3.0, 4.0], [0.0, 0.0], [1e-30, 0.0], [np.nan, 1.0]], scale=7.0)
    np.testing.assert_allclose(head, [[4.2, 5.6], [0.0, 0.0], [7.0, 0.0], [0.0, 0.0]], rtol=1e-6)


def test_head_from_sums_classifies_what_the_sums_were_made_of() -> None:
    centres = unit_rows(5, 16, 2)
    labels = np.arange(500) % 5
    rows = centres[labels] + 0.05 * unit_rows(500, 16, 3)
    head = head_from_sums(class_sums(rows, labels, 5, terms(2.0), Seeded(9)))
    assert ((rows @ head.T).argmax(axis=1) == labels).mean() > 0.95
