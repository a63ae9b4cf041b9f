"""Adapter training: what a round uploads is trained on the device's own examples, and the mean takes the place of the base's.

`RoundOpened.upload` names the tensors that are trained and sent, and all others stay as they are: without A it is FFA-LoRA (Sun
et al. 2024, arXiv 2403.12313), with everything FedAvg, with the head alone linear probing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import TYPE_CHECKING, Any, Final, Literal, NamedTuple, Protocol

from fedloop_events.blobs import tensors
from fedloop_events.blobs.tensors import Array, TensorSpec
from fedloop_events.errors import TensorError
from fedloop_events.types import RoundOpened

from fedloop_tasks.programs.factors import is_fixed
from fedloop_tasks.task import Arrays, Combine, TermsError

if TYPE_CHECKING:
    from fedloop_privacy.dp.dpsgd import Examples, ParameterGroup
    from torch import Tensor, nn

_PASSES: Final = {"local_epochs": 1.0, "batch": 32.0}
_MOST: Final = {"local_epochs": 1000, "batch": 65_536}  # whole numbers


class Training(NamedTuple):
    """What a training step takes of a model. `losses` gives one loss for each example: none may depend on another."""

    module: nn.Module
    groups: list[ParameterGroup]
    examples: Examples[Any]
    losses: Callable[[nn.Module, Any], Tensor]


class Trains(Protocol):
    """What adapter training asks of a model."""

    def arrays(self, names: Sequence[str] | None = None) -> dict[str, Array]: ...

    def hyperparameters(self, *, private: bool) -> dict[str, float]:
        """What a round may set of the model's training, with what it gets otherwise, finite and not negative: learning rates
        (SGD's under DP, else AdamW's), and what its losses depend on."""

    def training(
        self, examples: Any, names: Sequence[str], settings: Mapping[str, float]
    ) -> AbstractContextManager[Training | None]:
        """The tensors `names` ready to be trained on the examples, in place; None if all have learning rate 0, which freezes."""


class AdapterTraining:
    """DP-SGD under a mechanism, for its steps; else AdamW, in an order that follows from the round's number.

    With `freezes_a` the A factors, which all devices share, stay as they are: averaging B is then exact.
    """

    kind: Literal["sums", "train"] = "train"
    combines: Literal["sum", "mean"] | Combine = "mean"
    from_base = True

    def __init__(self, name: str, *, freezes_a: bool) -> None:
        self.name = name
        self._freezes_a = freezes_a

    def upload(self, release: Sequence[str]) -> list[str]:
        return [name for name in release if not is_fixed(name) and not (self._freezes_a and name.endswith(".A"))]

    def specs(self, opened: RoundOpened, base: Arrays) -> list[TensorSpec]:
        if missing := [name for name in opened.upload if name not in base]:
            raise TensorError(f"the base release has no {missing[0]}")
        return tensors.specs({name: base[name] for name in opened.upload})

    def smaller(self, opened: RoundOpened, base: Arrays) -> list[list[TensorSpec]]:
        return []

    def largest(self, base: Arrays) -> Arrays:
        return base

    def compute(self, model: Trains, examples: Sequence[Any], opened: RoundOpened) -> dict[str, Array]:
        """See `Program`; raises what `dp_sgd` raises. Afterwards `model` holds the trained tensors."""
        settings = _settings(model, opened)
        with model.training(examples, opened.upload, settings) as training:
            if training is not None:
                _fit(training, opened, settings)
        return model.arrays(opened.upload)

    def apply(self, opened: RoundOpened, base: Arrays, combined: Arrays) -> dict[str, Array]:
        return {name: combined.get(name, values) for name, values in base.items()}


def default_hyperparameters(model: Trains, *, private: bool) -> dict[str, float]:
    """The hyperparameters that a round may set, with what it gets otherwise: the model's; without DP also the
    passes over the device's examples, and how many make a batch.

    What has learning rate 0 is frozen and takes no part of the clip norm.
    """
    return model.hyperparameters(private=private) | ({} if private else _PASSES)


def _settings(model: Trains, opened: RoundOpened) -> dict[str, float]:
    """The round's hyperparameters, checked; names that are not the program's are others' and pass unread."""
    settings = default_hyperparameters(model, private=opened.mechanism is not None)
    for name in settings:
        value = settings[name] = opened.hyperparameters.get(name, settings[name])
        most = _MOST.get(name)
        if not (math.isfinite(value) and value >= 0):
            raise TermsError(f"hyperparameter {name} must be finite and not negative, not {value!r}")
        if most is not None and not (float(value).is_integer() and 1 <= value <= most):
            raise TermsError(f"hyperparameter {name} must be a whole number from 1 to {most}, not {value!r}")
    return settings


def _fit(training: Training, opened: RoundOpened, settings: Mapping[str, float]) -> None:
    import torch
    from fedloop_privacy.dp.dpsgd import dp_sgd, plain_sgd

    if opened.mechanism is not None:
        dp_sgd(*training, opened.mechanism)
        return
    plain_sgd(
        *training,
        epochs=int(settings["local_epochs"]),
        batch_size=int(settings["batch"]),
        seed=opened.number,
        make_optimizer=partial(torch.optim.AdamW, weight_decay=0.0),
    )
