"""Refuses a model that cannot be trained right: by what it computes, not by its name."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from fedloop_tasks.causal.chat import Encoded
from fedloop_tasks.causal.decoder import Tail, Trunk
from fedloop_tasks.causal.preferences import SETTINGS, EncodedFeedback, FeedbackExamples, losses
from fedloop_tasks.causal.training import Answers
from fedloop_tasks.task import ModelError

_LOGITS: Final = {torch.float32: 1e-3, torch.bfloat16: 0.08}
_GRADIENTS: Final = {torch.float32: 1e-2, torch.bfloat16: 0.25}
"""Relative, by the type of the base's states: far above its rounding, which in bfloat16 is another one in a batch than alone, and
below what a mean over the batch's tokens does."""
_ROWS: Final = (9, 23)
"""Tokens of the texts that are tried; the first one is padded."""


def sample(vocabulary: int) -> list[list[int]]:
    """Texts of tokens that follow from nothing."""
    random = np.random.Generator(np.random.PCG64(0))
    return [random.integers(0, vocabulary, size).tolist() for size in _ROWS]


@torch.no_grad()
def logits_of(base: Any, texts: Sequence[Sequence[int]]) -> list[Tensor]:
    """Of every token, by the whole model and one text at a time: [T, V]."""
    place = base.get_input_embeddings().weight.device
    return [base(input_ids=torch.tensor([list(ids)], device=place), use_cache=False).logits[0].cpu() for ids in texts]


@torch.no_grad()
def check_split(trunk: Trunk, tail: Tail, texts: Sequence[Sequence[int]], whole: Sequence[Tensor], name: str) -> None:
    """Raises ModelError unless the split model gives of all texts at once what the whole one gave of each."""
    ids = nn.utils.rnn.pad_sequence([torch.tensor(list(each)) for each in texts], batch_first=True)
    states = trunk(ids.to(next(trunk.parameters()).device))
    for row, wanted in enumerate(whole):
        columns = torch.arange(len(wanted), device=states.device)
        _check_logits(tail(states, torch.full_like(columns, row), columns).cpu(), wanted, name)


@torch.no_grad()
def check_kept(tail: Tail, texts: Sequence[Encoded], answers: Answers, whole: Sequence[Tensor], name: str) -> None:
    """Raises ModelError unless the `answers` of the texts have the logits of the whole model, after what is kept of each."""
    batch = answers.collate(range(len(texts)))
    found = tail(batch.states, batch.rows, batch.columns, batch.prompts).cpu()
    _check_logits(found, torch.cat([logits[each.start - 1 : -1] for each, logits in zip(texts, whole, strict=True)]), name)


def _check_logits(found: Tensor, wanted: Tensor, name: str) -> None:
    if not torch.allclose(found.float(), wanted.float(), atol=_LOGITS[wanted.dtype] * float(wanted.abs().max())):
        raise ModelError(
            f"the layers of {name!r} need more than states and positions, or see what follows a token",
            hint="use a plain LLaMA, Mistral, Qwen2 or GPT-2",
        )


def feedback(
    texts: Sequence[Encoded],
    answers: Callable[[Sequence[Encoded]], Answers],
    reference: Callable[[Sequence[Encoded]], list[float]],
) -> FeedbackExamples:
    """An example of each kind, of the answers of two texts.

    One of them is tried as if it had become more probable than by the base, and the other less: where all are as probable, a loss
    is nearly straight and shows little of what it depends on.
    """

    def shifted(given: Sequence[Encoded]) -> list[float]:
        middle = sum(_ROWS) / len(_ROWS)
        return [value + len(each.ids) - middle for each, value in zip(given, reference(given), strict=True)]

    short, long = texts
    examples = [
        EncodedFeedback((short,), sft=1.0),
        EncodedFeedback((short, long), dpo=1.0),
        EncodedFeedback((long,), kto=1.0),
        EncodedFeedback((short,), kto=-1.0),
        EncodedFeedback((long, short), sft=1.0, dpo=1.0),
    ]
    return FeedbackExamples(examples, answers, shifted, SETTINGS)


def check_gradients(
    tail: Tail, tensors: Mapping[str, nn.Parameter], chosen: Mapping[str, nn.Parameter], examples: FeedbackExamples, name: str
) -> None:
    """Raises ModelError unless the gradients of the tensors `chosen` in one batch are those of each example by itself.

    The release's `tensors` are tried at other values than they have, at which no gradient is zero, and get theirs back.
    """
    from fedloop_privacy.dp.dpsgd import example_gradients

    most = _GRADIENTS[next(tail.norm.parameters()).dtype]
    kept = {key: p.detach().clone() for key, p in tensors.items()}
    random = torch.Generator().manual_seed(0)
    try:
        with torch.no_grad():
            for p in tensors.values():
                p.copy_((torch.randn(p.shape, generator=random) * 0.02).to(p))
        count = len(examples.lengths)
        together = example_gradients(tail, list(chosen.values()), examples, losses, range(count))
        for row in range(count):
            alone = torch.autograd.grad(losses(tail, examples.collate([row]))[0], list(chosen.values()))
            for key, found, wanted in zip(chosen, together, alone, strict=True):
                if not torch.linalg.vector_norm(found[row] - wanted) <= most * torch.linalg.vector_norm(wanted) + 1e-8:
                    raise ModelError(
                        f"{key} of {name!r} gets another gradient in a batch than by itself", hint="choose other targets"
                    )
    finally:
        with torch.no_grad():
            for key, p in tensors.items():
                p.copy_(kept[key])
