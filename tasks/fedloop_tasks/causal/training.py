"""Answers as the adapted layers take them, and the losses of their tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from fedloop_tasks.causal.chat import Encoded
from fedloop_tasks.causal.decoder import Prompts, Tail

PROMPT_TOKENS: Final = 16
"""Tokens of prompts that are kept, counted as one on which adapters act: at least so much less memory they take in a step."""
HEAD_TOKENS: Final = 64
"""Whose logits are there at once: 13 MB of a vocabulary of 50,000."""


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
    assert isinstance(module, Tail)
    states = module.read(batch.states, batch.rows, batch.columns, batch.prompts)
    losses, hits = _Losses.apply(states, module.head, batch.wanted)  # type: ignore[no-untyped-call]
    return losses, hits


class _Losses(Function):
    """Cross entropy over a frozen head, some tokens at a time: logits of all would be most of a step's memory.

    A token's loss depends on its own states alone, so its gradient is computed beside it and waits for the backward pass.
    """

    @staticmethod
    def forward(ctx: Any, states: Tensor, head: nn.Module, wanted: Tensor) -> tuple[Tensor, Tensor]:
        gradients, losses, hits = torch.empty_like(states), [], []
        for start in range(0, len(states), HEAD_TOKENS):
            some = slice(start, start + HEAD_TOKENS)
            logits, own = head(states[some]).float(), wanted[some, None]
            sums = logits.logsumexp(1, keepdim=True)
            losses.append((sums - logits.gather(1, own)).squeeze(1))
            hits.append(logits.argmax(1) == wanted[some])
            if ctx.needs_input_grad[0]:
                change = logits.sub_(sums).exp_().scatter_add_(1, own, -torch.ones_like(sums))
                gradients[some] = change.to(states) @ head.weight
        hit = torch.cat(hits)
        ctx.save_for_backward(gradients)
        ctx.mark_non_differentiable(hit)
        return torch.cat(losses), hit

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, losses: Tensor, _: Tensor) -> tuple[Tensor, None, None]:
        (gradients,) = ctx.saved_tensors
        return gradients * losses[:, None].to(gradients), None, None
