"""A classifier's plan: which program comes next, and mechanisms that together stay within the budget."""

from __future__ import annotations

import re

import pytest
from dp_accounting import dp_event
from dp_accounting.pld import PLDAccountant
from fedloop_events.errors import UsageError
from fedloop_events.types import Mechanism
from fedloop_privacy.dp.accounting import MechanismError, epsilon
from fedloop_tasks.classification.plan import ClassificationPlan
from fedloop_tasks.table import PROGRAMS
from msgspec.structs import replace

PLAN = ClassificationPlan(planned_rounds=3, sampling_rate=1.0, steps=1, nominal_examples=100)
"""At sampling rate 1 the accountant has a closed form."""


def pld(mechanisms: list[Mechanism], delta: float) -> float:
    """Google's privacy loss distributions: another method, other code."""
    accountant = PLDAccountant(value_discretization_interval=2e-4)
    for m in mechanisms:
        step = dp_event.PoissonSampledDpEvent(m.sampling_rate, dp_event.GaussianDpEvent(m.noise_multiplier))
        accountant.compose(dp_event.SelfComposedDpEvent(step, m.steps))
    return float(accountant.get_epsilon(delta))


@pytest.mark.parametrize("rounds", [2, 8])
def test_all_rounds_of_a_plan_stay_within_epsilon_and_use_it(rounds: int) -> None:
    plan = ClassificationPlan(planned_rounds=rounds, sampling_rate=0.1, nominal_examples=400, sums_share=0.5)
    sums, training = plan.mechanisms()["sums"], plan.mechanisms()["ffa"]
    assert (sums.sampling_rate, sums.steps, sums.clip_norm, sums.divisor) == (1.0, 1, 1.0, 1.0)
    assert (training.steps, training.clip_norm, training.divisor) == (10, 1.0, 40.0)
    spent = [sums, *[training] * (rounds - 1)]
    assert 3.95 < epsilon([sums], plan.delta) <= 4.0
    assert 7.9 < epsilon(spent, plan.delta) <= 8.0
    assert pld(spent, plan.delta) <= 8.0


def test_the_sums_take_no_more_than_their_share() -> None:
    assert PLAN.epsilon is not None
    mechanisms = PLAN.mechanisms()
    assert epsilon([mechanisms["sums"]], PLAN.delta) <= PLAN.epsilon * PLAN.sums_share
    whole = epsilon([mechanisms["sums"], *[mechanisms["ffa"]] * 2], PLAN.delta)
    assert 0.97 * PLAN.epsilon < whole <= PLAN.epsilon


@pytest.mark.parametrize(("rounds", "share"), [(1, 0.5), (8, 0.0), (8, 1.0)])
def test_a_plan_without_room_for_both_kinds_of_round_is_refused(rounds: int, share: float) -> None:
    with pytest.raises((UsageError, MechanismError)):
        ClassificationPlan(planned_rounds=rounds, sums_share=share).mechanisms()


@pytest.mark.parametrize(
    "plan",
    [
        ClassificationPlan(epsilon=0.01),
        ClassificationPlan(epsilon=0.05),
        ClassificationPlan(delta=1e-300),
        ClassificationPlan(epsilon=1e-5, delta=1e-9, sampling_rate=1.0, planned_rounds=10_000),
    ],
)
def test_a_budget_that_no_noise_keeps_is_refused_with_what_would_be_possible(plan: ClassificationPlan) -> None:
    with pytest.raises(UsageError) as caught:
        plan.mechanisms()
    assert f"epsilon = {plan.epsilon:g}" in caught.value.message
    assert f"planned_rounds = {plan.planned_rounds}" in caught.value.message
    proposed = dict(re.findall(r"(epsilon|planned_rounds) \(--\w+\) ([0-9.e-]+)", caught.value.hint))
    assert "epsilon" in proposed
    assert replace(plan, epsilon=float(proposed.pop("epsilon"))).mechanisms()
    if proposed:
        most = int(proposed["planned_rounds"])
        assert replace(plan, planned_rounds=most).mechanisms()
        with pytest.raises(UsageError):
            replace(plan, planned_rounds=most + 1).mechanisms()


