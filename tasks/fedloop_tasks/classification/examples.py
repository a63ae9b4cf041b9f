"""What a classifier learns from: masked texts and labels, as users' reactions teach them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from msgspec import Struct

from fedloop_tasks import words
from fedloop_tasks.task import Interaction


class Example(Struct, frozen=True):
    """A masked text, and the label that is right for it."""

    text: str
    label: str


def examples(interactions: Iterable[Interaction], labels: Sequence[str]) -> list[Example]:
    """An example of every response whose user teaches one of `labels`, in the order in which they were taught.

    Of several interactions about one response the latest that names a label holds; where none does, the latest thumb or rating.
    """
    known, index = set(labels), words.Index(labels)
    latest: dict[str, tuple[int, str | None, str]] = {}
    for each in interactions:
        label, standing = _taught(each, index)
        if standing >= latest.get(each.interaction_id, (0,))[0]:
            latest.pop(each.interaction_id, None)  # so that it stands where the one that holds does
            latest[each.interaction_id] = (standing, label, each.prompt.text)
    return [Example(text, label) for _, label, text in latest.values() if label is not None and label in known]


def _taught(given: Interaction, index: words.Index) -> tuple[str | None, int]:
    """The label that is taught (the one given, or the predicted one where the user was content with it), and how much that weighs
    beside others about the response: 2 if it names a label, 1 if it judges the predicted one, else 0."""
    if given.label is not None:
        return given.label, 2
    if given.edit is not None:
        named = index.find(given.edit.text, any_case=True)
        if named is not None:
            return named, 2
    content = given.thumb == "up" or (given.thumb is None and given.rating is not None and given.rating >= 4)
    remark_only = given.thumb is None and given.rating is None and given.edit is None
    return given.predicted if content else None, 0 if remark_only else 1
