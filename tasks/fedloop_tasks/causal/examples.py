"""What a language model learns from: masked prompts, and the answers that are right for them."""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from fedloop_tasks.task import Interaction
from fedloop_tasks.turns import Turn


class Example(Struct, frozen=True):
    """What was written up to the answer, and the answer. All of it is masked."""

    turns: tuple[Turn, ...]
    answer: str


def examples(interactions: Iterable[Interaction]) -> list[Example]:
    """An example of every response whose user has given a better answer, or was content with it, in the order in which they were
    taught. Of several interactions about one response the latest holds."""
    latest: dict[str, Example] = {}
    for each in interactions:
        content = each.thumb == "up" or (each.thumb is None and (each.rating or 0) >= 4)
        answer = each.edit or (each.response if content else None)
        if answer is not None:
            latest.pop(each.interaction_id, None)
            latest[each.interaction_id] = Example((Turn("user", each.prompt.text),), answer.text)
    return [*latest.values()]