def test_a_sampling_rate_whose_steps_no_event_holds_is_refused() -> None:
    with pytest.raises(UsageError, match="sampling_rate = 1e-09"):
        ClassificationPlan(sampling_rate=1e-9)
    assert ClassificationPlan(sampling_rate=1e-9, steps=4).round_steps == 4


def test_sums_come_first_then_training_until_the_plan_is_used_up() -> None:
    assert PLAN.next_program([]) == "sums"
    assert PLAN.next_program(["sums"]) == "ffa"
    assert PLAN.next_program(["ffa"]) == "sums"  # the operator has chosen privacy since
    assert PLAN.next_program(["sums", "ffa"]) == "ffa"
    assert PLAN.next_program(["sums", "ffa", "ffa"]) is None


def test_sums_of_several_rounds_keep_their_share_together() -> None:
    plan = replace(PLAN, planned_rounds=4, sums_rounds=2)
    mechanisms = plan.mechanisms()
    assert plan.epsilon is not None
    assert epsilon([mechanisms["sums"]] * 2, plan.delta) <= plan.epsilon * plan.sums_share
    assert epsilon([mechanisms["sums"]] * 2 + [mechanisms["ffa"]] * 2, plan.delta) <= plan.epsilon
    assert [plan.next_program(made) for made in ([], ["sums"], ["sums", "sums"])] == ["sums", "sums", "ffa"]
    with pytest.raises(UsageError, match=r"planned_rounds = 2 .*: 3 or more"):
        replace(PLAN, planned_rounds=2, sums_rounds=2)
    assert "planned for 3 rounds" in PLAN.exhausted


def test_without_a_budget_every_round_trains_and_none_has_a_mechanism() -> None:
    plan = ClassificationPlan(epsilon=None, planned_rounds=1)
    assert plan.mechanisms() == {}
    assert plan.next_program(["fedavg"] * 100) == "fedavg"
    assert plan.terms("fedavg", None).mechanism is None


def test_terms_are_those_of_their_program() -> None:
    names = ["lora.0.query.A", "lora.0.query.B", "head.weight", "head.bias"]
    assert [PROGRAMS[each].upload(names) for each in ("sums", "ffa", "fedavg")] == [["sums"], names[1:], names]
    sums = PLAN.terms("sums", None)
    assert (sums.hyperparameters, sums.least_norm) == ({"head_scale": 20.0}, 400.0)
    assert PLAN.terms("ffa", None).least_norm == 0.0
    assert set(PLAN.mechanisms()) <= set(PROGRAMS)


def test_the_private_numbers_follow_from_public_ones() -> None:
    plan = ClassificationPlan(nominal_examples=1000, sampling_rate=0.128)
    assert (plan.round_steps, plan.divisor) == (8, 128.0)
    small = ClassificationPlan(nominal_examples=100, sampling_rate=1.0)
    assert (small.round_steps, small.divisor) == (1, 100.0)
    assert ClassificationPlan(steps=3).round_steps == 3


def test_the_strategy_and_the_hyperparameters_depend_on_whether_rounds_are_private() -> None:
    assert ClassificationPlan().merge == "ffa"
    assert ClassificationPlan().hyperparameters == {"head_lr": 40.0, "lora_lr": 4.0}
    assert ClassificationPlan(epsilon=None).merge == "fedavg"
    assert set(ClassificationPlan(epsilon=None).hyperparameters) == {"head_lr", "lora_lr", "local_epochs", "batch"}
    assert ClassificationPlan(strategy="fedavg").merge == "fedavg"
    assert ClassificationPlan(update_bits=8).hyperparameters == {"head_lr": 40.0, "lora_lr": 4.0, "update_bits": 8}
    assert "update_bits" not in ClassificationPlan(update_bits=8).terms("sums", None).hyperparameters
