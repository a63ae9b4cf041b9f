"""Rounds of training, planned from the operator's settings: what the plans of all tasks have in common.

Under differential privacy a deployment has `planned_rounds` rounds, whose mechanisms compose to the configured epsilon for a
client that takes part in all of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, ClassVar, Final, Literal

from fedloop_events.errors import UsageError
from fedloop_events.types import Mechanism
from msgspec import Meta, Struct

from fedloop_tasks.programs.optimisers import OPTIMISERS, RATE
from fedloop_tasks.task import UPDATE_BITS, Terms

Strategy = Literal["ffa", "fedavg", "svd", "stack", "residual", "fedavgm", "fedadam"]
Number = Annotated[float, Meta(gt=0, le=1e12)]
Share = Annotated[float, Meta(gt=0, le=1)]
Many = Annotated[int, Meta(ge=1, le=1_000_000)]
SERVER_RATES: Final[Mapping[str, float]] = {name: each.rate for name, each in OPTIMISERS.items()}
"""Learning rates on the server, by strategy, unless the task knows better ones."""
_MOST_STEPS: Final = 1_000_000
"""Of a `Mechanism`."""
_MOST_EPSILON: Final = 1000.0
"""That is proposed in place of one that is too small."""
_FINE: Final = 1.05
"""What is proposed is at most so much more than what would do."""
_MARGIN: Final = 0.999
_STRATEGIES: Final = (
    'How adapters are merged: "ffa" (A frozen, B averaged), "fedavg" (both averaged), "svd" (their products averaged, and cut '
    'down to the rank again), "stack" (their products kept whole beside an adapter that begins anew), "residual" (both averaged, '
    'and kept beside them what the mean of the products is more; like svd and stack never buffered), "fedavgm" and "fedadam" (as '
    'ffa, the mean change a gradient for an optimiser on the server), or "default": {private} with an epsilon, else {plain}.'
)
_MEANING: Final[Mapping[str, str]] = {
    "epsilon": 'Privacy budget of each client for its whole life; "none": rounds without differential privacy.',
    "delta": "The delta of that budget; below 1 / nominal_examples.",
    "strategy": _STRATEGIES,
    "planned_rounds": "Rounds that the budget is planned for; under differential privacy there are no more.",
    "nominal_examples": "Examples a device is assumed to have, from public knowledge: never counted on devices.",
    "sampling_rate": "Probability that an example takes part in a private step.",
    "steps": 'Private steps of a round; "default": one expected pass, 1 / sampling_rate.',
    "clip_norm": "L2 bound on one example's gradient.",
    "lora_lr": 'Learning rate of the adapters; "default": {private:g} with an epsilon (SGD), else {plain:g} (AdamW).',
    "server_lr": 'Learning rate on the server with fedavgm and fedadam; "default": {fedavgm:g} and {fedadam:g}.',
    "local_epochs": "Passes over a device's examples in a round without differential privacy.",
    "local_batch": "Examples of a step in such a round.",
    "update_bits": "Bits of a number in an update of training: 32, or 16 or 8 for how it changes its base, rounded.",
}


def meaning(
    private: Strategy, plain: Strategy, rates: tuple[float, float], server_rates: Mapping[str, float] = SERVER_RATES
) -> dict[str, str]:
    """What the keys of every such plan mean; `rates` are those of the adapters with privacy, and without."""
    return {
        **_MEANING,
        "strategy": _STRATEGIES.format(private=private, plain=plain),
        "lora_lr": _MEANING["lora_lr"].format(private=rates[0], plain=rates[1]),
        "server_lr": _MEANING["server_lr"].format(**server_rates),
    }


class TrainingPlan(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """See `Plan`. Every number is a public one, fixed before anybody looks at data: none may come from a device's counts.

    Raises `UsageError` for values that promise nothing sensible together (types and ranges are checked where a file is decoded).
    """

    epsilon: Number | None = 8.0
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-5
    strategy: Strategy | None = None
    planned_rounds: Annotated[int, Meta(ge=1, le=10_000)] = 8
    nominal_examples: Many = 1000
    sampling_rate: Share = 0.25
    steps: Many | None = None
    clip_norm: Number = 1.0
    lora_lr: Number | None = None
    server_lr: Number | None = None
    local_epochs: Annotated[int, Meta(ge=1, le=1000)] = 1
    local_batch: Annotated[int, Meta(ge=1, le=65_536)] = 32
    update_bits: Literal[32, 16, 8] = 32

    MEANING: ClassVar[Mapping[str, str]] = {}
    NONE: ClassVar[Mapping[str, str]] = {"epsilon": "none"} | dict.fromkeys(
        ("strategy", "steps", "lora_lr", "server_lr"), "default"
    )
    PRIVATE: ClassVar[Strategy] = "ffa"
    """The strategy under differential privacy, unless one is set."""
    PLAIN: ClassVar[Strategy] = "fedavg"
    SERVER_RATES: ClassVar[Mapping[str, float]] = SERVER_RATES

    def __post_init__(self) -> None:
        if self.epsilon is None:
            return
        if self.delta * self.nominal_examples >= 1:
            raise wrong("delta", self.delta, f"below 1 / nominal_examples, which is {1 / self.nominal_examples:g}")
        if self.round_steps > _MOST_STEPS:
            raise wrong("sampling_rate", self.sampling_rate, f"{1 / _MOST_STEPS:g} or more, or a number of `steps` is given")

    def first(self, epsilon: float) -> list[tuple[str, Mechanism]]:
        """The programs and mechanisms of the rounds before training, where `epsilon` is the whole budget."""
        return []

    def rates(self) -> dict[str, float]:
        """The learning rates that a training round names."""
        raise NotImplementedError

    def mechanisms(self) -> dict[str, Mechanism]:
        """Those of the first rounds; for each of the others DP-SGD whose noise is the least that keeps the whole, jointly
        composed, within epsilon.

        Raises `UsageError` that names the least epsilon and the most rounds with which there is such a noise."""
        if self.epsilon is None:
            return {}
        from fedloop_privacy.dp.accounting import BudgetTooSmallError, noise_multiplier_for, validate  # imports torch when asked

        try:
            first = self.first(self.epsilon)
            steps = (self.planned_rounds - len(first)) * self.round_steps
            noise = noise_multiplier_for(self.epsilon, self.delta, self.sampling_rate, steps, tuple(each for _, each in first))
        except BudgetTooSmallError as error:
            raise self._impossible(self.epsilon, error.message) from None
        training = Mechanism(
            sampling_rate=self.sampling_rate,
            noise_multiplier=noise,
            clip_norm=self.clip_norm,
            steps=self.round_steps,
            divisor=self.divisor,
        )
        return {**dict(first), self.merge: validate(training)}

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
            first = [mechanism for _, mechanism in self.first(asked)]
        except BudgetTooSmallError:
            return False
        steps = (rounds - len(first)) * self.round_steps
        most = Mechanism(self.sampling_rate, most_noise(self.sampling_rate), 1.0, steps, 1.0)
        return epsilon([*first, most], self.delta) <= asked * _MARGIN

    @property
    def programs(self) -> Sequence[str]:
        return [self.merge]

    def next_program(self, made: Sequence[str]) -> str | None:
        if self.epsilon is not None and len(made) >= self.planned_rounds:
            return None
        return self.merge

    def terms(self, program: str, mechanism: Mechanism | None) -> Terms:
        return Terms(program, mechanism, self.hyperparameters)

    @property
    def exhausted(self) -> str:
        return f"the budget is planned for {self.planned_rounds} rounds, which are over"

    @property
    def merge(self) -> Strategy:
        """The program of training rounds."""
        return self.strategy or (self.PLAIN if self.epsilon is None else self.PRIVATE)

    @property
    def hyperparameters(self) -> dict[str, float]:
        """Of a training round, by the names that its program reads."""
        rates = self.rates()
        if (usual := self.SERVER_RATES.get(self.merge)) is not None:
            rates[RATE] = self.server_lr or usual
        if self.update_bits < 32:
            rates[UPDATE_BITS] = self.update_bits
        return rates | ({"local_epochs": self.local_epochs, "batch": self.local_batch} if self.epsilon is None else {})

    @property
    def round_steps(self) -> int:
        """Private steps of one round."""
        return self.steps or math.ceil(1 / self.sampling_rate)

    @property
    def divisor(self) -> float:
        """What the noisy sum of a private step is divided by."""
        return self.sampling_rate * self.nominal_examples


def wrong(key: str, value: object, allowed: str) -> UsageError:
    return UsageError(f"{key} = {value!r} in the server's configuration is not allowed: {allowed}")


def _rounded_up(value: float) -> str:
    """To two digits."""
    unit = 10.0 ** (math.floor(math.log10(value)) - 1)
    return f"{math.ceil(value / unit) * unit:.2g}"
