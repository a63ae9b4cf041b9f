"""Ending an answer where one of some texts would begin in it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedloop_tasks.chats import Answer


def stopped(found: Iterator[Answer], stops: Sequence[str]) -> Iterator[Answer]:
    """The answer as it grows, up to the first of the `stops`, which ends it; each answer is the one before it, or longer.

    What may be the beginning of one of them is held back until it is known.
    """
    answer: Answer | None = None
    for answer in found:
        at = min((place for stop in stops if (place := answer.text.find(stop)) >= 0), default=None)
        if at is not None:
            yield answer._replace(text=answer.text[:at], finished=True)
            return
        yield answer._replace(text=answer.text[: len(answer.text) - _held_back(answer.text, stops)])
    if answer is not None:
        yield answer


def _held_back(text: str, stops: Sequence[str]) -> int:
    """How many characters at the end of the text begin one of the `stops`, at most."""
    return max((n for stop in stops for n in range(1, min(len(stop), len(text) + 1)) if text.endswith(stop[:n])), default=0)
