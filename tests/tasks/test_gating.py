"""The gate: what chance explains passes, what it does not is rejected, and nobody passes for want of a number."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from fedloop_tasks.evaluation import Measured, Scores
from fedloop_tasks.gating import NOT_FINITE, WORSE, gate
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from numpy.typing import ArrayLike, NDArray

right_or_wrong = st.lists(st.integers(0, 1), min_size=1, max_size=30)
pairs = right_or_wrong.flatmap(
    lambda before: st.tuples(st.lists(st.integers(0, 1), min_size=len(before), max_size=len(before)), st.just(before))
)
losses = st.lists(st.tuples(st.floats(0, 20), st.floats(0, 20), st.integers(0, 200)), min_size=1, max_size=30).filter(
    lambda rows: sum(row[2] for row in rows) > 0
)
margins = st.sampled_from([0.0, 0.02, 0.1, 1.0])


def accuracy(values: ArrayLike) -> Measured:
    scores = Scores.of(values)
    return Measured({"accuracy": scores.mean}, "accuracy", len(scores.values), "e" * 64, scores=scores)


def loss(values: ArrayLike, tokens: ArrayLike) -> Measured:
    scores = Scores.of(values, tokens)
    return Measured({"loss": scores.mean}, "loss", len(scores.values), "e" * 64, higher_is_better=False, scores=scores)


def bare(measured: Measured) -> Measured:
    return replace(measured, scores=None)


def rejected(candidate: Measured, incumbent: Measured, margin: float) -> bool:
    return bool(gate(candidate, incumbent, margin).reason)


# --- what always holds ---------------------------------------------------------------------------------------------------


@given(pairs, margins)
@settings(max_examples=60, deadline=None)
def test_the_gate_rejects_nothing_that_the_bare_difference_would_let_pass(
    pair: tuple[list[int], list[int]], margin: float
) -> None:
    candidate, incumbent = map(accuracy, pair)
    if rejected(candidate, incumbent, margin):
        assert rejected(bare(candidate), bare(incumbent), margin)
    assert gate(candidate, incumbent, margin) == gate(candidate, incumbent, margin)


@given(pairs, margins)
@settings(max_examples=60, deadline=None)
def test_a_candidate_that_is_no_worse_on_any_example_passes(pair: tuple[list[int], list[int]], margin: float) -> None:
    candidate, incumbent = (np.array(each) for each in pair)
    assert not rejected(accuracy(np.maximum(candidate, incumbent)), accuracy(incumbent), margin)


@given(losses, margins, st.floats(0.001, 10))
@settings(max_examples=60, deadline=None)
def test_a_candidate_that_is_worse_than_the_margin_on_every_example_is_rejected(
    rows: list[tuple[float, float, int]], margin: float, more: float
) -> None:
    _, before, tokens = (np.array(each, float) for each in zip(*rows, strict=True))
    candidate, incumbent = loss(before + margin + more, tokens), loss(before, tokens)
    assert gate(candidate, incumbent, margin).reason == WORSE
    assert not rejected(incumbent, candidate, margin), "the other way round it is better"


@given(losses, margins)
@settings(max_examples=60, deadline=None)
def test_less_of_a_loss_is_what_more_of_its_negative_is(rows: list[tuple[float, float, int]], margin: float) -> None:
    now, before, tokens = (np.array(each, float) for each in zip(*rows, strict=True))

    def negative(values: NDArray[np.float64]) -> Measured:
        return replace(loss(-values, tokens), higher_is_better=True)

    verdict = gate(loss(now, tokens), loss(before, tokens), margin)
    assert verdict.reason == gate(negative(now), negative(before), margin).reason


@pytest.mark.parametrize("count", [1, 2, 30])
def test_where_no_example_differs_from_another_the_difference_itself_decides(count: int) -> None:
    ones, zeros = accuracy([1] * count), accuracy([0] * count)
    assert gate(zeros, ones, 0.02).reason == WORSE
    for candidate, incumbent in ((ones, ones), (zeros, zeros), (ones, zeros)):
        assert not rejected(candidate, incumbent, 0.0)
    assert not rejected(zeros, ones, 1.0)


# --- what cannot be compared example by example --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "before", "margin", "reason"),
    [(0.9, 0.8, 0.0, ""), (0.8, 0.8, 0.0, ""), (0.3, 0.32, 0.02, ""), (0.77, 0.8, 0.02, WORSE), (0.799, 0.8, 0.0, WORSE)],
)
def test_without_scores_the_bare_difference_decides_and_the_margin_itself_passes(
    now: float, before: float, margin: float, reason: str
) -> None:
    candidate, incumbent = (Measured({"accuracy": value}, "accuracy", 1000, "e" * 64) for value in (now, before))
    assert gate(candidate, incumbent, margin).reason == reason


def test_scores_on_one_side_alone_or_of_more_examples_leave_the_bare_difference() -> None:
    before = np.arange(30) % 5 != 0
    candidate, incumbent = accuracy(before & (np.arange(30) != 7)), accuracy(before)
    assert candidate.score < incumbent.score - 0.02
    assert not rejected(candidate, incumbent, 0.02), "by chance"
    for one, other in ((bare(candidate), incumbent), (candidate, bare(incumbent)), (candidate, accuracy([*before, *before]))):
        verdict = gate(one, other, 0.02)
        assert verdict.reason == WORSE
        assert "no scores by example" in verdict.detail


def test_evaluations_on_different_sets_are_not_compared() -> None:
    with pytest.raises(ValueError, match="held-out"):
        gate(accuracy([1]), replace(accuracy([1]), dataset_sha256="f" * 64), 0.0)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_rejected_and_gives_way(value: float) -> None:
    broken = loss([value, 1.0], [3, 4])
    assert gate(broken, loss([9.0, 9.0], [3, 4]), 1.0).reason == NOT_FINITE
    assert gate(broken, broken, 1.0).reason == NOT_FINITE
    assert gate(replace(broken, higher_is_better=True), broken, 1.0).reason == NOT_FINITE
    assert not rejected(loss([9.0, 9.0], [3, 4]), broken, 0.0)


def test_the_candidates_leading_metric_decides_also_where_another_one_led_before() -> None:
    candidate = accuracy([1, 0])
    incumbent = Measured({"loss": 1.0, "accuracy": 1.0}, "loss", 2, "e" * 64, scores=Scores.of([1.0, 1.0]))
    assert gate(candidate, incumbent, 0.1).reason == WORSE
    assert not rejected(candidate, replace(incumbent, metrics={"loss": 1.0}), 0.1)


def test_examples_that_weigh_nothing_change_nothing() -> None:
    now, before, tokens = [1.0, 2.0, 3.0], [1.0, 1.0, 1.0], [0, 0, 2]
    assert gate(loss(now, tokens), loss(before, tokens), 0.1).reason == WORSE
    assert not rejected(loss([9.0, 9.0, 1.0], tokens), loss(before, tokens), 0.0)


# --- what chance explains ------------------------------------------------------------------------------------------------


def drawn(seed: int, count: int, worse: float, differ: float = 0.15) -> tuple[Measured, Measured]:
    """A candidate that is truly `worse` by so much than an incumbent of accuracy .8, and differs from it on 15 % of examples."""
    draws = np.random.default_rng([seed, count])
    before = draws.random(count) < 0.8
    lost, won = (differ + worse) / 2, (differ - worse) / 2
    now = np.where(before, draws.random(count) >= lost / 0.8, draws.random(count) < won / 0.2)
    return accuracy(now), accuracy(before)


def share(count: int, worse: float, trials: int, *, scores: bool) -> float:
    """Of so many trials, how many are rejected."""
    found: Iterator[tuple[Measured, Measured]] = (drawn(seed, count, worse) for seed in range(trials))
    return sum(rejected(*(pair if scores else (bare(pair[0]), bare(pair[1]))), 0.02) for pair in found) / trials


@pytest.mark.parametrize("count", [10, 30, 100])
def test_models_as_good_are_seldom_rejected_and_by_the_bare_difference_often(count: int) -> None:
    assert share(count, 0.0, 300, scores=True) <= 0.07
    assert share(count, 0.0, 300, scores=False) >= 0.2


def test_a_model_that_is_clearly_worse_is_rejected() -> None:
    assert share(1000, 0.1, 50, scores=True) == 1.0
    assert share(100, 0.15, 100, scores=True) >= 0.9


def bounds(verdict_detail: str) -> tuple[float, float]:
    low, _, high = verdict_detail.partition("interval ")[2].partition(")")[0].partition(" to ")
    return float(low), float(high)


@pytest.mark.parametrize("count", [1_000, 50_000])
def test_the_interval_is_that_of_the_normal_approximation_on_a_large_set(count: int) -> None:
    draws = np.random.default_rng(1)
    tokens, before = draws.integers(1, 200, count), draws.gamma(2.0, 0.5, count)
    now = before + draws.normal(0.01, 0.3, count)
    difference = before - now
    weights = tokens / tokens.sum()
    mean = float((weights * difference).sum())
    deviation = math.sqrt(float((weights**2 * (difference - mean) ** 2).sum()))
    low, high = bounds(gate(loss(now, tokens), loss(before, tokens), 0.0).detail)
    assert low == pytest.approx(mean - 1.645 * deviation, abs=0.1 * deviation)
    assert high == pytest.approx(mean + 1.645 * deviation, abs=0.1 * deviation)


def test_what_is_decided_and_said_is_the_same_on_every_machine() -> None:
    each = np.arange(1, 41)
    verdict = gate(loss(3 / each, each % 7), loss(2 / each, each % 7), 0.02)
    assert verdict.reason == WORSE
    assert verdict.detail == (
        "loss 0.2728, in force 0.1819: a gain of -0.09095 (90 % interval -0.1211 to -0.06551), at least -0.02 is needed"
    )


def test_what_is_said_fits_into_an_event() -> None:
    wide: Any = {"m" * 80: -123456.789012345}
    candidate = Measured(wide, "m" * 80, 2, "e" * 64, scores=Scores.of([-123456.789012345] * 2))
    incumbent = replace(candidate, metrics={"m" * 80: 987654.321098765}, scores=Scores.of([987654.321098765] * 2))
    verdict = gate(candidate, incumbent, 0.123456789)
    assert verdict.reason == WORSE
    assert len(verdict.detail) <= 200


# --- scores --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "weights"),
    [([1.0], [1.0, 1.0]), ([[1.0]], None), ([], None), ([1.0], [0.0]), ([1.0], [-1.0]), ([1.0, 2.0], [1.0, math.nan])],
)
def test_scores_are_as_many_as_their_weights_which_add_up_to_something(values: list[Any], weights: list[float] | None) -> None:
    with pytest.raises(ValueError, match=r"scores of shape|weights of examples"):
        Scores.of(values, weights)


def test_a_metric_is_what_its_scores_make() -> None:
    assert loss([1.0, 4.0], [3, 1]).score == pytest.approx(1.75)
    with pytest.raises(ValueError, match="make a loss"):
        replace(loss([1.0, 4.0], [3, 1]), metrics={"loss": 2.5})
    with pytest.raises(ValueError, match="make a loss"):
        replace(loss([1.0, 4.0], [3, 1]), scores=Scores.of([1.0, math.nan]))
    with pytest.raises(ValueError, match="2 scores of 3 examples"):
        replace(loss([1.0, 4.0], [3, 1]), examples=3)
    with pytest.raises(ValueError, match="leads, and has no value"):
        replace(loss([1.0, 4.0], [3, 1]), leading="accuracy")
