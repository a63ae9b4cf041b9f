"""What a list of mechanisms costs, and which noise a budget allows.

All figures are (epsilon, delta) under add/remove-one-example adjacency, for Poisson sampling at exactly `sampling_rate`.
Mechanisms are composed jointly: adding up one epsilon for each round overstates eight rounds fourfold. Every function here is
pure and returns an upper bound; noise is added as floating-point numbers, which the proofs do not model.

The parts of Opacus's accountants (1.6.0) do the numerical work. They import torch, so they are imported when first asked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
from fedloop_events.errors import FedloopError, PolicyError
from fedloop_events.types import Mechanism
from numpy.typing import NDArray

EPSILON_ERROR = 0.01
"""The PRV accountant's error, which its upper bound includes."""
_COARSEST_ERROR = 0.3
_DELTA_ERROR = 1e-3  # of delta
_SMALLEST_PRV_DELTA = 1e-10  # below, rounding in the Fourier transform comes near delta
_GRID_POINTS = 2**20  # of one PRV; about 0.5 s and 50 MB
_GRID_POINTS_ALL = 2**22
_MOST_DISTINCT = 256  # (sampling rate, noise multiplier) pairs; each takes about 20 ms
_MARGIN = 1e-6  # what calibration leaves for another machine's rounding
_LEAST_NOISE, _MOST_NOISE = 1e-2, 1e2
_LEAST_RATE = 1e-6
_ORDERS = np.concatenate([np.arange(11, 110) / 10, np.arange(12.0, 64.0)])

_History = tuple[tuple[float, float, int], ...]
"""(noise multiplier, sampling rate, steps), as Opacus has it."""


class MechanismError(FedloopError):
    """The terms of a mechanism, or a delta, with which no privacy can be promised."""


class BudgetTooSmallError(PolicyError):
    """No noise multiplier keeps the epsilon asked for."""


def validate(mechanism: Mechanism) -> Mechanism:
    """The mechanism itself, if a privacy claim can rest on it.

    Raises MechanismError unless 0 < sampling rate <= 1, noise multiplier, clip norm and divisor are positive and finite, and
    steps >= 1. (Events are checked when they are decoded; a `Mechanism` made in Python is not.)
    """
    positive = {name: getattr(mechanism, name) for name in ("noise_multiplier", "clip_norm", "divisor")}
    for name, value in positive.items():
        if not (math.isfinite(value) and value > 0):
            raise MechanismError(f"{name} must be positive and finite, not {value!r}")
    if not 0 < mechanism.sampling_rate <= 1:
        raise MechanismError(f"sampling_rate must be in (0, 1], not {mechanism.sampling_rate!r}")
    if mechanism.steps < 1:
        raise MechanismError(f"steps must be a whole number of at least 1, not {mechanism.steps!r}")
    return mechanism


def epsilon(mechanisms: Sequence[Mechanism], delta: float) -> float:
    """An upper bound on the epsilon of all `mechanisms` together at `delta`, in any order; 0 for none of them.

    - Mechanisms at sampling rate 1 compose to one Gaussian; if there are no others, the bound is exact (Balle and Wang 2018,
      theorem 8).
    - Else the PRV accountant (Gopi, Lee and Wutschitz 2021), at most `EPSILON_ERROR` above its estimate; the error grows with
      an epsilon of many steps, so that one call stays near half a second.
    - Renyi DP (Mironov, Talwar and Zhang 2019) where that would take a coarser grid than an error of 0.3, where delta is
      below 1e-10, or where PRV finds no answer: about 10% above the truth.
    - Infinity for a noise multiplier below 0.01, whose epsilon would be in the thousands, and for more than 256 different
      pairs of sampling rate (below 1) and noise multiplier, which no honest server asks one client for.

    Raises MechanismError for a mechanism that `validate` refuses, or unless 0 < delta < 1.
    """
    return _epsilon(_history(mechanisms), _checked(delta))


def noise_multiplier_for(
    target_epsilon: float, delta: float, sampling_rate: float, steps: int, spent: Sequence[Mechanism] = ()
) -> float:
    """The least noise multiplier (to 0.2%, never below it) with which `steps` at `sampling_rate`, composed with what is
    already `spent`, stay within `target_epsilon` at `delta` by `epsilon`.

    Raises BudgetTooSmallError if no noise multiplier up to 100 does (1e6 at sampling rate 1).
    """
    if not (math.isfinite(target_epsilon) and target_epsilon > 0):
        raise MechanismError(f"the target epsilon must be positive and finite, not {target_epsilon!r}")

    def cost(noise_multiplier: float) -> float:
        mechanism = Mechanism(
            sampling_rate=sampling_rate, noise_multiplier=noise_multiplier, clip_norm=1.0, steps=steps, divisor=1.0
        )
        return epsilon([*spent, mechanism], delta)

    within = target_epsilon * (1 - _MARGIN)
    most = most_noise(sampling_rate)
    high = 1.0
    while cost(high) > within:
        if high >= most:
            raise BudgetTooSmallError(
                f"no noise multiplier up to {most:g} keeps {steps} steps at sampling rate {sampling_rate:g} within epsilon "
                f"{target_epsilon:g} at delta {delta:g}, on top of an epsilon of {epsilon(spent, delta):.3g} already spent",
                hint="raise the budget, or ask for fewer rounds or steps",
            )
        high = min(2 * high, most)
    low = high / 2
    while cost(low) <= within:
        low, high = low / 2, low
    while high > low * 1.002:  # `high` is always enough, `low` never
        middle = math.sqrt(low * high)
        low, high = (low, middle) if cost(middle) <= within else (middle, high)
    return high


