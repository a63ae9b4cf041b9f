"""Adapter training with an optimiser on the server: the mean change of a round is what it takes for a gradient
(Reddi et al. 2021, arXiv 2003.00295, algorithm 2).

A stays as it is, as in `ffa`. What the optimiser remembers are tensors of the release that devices do not fetch (see `STATE`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import numpy as np
from fedloop_events.blobs.tensors import Array
from fedloop_events.types import RoundOpened
from numpy.typing import NDArray

from fedloop_tasks.programs.adapter import AdapterTraining
from fedloop_tasks.task import STATE, Arrays

RATE: Final = "server_lr"
"""The hyperparameter."""
FIRST_DECAY: Final = 0.9
SECOND_DECAY: Final = 0.99
ADAPTIVITY: Final = 1e-3

Values = NDArray[np.float64]
Step = Callable[[Values, list[Values]], tuple[Values, list[Values]]]
"""Of a mean change and what was remembered: how far to go at learning rate 1, and what to remember."""


def momentum(change: Values, state: list[Values]) -> tuple[Values, list[Values]]:
    """FedAvgM (Hsu et al. 2019, arXiv 1909.06335)."""
    velocity = state[0] * FIRST_DECAY + change
    return velocity, [velocity]


def adam(change: Values, state: list[Values]) -> tuple[Values, list[Values]]:
    """FedAdam, without bias correction as in the paper. A tensor that never changes stays as it is."""
    first = state[0] * FIRST_DECAY + change * (1 - FIRST_DECAY)
    second = state[1] * SECOND_DECAY + change * change * (1 - SECOND_DECAY)
    return first / (np.sqrt(second) + ADAPTIVITY), [first, second]


class ServerOptimised(AdapterTraining):
    """Of each number the optimiser remembers `moments` others, zero before its first round; `rate` is its learning rate where a
    round names none. Rounds of other programs between two of its own forget them."""

    def __init__(self, name: str, step: Step, moments: int, rate: float) -> None:
        super().__init__(name, freezes_a=True)
        self._step, self._moments, self.rate = step, moments, rate

    def apply(self, opened: RoundOpened, base: Arrays, combined: Arrays) -> dict[str, Array]:
        """See `Program`. Each number is computed in float64 and rounded once."""
        rate = opened.hyperparameters.get(RATE, self.rate)
        made: dict[str, Array] = {}
        kept: dict[str, Array] = {}
        for name, values in base.items():
            if name.startswith(STATE):
                continue
            if name not in combined:
                made[name] = values
                continue
            names = [f"{STATE}{self.name}.{number}.{name}" for number in range(self._moments)]
            before = [base[each].astype(np.float64) if each in base else np.zeros(values.shape) for each in names]
            wide = values.astype(np.float64)
            step, after = self._step(combined[name].astype(np.float64) - wide, before)
            made[name] = (wide + step * rate).astype(values.dtype)
            kept |= {each: moment.astype(values.dtype) for each, moment in zip(names, after, strict=True)}
        return made | kept


OPTIMISERS: Final = {
    each.name: each for each in (ServerOptimised("fedavgm", momentum, 1, 1.0), ServerOptimised("fedadam", adam, 2, 0.01))
}
