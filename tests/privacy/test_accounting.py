"""Epsilon agrees with an independent accountant, never falls below the truth, and calibration never exceeds its target."""

from __future__ import annotations

import math
import time

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from fedloop_events.types import Mechanism
from fedloop_privacy.dp import accounting
from fedloop_privacy.dp.accounting import (
    EPSILON_ERROR,
    BudgetTooSmallError,
    MechanismError,
    epsilon,
    noise_multiplier_for,
    validate,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import norm

DELTA = 1e-5


def mechanism(
    sampling_rate: float, noise_multiplier: float, steps: int, clip_norm: float = 1.0, divisor: float = 1.0
) -> Mechanism:
    return Mechanism(
        sampling_rate=sampling_rate,
        noise_multiplier=noise_multiplier,
        clip_norm=clip_norm,
        steps=steps,
        divisor=divisor,
    )


def pld(mechanisms: list[Mechanism], delta: float) -> float:
    """Google's privacy loss distributions: another method, other code."""
    accountant = PLDAccountant(value_discretization_interval=2e-4)
    for m in mechanisms:
        step = dp_event.PoissonSampledDpEvent(m.sampling_rate, dp_event.GaussianDpEvent(m.noise_multiplier))
        accountant.compose(dp_event.SelfComposedDpEvent(step, m.steps))
    return float(accountant.get_epsilon(delta))


MIXES = {
    "n=1000 B=32": ([mechanism(0.032, 0.8, 320)], 1e-5),
    "sums then DP-SGD": ([mechanism(1.0, 1.08, 1), mechanism(0.1, 0.94, 70)], 1e-5),
    "three rounds, three terms": ([mechanism(0.1, 1.0, 10), mechanism(0.2, 1.5, 15), mechanism(0.05, 0.7, 20)], 1e-6),
    "small": ([mechanism(0.01, 2.0, 100)], 1e-5),
    "little noise": ([mechanism(0.1, 0.4, 5)], 1e-5),
    "nearly all sampled": ([mechanism(0.999, 3.0, 10)], 1e-5),
}


@pytest.mark.parametrize("name", MIXES)
def test_epsilon_agrees_with_another_accountant(name: str) -> None:
    mechanisms, delta = MIXES[name]
    truth = pld(mechanisms, delta)
    assert truth - 2e-3 <= epsilon(mechanisms, delta) <= truth + 2 * EPSILON_ERROR


def test_epsilon_gives_the_published_figures() -> None:
    mixed, _ = MIXES["n=1000 B=32"]
    assert epsilon(mixed, DELTA) == pytest.approx(6.13, abs=0.005)
    assert pld(mixed, DELTA) == pytest.approx(6.12, abs=0.005)


def test_rounds_are_composed_jointly_and_not_added_up() -> None:
    one = mechanism(0.1, 1.0, 10)
    assert epsilon([one] * 8, DELTA) < 0.5 * 8 * epsilon([one], DELTA)


@pytest.mark.parametrize("noise_multiplier", [0.3, 1.0, 5.0, 50.0])
def test_one_gaussian_release_is_exact_by_balle_and_wang(noise_multiplier: float) -> None:
    eps = epsilon([mechanism(1.0, noise_multiplier, 1)], DELTA)
    s = noise_multiplier
    delta = norm.cdf(0.5 / s - eps * s) - math.exp(eps) * norm.cdf(-0.5 / s - eps * s)
    assert delta == pytest.approx(DELTA, rel=1e-6)
    assert delta <= DELTA


def test_gaussians_compose_to_one() -> None:
    together = epsilon([mechanism(1.0, 2.0, 4)], DELTA)
    assert together == pytest.approx(epsilon([mechanism(1.0, 1.0, 1)], DELTA), abs=1e-6)
    apart = epsilon([mechanism(1.0, 2.0, 1), mechanism(1.0, 2.0, 1), mechanism(1.0, 1.0, 1)], DELTA)
    assert apart == pytest.approx(epsilon([mechanism(1.0, 1.5**-0.5, 1)], DELTA), abs=1e-6)


def test_nothing_spent_costs_nothing_and_order_does_not_matter() -> None:
    assert epsilon([], DELTA) == 0
    mixed, _ = MIXES["three rounds, three terms"]
    assert epsilon(mixed, DELTA) == epsilon(mixed[::-1], DELTA)


def test_clip_norm_and_divisor_do_not_change_epsilon() -> None:
    assert epsilon([mechanism(0.1, 1.0, 5, 3.0, 7.0)], DELTA) == epsilon([mechanism(0.1, 1.0, 5)], DELTA)


def test_renyi_takes_over_above_the_truth_where_prv_cannot_compute() -> None:
    tiny_delta = [mechanism(0.1, 2.0, 80)]
    assert pld(tiny_delta, 1e-11) < epsilon(tiny_delta, 1e-11) < 1.15 * pld(tiny_delta, 1e-11)


@pytest.mark.parametrize(
    "extreme",
    [
        mechanism(0.1, 2.0, 1_000_000),
        mechanism(0.5, 1e12, 1_000_000),
        mechanism(1e-300, 1.0, 1_000_000),
        mechanism(1 - 2**-53, 0.5, 10),
        mechanism(0.5, 1e-300, 1),
        mechanism(1.0, 1e12, 1),
        mechanism(1.0, 0.02, 1_000_000),
    ],
    ids=str,
)
def test_any_terms_that_a_server_can_send_are_answered_in_bounded_time(extreme: Mechanism) -> None:
    started = time.process_time()
    assert epsilon([extreme], DELTA) >= 0
    assert time.process_time() - started < 10


def test_a_smaller_neighbour_never_stands_in_for_extreme_terms() -> None:
    assert epsilon([mechanism(0.5, 1e9, 10)], DELTA) >= pld([mechanism(0.5, 200.0, 10)], DELTA)
    assert epsilon([mechanism(0.5, 1e-3, 1)], DELTA) == math.inf


terms = st.builds(mechanism, st.sampled_from([0.01, 0.1, 0.5, 1.0]), st.sampled_from([0.6, 1.0, 3.0]), st.integers(1, 50))


@settings(max_examples=15, deadline=None)
@given(st.lists(terms, max_size=3), terms)
def test_another_mechanism_never_lowers_epsilon(spent: list[Mechanism], more: Mechanism) -> None:
    """Within the error of the numerical bound, which is on the safe side."""
    assert epsilon([*spent, more], DELTA) >= epsilon(spent, DELTA) - EPSILON_ERROR


@settings(max_examples=15, deadline=None)
@given(terms)
def test_more_noise_fewer_steps_and_rarer_sampling_cost_less(m: Mechanism) -> None:
    eps = epsilon([m], DELTA) + EPSILON_ERROR
    assert epsilon([mechanism(m.sampling_rate, 2 * m.noise_multiplier, m.steps)], DELTA) <= eps
    assert epsilon([mechanism(m.sampling_rate / 2, m.noise_multiplier, m.steps)], DELTA) <= eps
    assert epsilon([mechanism(m.sampling_rate, m.noise_multiplier, (m.steps + 1) // 2)], DELTA) <= eps


@pytest.mark.parametrize(
    ("target", "rate", "steps", "spent"),
    [(8.0, 0.1, 70, [mechanism(1.0, 1.08, 1)]), (1.0, 0.05, 40, []), (4.0, 1.0, 1, []), (60.0, 1.0, 1, []), (0.1, 1.0, 1, [])],
)
def test_calibrated_noise_meets_its_target_from_below(target: float, rate: float, steps: int, spent: list[Mechanism]) -> None:
    noise_multiplier = noise_multiplier_for(target, DELTA, rate, steps, spent)
    assert epsilon([*spent, mechanism(rate, noise_multiplier, steps)], DELTA) <= target
    assert epsilon([*spent, mechanism(rate, 0.99 * noise_multiplier, steps)], DELTA) > target


def test_calibration_says_when_no_noise_is_enough() -> None:
    with pytest.raises(BudgetTooSmallError, match="already spent"):
        noise_multiplier_for(4.0, DELTA, 0.1, 10, [mechanism(1.0, 1.0, 1)])


@pytest.mark.parametrize(
    "wrong",
    [
        mechanism(0.0, 1.0, 1),
        mechanism(1.1, 1.0, 1),
        mechanism(math.nan, 1.0, 1),
        mechanism(0.1, 0.0, 1),
        mechanism(0.1, math.inf, 1),
        mechanism(0.1, math.nan, 1),
        mechanism(0.1, 1.0, 0),
        mechanism(0.1, 1.0, 1, clip_norm=math.inf),
        mechanism(0.1, 1.0, 1, clip_norm=0.0),
        mechanism(0.1, 1.0, 1, divisor=0.0),
        mechanism(0.1, 1.0, 1, divisor=math.nan),
    ],
    ids=str,
)
def test_terms_on_which_no_claim_can_rest_are_refused(wrong: Mechanism) -> None:
    with pytest.raises(MechanismError):
        validate(wrong)
    with pytest.raises(MechanismError):
        epsilon([wrong], DELTA)


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan])
def test_a_delta_outside_zero_and_one_is_refused(delta: float) -> None:
    with pytest.raises(MechanismError, match="delta"):
        epsilon([], delta)


def test_epsilon_is_cached_whatever_the_order_and_the_cut_into_rounds() -> None:
    accounting._epsilon.cache_clear()
    epsilon([mechanism(0.1, 1.0, 10), mechanism(0.2, 1.0, 10)], DELTA)
    epsilon([mechanism(0.2, 1.0, 10), mechanism(0.1, 1.0, 4), mechanism(0.1, 1.0, 6)], DELTA)
    assert accounting._epsilon.cache_info().hits == 1
