"""What a device has to learn from, derived from its interactions whenever it is read: labels are those of the model now."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from fedloop_tasks.task import Interaction

from fedloop_clients.interactions import Interactions
from fedloop_clients.store import Store

Example = tuple[str, str]
"""A masked text and its label."""


class Examples:
    """The examples in a store, for a model with certain labels."""

    def __init__(self, store: Store, interactions: Interactions) -> None:
        self._store, self._interactions = store, interactions
        self._counted: tuple[object, int] = None, 0

    def read(self, labels: Sequence[str]) -> list[Example]:
        """All of them, the oldest response's first."""
        return derive(self._interactions.judged(), labels)

    def count(self, labels: Sequence[str]) -> int:
        """How many there are. They are read again only when the store has changed."""
        state = self._store.changes(), tuple(labels)
        if self._counted[0] != state:
            self._counted = state, len(self.read(labels))
        return self._counted[1]


def derive(interactions: Iterable[Interaction], labels: Sequence[str]) -> list[Example]:
    """An example of every interaction that teaches one of `labels`."""
    taught = ((each.prompt.text, teaches(each, labels)) for each in interactions)
    return [(text, label) for text, label in taught if label is not None]


def teaches(interaction: Interaction, labels: Sequence[str]) -> str | None:
    """The label that its user gave, or wrote as the better answer; else the predicted one, where the user was content with it."""
    label = interaction.label
    if label is None and interaction.edit is not None:
        written = interaction.edit.text.strip().casefold()
        label = next((each for each in labels if each.casefold() == written), None)
    if label is None:
        rating, thumb = interaction.rating, interaction.thumb
        content = thumb == "up" or (thumb is None and rating is not None and rating >= 4)
        label = interaction.predicted if content else None
    return label if label in labels else None
