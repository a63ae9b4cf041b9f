"""Answers as the adapted layers take them, and the losses of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fedloop_tasks.causal.chat import Encoded
from fedloop_tasks.causal.decoder import Prompts

PROMPT_TOKENS: Final = 16
"""Tokens of prompts that are kept, counted as one on which adapters act: at least so much less memory they take in a step."""


class Batch(NamedTuple):
    """States [B, T, d] of the tokens on which adapters act, padded on the right; of each of the n tokens of the answers where the
    one before it stands, and which it is; and what is kept of the tokens before, if there are any."""

    states: Tensor
    rows: Tensor
    columns: Tensor
    wanted: Tensor
    prompts: Prompts | None


class Answers:
    """See `Examples`: `states` gives what the adapted layers get of each example, see `Kept.states`, on the model's device."""

    def __init__(self, encoded: Sequence[Encoded], states: Callable[[Sequence[Encoded]], tuple[Tensor, Prompts | None]]) -> None:
        self._encoded, self._states = encoded, states
        self.lengths: Sequence[int] = [len(each.ids) - 1 - each.begin + each.begin // PROMPT_TOKENS for each in encoded]

    def collate(self, indices: Sequence[int]) -> Batch:
        chosen = [self._encoded[i] for i in indices]
        states, prompts = self._states(chosen)
        answers = [each.ids[each.start :] for each in chosen]
        rows = torch.repeat_interleave(torch.arange(len(chosen)), torch.tensor([len(each) for each in answers]))
        columns = torch.cat([torch.arange(each.start, len(each.ids)) - 1 - each.begin for each in chosen])
        wanted = torch.tensor([n for answer in answers for n in answer])
        rows, columns, wanted = (each.to(states.device) for each in (rows, columns, wanted))
        return Batch(states, rows, columns, wanted, prompts)


def token_losses(module: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Of each token of an answer: its cross entropy, and whether it is the most probable one: [n], [n]."""
    logits = module(batch.states, batch.rows, batch.columns, batch.prompts).float()
    return F.cross_entropy(logits, batch.wanted, reduction="none"), logits.argmax(1) == batch.wanted
