"""Examples as the adapted layers take them, and their losses."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedloop_tasks.causal.chat import Encoded


class Batch(NamedTuple):
    """States [B, T, d] padded on the right; of each of the n tokens of the answers where the one before it stands,
    and which it is."""

    states: Tensor
    rows: Tensor
    columns: Tensor
    wanted: Tensor


class Answers:
    """See `Examples`: `states` gives what the adapted layers get of each example, padded [B, T, d], on the model's device."""

    def __init__(self, encoded: Sequence[Encoded], states: Callable[[Sequence[Encoded]], Tensor]) -> None:
        self._encoded, self._states = encoded, states
        self.lengths: Sequence[int] = [len(each.ids) - 1 for each in encoded]

    def collate(self, indices: Sequence[int]) -> Batch:
        chosen = [self._encoded[i] for i in indices]
        states = self._states(chosen)
        answers = [each.ids[each.start :] for each in chosen]
        rows = torch.repeat_interleave(torch.arange(len(chosen)), torch.tensor([len(each) for each in answers]))
        columns = torch.cat([torch.arange(each.start, len(each.ids)) - 1 for each in chosen])
        wanted = torch.tensor([n for answer in answers for n in answer])
        return Batch(states, *(each.to(states.device) for each in (rows, columns, wanted)))


def token_losses(module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each token of an answer: its cross entropy, and whether it is the most probable one: [n], [n]."""
    logits = module(batch.states, batch.rows, batch.columns).float()
    return F.cross_entropy(logits, batch.wanted, reduction="none"), logits.argmax(1) == batch.wanted


def losses(module: nn.Module, batch: Batch) -> Tensor:
    """The mean over each example's own answer: [B]. The loss that Transformers computes from `labels` is the mean over the tokens
    of the whole batch, so that an example's gradient would depend on the others."""
    each, _ = token_losses(module, batch)
    size = len(batch.states)
    return each.new_zeros(size).index_add(0, batch.rows, each) / torch.bincount(batch.rows, minlength=size)
