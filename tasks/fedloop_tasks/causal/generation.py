"""An answer, token by token, over a cache of keys and values."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import nullcontext
from typing import Final

import torch
from torch import Tensor
from transformers import DynamicCache

from fedloop_tasks.causal.decoder import Tail, Trunk
from fedloop_tasks.chats import Answer
from fedloop_tasks.models.lora import acting_from

_UNFINISHED: Final = "\ufffd"
"""What stands at the end of a text whose last character is not whole yet."""


@torch.no_grad()
def tokens(
    trunk: Trunk,
    tail: Tail,
    prompt: Sequence[int],
    *,
    begin: int,
    most: int,
    ends: Collection[int],
    temperature: float,
    seed: int,
) -> Iterator[tuple[int, float]]:
    """At most `most` tokens after the prompt, each with its log-probability; the last is one of `ends`, unless they are too many.

    The most probable one, or at a temperature above 0 one drawn with that seed. Adapters act from the prompt's token `begin` on.
    """
    device = tail.norm.weight.device
    assert isinstance(device, torch.device)
    random, cache = torch.Generator().manual_seed(seed), DynamicCache()
    ids, start = torch.tensor([list(prompt)], device=device), 0
    for _ in range(most):
        states = trunk(ids, cache, start)
        with acting_from(tail, begin - start) if start < begin else nullcontext():
            found = tail.run(states, cache, torch.tensor([start], device=device) if start else None)
        logits = tail.head(tail.norm(found[:, -1]))[0].double().cpu()
        chosen = _chosen(logits, temperature, random)
        yield chosen, float(logits.log_softmax(0)[chosen])
        if chosen in ends:
            return
        ids, start = torch.tensor([[chosen]], device=device), start + ids.shape[1]


def _chosen(logits: Tensor, temperature: float, random: torch.Generator) -> int:
    if temperature == 0:
        return int(logits.argmax())
    return int(torch.multinomial((logits / temperature).softmax(0), 1, generator=random))


def writing(
    found: Iterator[tuple[int, float]], decode: Callable[[Sequence[int]], str], ends: Collection[int], cut: int
) -> Iterator[Answer]:
    """The answer of the tokens `found` as it grows, by whole characters; the last one is whole."""
    ids: list[int] = []
    text, sum_of_logs, count, finished = "", 0.0, 0, False
    for token, log in found:
        sum_of_logs, count = sum_of_logs + log, count + 1
        if finished := token in ends:
            break
        ids.append(token)
        now = decode(ids)
        if len(now) > len(text) and not now.endswith(_UNFINISHED) and now.startswith(text):
            text = now
            yield Answer(text, count, math.exp(sum_of_logs / count), finished, cut)
    yield Answer(decode(ids), count, math.exp(sum_of_logs / count) if count else 0.0, finished, cut)
