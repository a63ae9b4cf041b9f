"""What a language model learns from: masked prompts, and what users made of the answers to them. All of it is masked."""

from __future__ import annotations

from msgspec import Struct

from fedloop_tasks.turns import Turn


class Example(Struct, frozen=True):
    """What was written up to the answer, and the answer to learn."""

    turns: tuple[Turn, ...]
    answer: str


class Judged(Struct, frozen=True):
    """An answer with a thumb, up or down."""

    turns: tuple[Turn, ...]
    answer: str
    good: bool


class Pair(Struct, frozen=True):
    """Two answers to the same turns, of which one is preferred."""

    turns: tuple[Turn, ...]
    chosen: str
    rejected: str
    learn: bool = False
    """Whether the chosen one is an answer to learn as well, as a correction is. It is one example so: two, a pair and an
    `Example`, would let one correction move a private step by twice the clip norm."""


Feedback = Example | Judged | Pair
