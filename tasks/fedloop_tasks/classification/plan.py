"""The rounds of a classifier's deployment, planned from the operator's settings.

Under differential privacy a deployment has `planned_rounds` rounds, whose mechanisms compose to the configured epsilon for a
client that takes part in all of them: first noisy sums per class, then DP-SGD.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Final, Literal

from fedloop_events.errors import UsageError
from fedloop_events.types import Mechanism
from msgspec import Meta, Struct

from fedloop_tasks.programs import class_sums
from fedloop_tasks.programs.optimisers import OPTIMISERS, RATE
from fedloop_tasks.task import Terms

Strategy = Literal["ffa", "fedavg", "svd", "fedavgm", "fedadam"]
PRIVATE_RATES: Final = {"head_lr": 40.0, "bias_lr": 0.0, "lora_lr": 4.0}
"""SGD's. The bias is frozen: between devices with different labels it learns their priors alone."""
PLAIN_RATES: Final = {"head_lr": 0.05, "bias_lr": 0.05, "lora_lr": 0.002}
"""AdamW's."""
_Number = Annotated[float, Meta(gt=0, le=1e12)]
_Share = Annotated[float, Meta(gt=0, le=1)]
_Many = Annotated[int, Meta(ge=1, le=1_000_000)]
_MOST_STEPS: Final = 1_000_000
"""Of a `Mechanism`."""
_MOST_EPSILON: Final = 1000.0
"""That is proposed in place of one that is too small."""
_FINE: Final = 1.05
"""What is proposed is at most so much more than what would do."""
_MARGIN: Final = 0.999
_NORMS_PER_EXAMPLE: Final = 4.0
"""Sums of unit vectors are as long as there are examples of one class; with room for devices that have more than is assumed."""

_MEANING: Final[Mapping[str, str]] = {
    "epsilon": 'Privacy budget of each client for its whole life; "none": rounds without differential privacy.',
    "delta": "The delta of that budget; below 1 / nominal_examples.",
    "strategy": 'How adapters are merged: "ffa" (A frozen, B averaged), "fedavg" (both averaged), "svd" (their products '
    'averaged, and cut down to the rank again; never buffered), "fedavgm" and "fedadam" (as ffa, '
    'the mean change being a gradient for an optimiser on the server), or "default": ffa with an epsilon, else fedavg.',
    "planned_rounds": "Rounds that the budget is planned for, the sums included; under differential privacy there are no more.",
    "sums_share": "Share of epsilon that the first round, of noisy sums per class, takes; below 1.",
    "nominal_examples": "Examples a device is assumed to have, from public knowledge: never counted on devices.",
    "sampling_rate": "Probability that an example takes part in a private step.",
    "steps": 'Private steps of a round; "default": one expected pass, 1 / sampling_rate.',
    "clip_norm": "L2 bound on one example's gradient.",
    "head_lr": 'Learning rate of the head; "default": 40 with an epsilon (SGD), else 0.05 (AdamW).',
    "lora_lr": 'Learning rate of the adapters; "default": 4 with an epsilon (SGD), else 0.002 (AdamW).',
    "server_lr": 'Learning rate on the server with fedavgm and fedadam; "default": 1 and 0.01.',
    "head_scale": "Norm of a row of the head that starts from the sums of its class.",
    "local_epochs": "Passes over a device's examples in a round without differential privacy.",
    "local_batch": "Examples of a step in such a round.",
}


