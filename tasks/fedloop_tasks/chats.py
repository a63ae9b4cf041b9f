"""Conversations, and what a model does that answers in them. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

from fedloop_tasks.task import Model
from fedloop_tasks.turns import Turn


class Answer(NamedTuple):
    """What a model has written, and how probable its tokens were on average (their geometric mean)."""

    text: str
    tokens: int
    confidence: float
    finished: bool
    """Whether it was ended by the model, not by the bound on its tokens."""
    cut: int
    """How many tokens of the prompt were cut off at its beginning."""


class Chats(Model, Protocol):
    """A model that answers in words of its own."""

    @property
    def context(self) -> int:
        """How many tokens a prompt and its answer can have together."""

    @property
    def longest_answer(self) -> int:
        """How many tokens an answer has at most, unless its reader asks for more."""

    def prompt_tokens(self, turns: Sequence[Turn]) -> int:
        """How many tokens the turns have. Raises `ModelError` for turns that the model's template does not take."""

    def writing(self, turns: Sequence[Turn], *, most: int, temperature: float, seed: int) -> Iterator[Answer]:
        """The answer as it is written, at least once: each is as long as the one before it or longer, and the last is whole.

        It has at most `most` tokens. Greedy, or at a temperature above 0 drawn, and then the same for the same seed.
        """
