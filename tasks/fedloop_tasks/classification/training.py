"""A classifier's examples as its trainable part takes them, and their losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

if TYPE_CHECKING:
    from fedloop_tasks.classification.model import EmbeddingClassifier

Batch = tuple[tuple[Tensor, ...], Tensor]
"""What the module takes, and the number of each example's class."""


def learning_rate(name: str, rates: Mapping[str, float]) -> float:
    """The learning rate of the tensor `name`."""
    kind = "lora_lr" if name.startswith("lora.") else "bias_lr" if name == "head.bias" else "head_lr"
    return rates[kind]


class Texts:
    """Examples as the adapted layers take them: states and mask."""

    def __init__(self, model: EmbeddingClassifier, texts: Sequence[str], of_class: NDArray[np.int64]) -> None:
        self._model, self._texts, self._of_class = model, texts, of_class
        self.lengths: Sequence[int] = model.lengths(texts)

    def collate(self, indices: Sequence[int]) -> Batch:
        batch = self._model.batch([self._texts[i] for i in indices])
        return batch, torch.from_numpy(self._of_class[list(indices)]).to(self._model.device)


class Inputs:
    """Examples as the head takes them: sentence embeddings, which stay the same as long as only the head is trained."""

    def __init__(self, model: EmbeddingClassifier, texts: Sequence[str], of_class: NDArray[np.int64]) -> None:
        self._inputs = torch.from_numpy(model.embed(texts)).to(model.device)
        self._of_class = torch.from_numpy(of_class).to(model.device)
        self.lengths: Sequence[int] = [1] * len(texts)

    def collate(self, indices: Sequence[int]) -> Batch:
        return (self._inputs[list(indices)],), self._of_class[list(indices)]


def losses(module: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of each example by itself: [B]."""
    inputs, of_class = batch
    return F.cross_entropy(module(*inputs), of_class, reduction="none")
