"""A classifier's examples as its trainable part takes them, and their losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

Batch = tuple[tuple[Tensor, ...], Tensor]
"""What the module takes, and the number of each example's class."""


def learning_rate(name: str, rates: Mapping[str, float]) -> float:
    """The learning rate of the tensor `name`."""
    kind = "lora_lr" if name.startswith("lora.") else "bias_lr" if name == "head.bias" else "head_lr"
    return rates[kind]


class Texts:
    """Examples as the adapted layers take them: states and mask, which `batch` gives of texts. `of_class` [n]."""

    def __init__(
        self,
        texts: Sequence[str],
        lengths: Sequence[int],
        of_class: Tensor,
        batch: Callable[[Sequence[str]], tuple[Tensor, Tensor]],
    ) -> None:
        self._texts, self._of_class, self._batch = texts, of_class, batch
        self.lengths = lengths

    def collate(self, indices: Sequence[int]) -> Batch:
        return self._batch([self._texts[i] for i in indices]), self._of_class[list(indices)]


class Inputs:
    """Examples as the head takes them: sentence embeddings [n, d], which stay the same as long as only the head is trained."""

    def __init__(self, inputs: Tensor, of_class: Tensor) -> None:
        self._inputs, self._of_class = inputs, of_class
        self.lengths: Sequence[int] = [1] * len(of_class)

    def collate(self, indices: Sequence[int]) -> Batch:
        return (self._inputs[list(indices)],), self._of_class[list(indices)]


def losses(module: nn.Module, batch: Batch) -> Tensor:
    """Cross entropy of each example by itself: [B]."""
    inputs, of_class = batch
    return F.cross_entropy(module(*inputs), of_class, reduction="none")
