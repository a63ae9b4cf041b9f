"""What a device computes in a round: noisy class sums, or an adapter trained on its own examples.

`RoundOpened.upload` names the tensors that are trained and sent, and all others stay as they are: without A it is FFA-LoRA (Sun
et al. 2024), with the head alone it is linear probing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F
from fedloop_events.errors import FedloopError
from fedloop_events.types import RoundOpened
from fedloop_privacy.dpsgd import Examples, ParameterGroup, dp_sgd, plain_sgd
from fedloop_privacy.sums import class_sums
from numpy.typing import NDArray
from torch import Tensor, nn

from fedloop_clients.model import Arrays, EmbeddingClassifier

SUMS = "sums"
"""The one tensor of an update of kind "sums"."""
_MOST_EPOCHS, _MOST_BATCH = 1000, 65_536


class TermsError(FedloopError):
    """A round asks for something this trainer does not do."""


_DP = {"head_lr": 40.0, "bias_lr": 0.0, "lora_lr": 4.0}
_PLAIN = {"head_lr": 0.05, "bias_lr": 0.05, "lora_lr": 0.002, "local_epochs": 1.0, "batch": 32.0}
_WHOLE = {"local_epochs": 1000, "batch": 65_536}  # whole numbers, and the most they may be


def default_hyperparameters(dp: bool) -> dict[str, float]:
    """The hyperparameters that a round may set, with what it gets otherwise: learning rates of the head's weight, its bias and
    the adapter (SGD's under DP, else AdamW's); without DP also the passes over the device's examples, and how many make a batch.

    What has learning rate 0 is frozen and takes no part of the clip norm. Under DP the bias is: between devices with different
    labels it learns their priors alone.
    """
    return dict(_DP if dp else _PLAIN)


def train(model: EmbeddingClassifier, texts: Sequence[str], labels: Sequence[str], opened: RoundOpened) -> Arrays:
    """One device's contribution to the round `opened`: exactly the tensors `opened.upload`, float32. `model` holds the base
    release, and afterwards the trained one.

    - kind "sums": the sum of the sentence embeddings of each class [classes, d];
    - kind "train" with a mechanism: DP-SGD for `mechanism.steps` steps;
    - kind "train" without: AdamW for `local_epochs` over batches of `batch`, in an order that follows from the round's number.

    An example whose label the model does not know takes no part. Under a mechanism what comes out costs exactly that mechanism
    for one example more or less; there may be no examples at all. Raises TermsError for terms that cannot be followed,
    TensorError for a tensor that is not the model's, and what `dp_sgd` and `class_sums` raise.
    """
    if len(texts) != len(labels):
        raise TermsError(f"{len(texts)} texts and {len(labels)} labels")
    settings = _settings(opened)
    of_class = model.label_ids(labels)
    known = np.flatnonzero(of_class >= 0)
    texts, of_class = [texts[i] for i in known.tolist()], of_class[known]
    if opened.kind == "sums":
        if opened.upload != [SUMS]:
            raise TermsError(f"a round of sums has one tensor, {SUMS!r}, to upload")
        return {SUMS: _sums(model, texts, of_class, opened)}
    rates = {name: _learning_rate(name, settings) for name in opened.upload}
    with model.trainable([name for name in rates if rates[name] > 0]) as chosen:
        if chosen:
            _fit(model, chosen, texts, of_class, opened, settings)
    return model.arrays(opened.upload)


def _settings(opened: RoundOpened) -> dict[str, float]:
    """The round's hyperparameters, checked; names that are not the trainer's are the server's own and pass unread."""
    settings = default_hyperparameters(dp=opened.mechanism is not None)
    for name in settings:
        value = settings[name] = opened.hyperparameters.get(name, settings[name])
        most = _WHOLE.get(name)
        if not (math.isfinite(value) and value >= 0):
            raise TermsError(f"hyperparameter {name} must be finite and not negative, not {value!r}")
        if most is not None and not (float(value).is_integer() and 1 <= value <= most):
            raise TermsError(f"hyperparameter {name} must be a whole number from 1 to {most}, not {value!r}")
    return settings


def _learning_rate(name: str, settings: Mapping[str, float]) -> float:
    kind = "lora_lr" if name.startswith("lora.") else "bias_lr" if name == "head.bias" else "head_lr"
    return settings[kind]


def _sums(
    model: EmbeddingClassifier, texts: Sequence[str], of_class: NDArray[np.int64], opened: RoundOpened
) -> NDArray[np.float32]:
    embeddings, classes = model.embed(texts), len(model.spec.labels)
    if opened.mechanism is not None:
        return class_sums(embeddings, of_class, classes, opened.mechanism)
    total = np.zeros((classes, embeddings.shape[1]))
    np.add.at(total, of_class, embeddings.astype(np.float64))
    return total.astype(np.float32)


def _fit(
    model: EmbeddingClassifier,
    chosen: Mapping[str, nn.Parameter],
    texts: Sequence[str],
    of_class: NDArray[np.int64],
    opened: RoundOpened,
    settings: Mapping[str, float],
) -> None:
    """Train the parameters `chosen` in place. If only the head is among them, its inputs are computed once."""
    groups = [ParameterGroup([p], _learning_rate(name, settings)) for name, p in chosen.items()]
    lora = any(name.startswith("lora.") for name in chosen)
    examples: Examples[_Batch] = _Texts(model, texts, of_class) if lora else _Embedded(model, texts, of_class)
    module = model.tail if lora else model.tail.head
    if opened.mechanism is not None:
        dp_sgd(module, groups, examples, _losses, opened.mechanism)
        return
    plain_sgd(
        module,
        groups,
        examples,
        _losses,
        epochs=int(settings["local_epochs"]),
        batch_size=int(settings["batch"]),
        seed=opened.number,
        make_optimizer=partial(torch.optim.AdamW, weight_decay=0.0),
    )


_Batch = tuple[tuple[Tensor, ...], Tensor]
"""What the module takes, and the number of each example's class."""


class _Texts:
    """Examples as the adapted layers take them: states and mask."""

    def __init__(self, model: EmbeddingClassifier, texts: Sequence[str], of_class: NDArray[np.int64]) -> None:
        self._model, self._texts, self._of_class = model, texts, of_class
        self.lengths: Sequence[int] = model.lengths(texts)

    def collate(self, indices: Sequence[int]) -> _Batch:
        batch = self._model.batch([self._texts[i] for i in indices])
        return batch, torch.from_numpy(self._of_class[list(indices)]).to(self._model.device)


class _Embedded:
    """Examples as the head takes them: sentence embeddings, which stay the same as long as only the head is trained."""

    def __init__(self, model: EmbeddingClassifier, texts: Sequence[str], of_class: NDArray[np.int64]) -> None:
        self._inputs = torch.from_numpy(model.embed(texts)).to(model.device)
        self._of_class = torch.from_numpy(of_class).to(model.device)
        self.lengths: Sequence[int] = [1] * len(texts)

    def collate(self, indices: Sequence[int]) -> _Batch:
        return (self._inputs[list(indices)],), self._of_class[list(indices)]


def _losses(module: nn.Module, batch: _Batch) -> Tensor:
    inputs, of_class = batch
    return F.cross_entropy(module(*inputs), of_class, reduction="none")