class ClassificationPlan(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """See `Plan`. Every number is a public one, fixed before anybody looks at data: none may come from a device's counts.

    Raises `UsageError` for values that promise nothing sensible together (types and ranges are checked where a file is decoded).
    """

    epsilon: _Number | None = 8.0
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-5
    strategy: Strategy | None = None
    planned_rounds: Annotated[int, Meta(ge=1, le=10_000)] = 8
    sums_share: _Share = 0.7
    nominal_examples: _Many = 1000
    sampling_rate: _Share = 0.25
    steps: _Many | None = None
    clip_norm: _Number = 1.0
    head_lr: _Number | None = None
    lora_lr: _Number | None = None
    server_lr: _Number | None = None
    head_scale: _Number = 20.0
    local_epochs: Annotated[int, Meta(ge=1, le=1000)] = 1
    local_batch: Annotated[int, Meta(ge=1, le=65_536)] = 32

    MEANING: ClassVar[Mapping[str, str]] = _MEANING
    NONE: ClassVar[Mapping[str, str]] = {"epsilon": "none"} | dict.fromkeys(
        ("strategy", "steps", "head_lr", "lora_lr", "server_lr"), "default"
    )

    def __post_init__(self) -> None:
        if self.epsilon is None:
            return
        if self.planned_rounds < 2:
            raise _wrong("planned_rounds", self.planned_rounds, "2 or more: one of sums, then training")
        if self.sums_share >= 1:
            raise _wrong("sums_share", self.sums_share, "below 1")
        if self.delta * self.nominal_examples >= 1:
            raise _wrong("delta", self.delta, f"below 1 / nominal_examples, which is {1 / self.nominal_examples:g}")
        if self.round_steps > _MOST_STEPS:
            raise _wrong("sampling_rate", self.sampling_rate, f"{1 / _MOST_STEPS:g} or more, or a number of `steps` is given")

    def mechanisms(self) -> dict[str, Mechanism]:
        """Noisy sums at `sums_share` of epsilon (sampling rate 1, one step, clip norm and divisor 1); for each of the other
        rounds DP-SGD whose noise is the least that keeps the whole, jointly composed, within epsilon.

        Raises `UsageError` that names the least epsilon and the most rounds with which there is such a noise."""
        if self.epsilon is None:
            return {}
        from fedloop_privacy.dp.accounting import BudgetTooSmallError, noise_multiplier_for, validate  # imports torch when asked

        steps = (self.planned_rounds - 1) * self.round_steps
        try:
            sums = _sums(self.epsilon * self.sums_share, self.delta)
            noise = noise_multiplier_for(self.epsilon, self.delta, self.sampling_rate, steps, (sums,))
        except BudgetTooSmallError as error:
            raise self._impossible(self.epsilon, error.message) from None
        training = Mechanism(
            sampling_rate=self.sampling_rate,
            noise_multiplier=noise,
            clip_norm=self.clip_norm,
            steps=self.round_steps,
            divisor=self.divisor,
        )
        return {class_sums.NAME: sums, self.merge: validate(training)}

    def _impossible(self, asked: float, cause: str) -> UsageError:
        """Why `asked` is no epsilon for this plan, and what would be one."""
        possible = []
        enough = asked
        while enough <= _MOST_EPSILON and not self._fits(enough, self.planned_rounds):
            enough *= 2
        if enough <= _MOST_EPSILON:
            low = enough / 2
            while enough > low * _FINE:
                middle = math.sqrt(low * enough)
                low, enough = (low, middle) if self._fits(middle, self.planned_rounds) else (middle, enough)
            possible.append(f"epsilon (--epsilon) {_rounded_up(enough)} or more")
        rounds, too_many = 1, self.planned_rounds
        while too_many - rounds > 1:
            between = (rounds + too_many) // 2
            rounds, too_many = (between, too_many) if self._fits(asked, between) else (rounds, between)
        if rounds > 1:
            possible.append(f"planned_rounds (--rounds) {rounds} or fewer")
        return UsageError(
            f"epsilon = {asked:g} at delta = {self.delta:g} is too small a budget for planned_rounds = {self.planned_rounds}: "
            "no noise that is provided for keeps it",
            cause=cause,
            hint=f"possible would be {', or '.join(possible)}" if possible else "ask for fewer steps, or a larger delta",
        )

    def _fits(self, asked: float, rounds: int) -> bool:
        """Whether the most noise keeps so many rounds within an epsilon."""
        from fedloop_privacy.dp.accounting import BudgetTooSmallError, epsilon, most_noise

        try:
            sums = _sums(asked * self.sums_share, self.delta)
        except BudgetTooSmallError:
            return False
        most = Mechanism(self.sampling_rate, most_noise(self.sampling_rate), 1.0, (rounds - 1) * self.round_steps, 1.0)
        return epsilon([sums, most], self.delta) <= asked * _MARGIN

    def next_program(self, made: Sequence[str]) -> str | None:
        if self.epsilon is None:
            return self.merge
        if len(made) >= self.planned_rounds:
            return None
        return self.merge if class_sums.NAME in made else class_sums.NAME

    def terms(self, program: str, mechanism: Mechanism | None) -> Terms:
        if program == class_sums.NAME:
            least_norm = _NORMS_PER_EXAMPLE * self.nominal_examples
            return Terms(program, mechanism, {"head_scale": self.head_scale}, least_norm)
        return Terms(program, mechanism, self.hyperparameters)

    @property
    def exhausted(self) -> str:
        return f"the budget is planned for {self.planned_rounds} rounds, which are over"

    @property
    def merge(self) -> Strategy:
        """The program of training rounds."""
        return self.strategy or ("fedavg" if self.epsilon is None else "ffa")

    @property
    def hyperparameters(self) -> dict[str, float]:
        """Of a training round, by the names that its program reads."""
        usual = PLAIN_RATES if self.epsilon is None else PRIVATE_RATES
        rates = {"head_lr": self.head_lr or usual["head_lr"], "lora_lr": self.lora_lr or usual["lora_lr"]}
        if (optimiser := OPTIMISERS.get(self.merge)) is not None:
            rates[RATE] = self.server_lr or optimiser.rate
        return rates | ({"local_epochs": self.local_epochs, "batch": self.local_batch} if self.epsilon is None else {})

    @property
    def round_steps(self) -> int:
        """Private steps of one round."""
        return self.steps or math.ceil(1 / self.sampling_rate)

    @property
    def divisor(self) -> float:
        """What the noisy sum of a private step is divided by."""
        return self.sampling_rate * self.nominal_examples


def _wrong(key: str, value: object, allowed: str) -> UsageError:
    return UsageError(f"{key} = {value!r} in the server's configuration is not allowed: {allowed}")


def _sums(epsilon: float, delta: float) -> Mechanism:
    """Noisy sums of vectors of norm 1, which take an epsilon."""
    from fedloop_privacy.dp.accounting import noise_multiplier_for

    return Mechanism(
        sampling_rate=1.0, noise_multiplier=noise_multiplier_for(epsilon, delta, 1.0, 1), clip_norm=1.0, steps=1, divisor=1.0
    )


def _rounded_up(value: float) -> str:
    """To two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / unit) * unit:.2g}"
