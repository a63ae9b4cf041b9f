"""What a language model learns from: masked prompts, and the answers that are right for them."""

from __future__ import annotations

from msgspec import Struct

from fedloop_tasks.causal.turns import Turn


class Example(Struct, frozen=True):
    """What was written up to the answer, and the answer. All of it is masked."""

    turns: tuple[Turn, ...]
    answer: str
