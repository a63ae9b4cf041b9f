"""Class sums give a usable head."""

from __future__ import annotations

import numpy as np
from fedloop_events.types import Mechanism
from fedloop_privacy.dp.sums import group_sums
from fedloop_tasks.programs.class_sums import head_from_sums
from numpy.typing import NDArray


def test_head_rows_have_the_scale_and_zero_rows_stay_zero() -> None:
    head = head_from_sums([[3.0, 4.0], [0.0, 0.0], [1e-30, 0.0], [np.nan, 1.0]], scale=7.0)
    np.testing.assert_allclose(head, [[4.2, 5.6], [0.0, 0.0], [7.0, 0.0], [0.0, 0.0]], rtol=1e-6)


def unit_rows(n: int, d: int, seed: int) -> NDArray[np.float64]:
    rows = np.random.default_rng(seed).normal(size=(n, d))
    unit: NDArray[np.float64] = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    return unit


NOISY = Mechanism(sampling_rate=1.0, noise_multiplier=2.0, clip_norm=1.0, steps=1, divisor=1.0)


def test_head_from_sums_classifies_what_the_sums_were_made_of() -> None:
    centres, noise = unit_rows(5, 16, 2), unit_rows(500, 16, 3)
    labels = np.arange(500) % 5
    rows = centres[labels] + 0.05 * noise
    head = head_from_sums(group_sums(rows, labels, 5, NOISY))
    assert ((rows @ head.T).argmax(axis=1) == labels).mean() > 0.95
