"""The rounds of a classifier's deployment: first noisy sums per class, then training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Final

from fedloop_events.types import Mechanism
from msgspec import Meta

from fedloop_tasks.planning import Number, Share, TrainingPlan, meaning, wrong
from fedloop_tasks.programs import class_sums
from fedloop_tasks.task import Terms

PRIVATE_RATES: Final = {"head_lr": 40.0, "bias_lr": 0.0, "lora_lr": 4.0}
"""SGD's. The bias is frozen: between devices with different labels it learns their priors alone."""
PLAIN_RATES: Final = {"head_lr": 0.05, "bias_lr": 0.05, "lora_lr": 0.002}
"""AdamW's."""
_NORMS_PER_EXAMPLE: Final = 4.0
"""Sums of unit vectors are as long as there are examples of one class; with room for devices that have more than is assumed."""


class ClassificationPlan(TrainingPlan, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """See `TrainingPlan`. The first of the private rounds are of sums."""

    sums_share: Share = 0.7
    sums_rounds: Annotated[int, Meta(ge=1, le=1000)] = 1
    head_lr: Number | None = None
    head_scale: Number = 20.0

    MEANING: ClassVar[Mapping[str, str]] = meaning("ffa", "fedavg", (PRIVATE_RATES["lora_lr"], PLAIN_RATES["lora_lr"])) | {
        "planned_rounds": "Rounds that the budget is planned for, the sums included; with an epsilon there are no more.",
        "sums_share": "Share of epsilon that the first rounds, of noisy sums per class, take; below 1.",
        "sums_rounds": "How many rounds of sums there are: each makes the head anew of all examples, those of new classes too.",
        "head_lr": 'Learning rate of the head; "default": 40 with an epsilon (SGD), else 0.05 (AdamW).',
        "head_scale": "Norm of a row of the head that starts from the sums of its class.",
    }
    NONE: ClassVar[Mapping[str, str]] = {**TrainingPlan.NONE, "head_lr": "default"}

    def __post_init__(self) -> None:
        if self.epsilon is not None:
            if self.planned_rounds <= self.sums_rounds:
                raise wrong(
                    "planned_rounds", self.planned_rounds, f"{self.sums_rounds + 1} or more: those of sums, then training"
                )
            if self.sums_share >= 1:
                raise wrong("sums_share", self.sums_share, "below 1")
        TrainingPlan.__post_init__(self)

    def first(self, epsilon: float) -> list[tuple[str, Mechanism]]:
        """Noisy sums, together at `sums_share` of epsilon: sampling rate 1, one step, clip norm and divisor 1."""
        return [(class_sums.NAME, _sums(epsilon * self.sums_share, self.delta, self.sums_rounds))] * self.sums_rounds

    def rates(self) -> dict[str, float]:
        usual = PLAIN_RATES if self.epsilon is None else PRIVATE_RATES
        return {"head_lr": self.head_lr or usual["head_lr"], "lora_lr": self.lora_lr or usual["lora_lr"]}

    @property
    def programs(self) -> Sequence[str]:
        return [self.merge] if self.epsilon is None else [class_sums.NAME, self.merge]

    def next_program(self, made: Sequence[str]) -> str | None:
        program = TrainingPlan.next_program(self, made)
        summed = self.epsilon is None or made.count(class_sums.NAME) >= self.sums_rounds
        return program if program is None or summed else class_sums.NAME

    def terms(self, program: str, mechanism: Mechanism | None) -> Terms:
        if program == class_sums.NAME:
            least_norm = _NORMS_PER_EXAMPLE * self.nominal_examples
            return Terms(program, mechanism, {"head_scale": self.head_scale}, least_norm)
        return TrainingPlan.terms(self, program, mechanism)


def _sums(epsilon: float, delta: float, rounds: int) -> Mechanism:
    """Noisy sums of vectors of norm 1; so many rounds of them take an epsilon."""
    from fedloop_privacy.dp.accounting import noise_multiplier_for

    return Mechanism(
        sampling_rate=1.0, noise_multiplier=noise_multiplier_for(epsilon, delta, 1.0, rounds), clip_norm=1.0, steps=1, divisor=1.0
    )