def most_noise(sampling_rate: float) -> float:
    """The largest noise multiplier that `noise_multiplier_for` tries: more would not lower the bound, or say anything useful."""
    return _MOST_NOISE if sampling_rate < 1 else _MOST_NOISE**3


def _checked(delta: float) -> float:
    if not 0 < delta < 1:
        raise MechanismError(f"delta must be in (0, 1), not {delta!r}")
    return delta


def _history(mechanisms: Sequence[Mechanism]) -> _History:
    """Equal mechanisms merged, all Gaussians (rate 1) composed into one, in one order: what the cache is keyed by.

    Extremes become their nearest neighbour that costs more: the accountants' time grows with the noise multiplier, and their
    arithmetic ends at very small rates.
    """
    steps: dict[tuple[float, float], int] = {}
    precision = 0.0
    for mechanism in map(validate, mechanisms):
        if mechanism.sampling_rate == 1:
            precision += mechanism.steps / mechanism.noise_multiplier**2
            continue
        key = (min(mechanism.noise_multiplier, _MOST_NOISE), max(mechanism.sampling_rate, _LEAST_RATE))
        steps[key] = steps.get(key, 0) + mechanism.steps
    if precision:
        steps[1 / math.sqrt(precision), 1.0] = 1
    return tuple((noise, rate, count) for (noise, rate), count in sorted(steps.items()))


@lru_cache(maxsize=4096)
def _epsilon(history: _History, delta: float) -> float:
    if not history:
        return 0.0
    if min(noise for noise, _, _ in history) < _LEAST_NOISE or len(history) > _MOST_DISTINCT:
        return math.inf
    if history[0][1] == 1 and len(history) == 1:
        return _gaussian(history[0][0], delta)
    renyi = _renyi(history, delta)
    if delta < _SMALLEST_PRV_DELTA:
        return renyi
    return min(renyi, _prv(history, delta))


def _gaussian(noise_multiplier: float, delta: float) -> float:
    """Exact epsilon of one Gaussian release of sensitivity 1 (Balle and Wang 2018, theorem 8), rounded up by 1e-9."""
    from scipy.optimize import brentq
    from scipy.special import log_ndtr

    def excess(eps: float) -> float:
        half, shift = 0.5 / noise_multiplier, eps * noise_multiplier
        return float(np.exp(log_ndtr(half - shift)) - np.exp(eps + log_ndtr(-half - shift))) - delta

    if excess(0.0) <= 0:
        return 0.0
    most = 1.0
    while excess(most) > 0:
        most *= 2
    return float(brentq(excess, 0.0, most, xtol=1e-10, rtol=1e-14)) + 1e-9


def _renyi(history: _History, delta: float) -> float:
    """Canonne, Kamath and Steinke 2020, proposition 12, over the curve of the composition."""
    curve = sum((steps * _curve(noise, rate) for noise, rate, steps in history), np.zeros_like(_ORDERS))
    candidates = curve + np.log1p(-1 / _ORDERS) - (math.log(delta) + np.log(_ORDERS)) / (_ORDERS - 1)
    candidates = candidates[np.isfinite(candidates)]
    return max(0.0, float(candidates.min())) if candidates.size else math.inf


@lru_cache(maxsize=4096)
def _curve(noise_multiplier: float, sampling_rate: float) -> NDArray[np.float64]:
    from opacus.accountants.analysis import rdp

    curve = rdp.compute_rdp(q=sampling_rate, noise_multiplier=noise_multiplier, steps=1, orders=_ORDERS.tolist())
    return np.asarray(curve, dtype=np.float64)


def _prv(history: _History, delta: float) -> float:
    """Gopi, Lee and Wutschitz 2021, algorithm 1, on a domain as in their remark 5.6 (and with the margin of their code)."""
    from opacus.accountants.analysis import prv

    steps = [count for _, _, count in history]
    delta_error = _DELTA_ERROR * delta
    alone = (_renyi(((noise, rate, 1),), delta_error / (8 * sum(steps))) for noise, rate, _ in history)
    half_width = max(_renyi(history, delta_error / 4), *alone) + 3
    points_per_error = 2 * half_width * math.sqrt(sum(steps) * math.log(12 / delta_error) / 2)
    error = max(EPSILON_ERROR, points_per_error / min(_GRID_POINTS, _GRID_POINTS_ALL / len(history)))
    if error > _COARSEST_ERROR:
        return math.inf
    try:
        with np.errstate(divide="ignore", invalid="ignore", over="ignore"):  # log(1 - q) at q = 1
            domain = prv.Domain.create_aligned(-half_width, half_width, 2 * half_width * error / points_per_error)
            grids = [
                prv.discretize(
                    prv.TruncatedPrivacyRandomVariable(prv.PoissonSubsampledGaussianPRV(rate, noise), domain.t_min, domain.t_max),
                    domain,
                )
                for noise, rate, _ in history
            ]
            composed = prv.compose_heterogeneous(dprvs=grids, num_self_compositions=steps)
            bound = float(composed.compute_epsilon(delta, delta_error, error)[2])
    except (RuntimeError, ValueError):  # its own checks of the grid failed: the other bound stands
        return math.inf
    return math.inf if math.isnan(bound) else max(0.0, bound)
