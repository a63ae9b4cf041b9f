"""Label shift: whether the labels of late are distributed as those of before, by the population stability index."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from msgspec import Struct, field

NAME: Final = "psi"
REFERENCE: Final = 1000
"""Labels that the later ones are compared with: the first after a shift, or from the beginning."""
PART: Final = 125
PARTS: Final = 4
"""The last so many parts are compared with the reference, each time that one is full."""
MAX_LABELS: Final = 128
"""Those met later are counted as one."""
FEWEST: Final = 10
"""Labels met less often, in both together, are counted as one: an index of single ones is mostly chance."""
LEAST_INDEX: Final = 0.1
"""What the industry's habit calls a moderate shift, from .1 on, and a significant one, from .25 on."""
DEVIATIONS: Final = 4.0
"""How far beyond chance, in standard deviations of a normal distribution: the same labels are looked at many times."""


class Labels(Struct):
    """Counts by label, in the order in which they were met. At most 128 names and five counts of each."""

    names: list[str] = field(default_factory=lambda: [""])
    """The first stands for all those that have no place of their own."""
    reference: list[int] = field(default_factory=lambda: [0])
    recent: list[list[int]] = []
    seen: int = 0


def observe(labels: Labels, label: str) -> float | None:
    """Take in one label; the index, if this one shows a shift. After that everything begins anew."""
    place = _place(labels, label)
    labels.seen += 1
    if labels.seen <= REFERENCE:
        _count(labels.reference, place)
        return None
    if (labels.seen - REFERENCE) % PART == 1:
        labels.recent.append([])
    _count(labels.recent[-1], place)
    if (labels.seen - REFERENCE) % PART or len(labels.recent) < PARTS:
        return None
    index, chance = stability_index(labels.reference, [sum(each) for each in _columns(labels)])
    if index > max(LEAST_INDEX, chance):
        labels.names, labels.reference, labels.recent, labels.seen = [""], [0], [], 0
        return index
    del labels.recent[0]
    return None


def stability_index(reference: Sequence[int], recent: Sequence[int]) -> tuple[float, float]:
    """The population stability index of two samples of counts, and the most that chance explains.

    Of two samples of n and m from one distribution over k labels the index is about (1/n + 1/m) times chi-squared with k - 1
    degrees of freedom (Yurdakul and Naranjo 2020, Journal of Risk Model Validation 14(4)), here by Wilson and Hilferty's
    approximation: with many labels the habit's fixed .25 is less than chance.
    """
    pairs = [(a, b) for a, b in zip(reference, recent, strict=True) if a + b >= FEWEST]
    rare = (sum(reference) - sum(a for a, _ in pairs), sum(recent) - sum(b for _, b in pairs))
    pairs += [rare] if sum(rare) else []
    n, m = (sum(column) + len(pairs) / 2 for column in zip(*pairs, strict=True))
    shares = [((a + 0.5) / n, (b + 0.5) / m) for a, b in pairs]
    index = sum((q - p) * math.log(q / p) for p, q in shares)
    freedom = max(1, len(pairs) - 1)
    spread = 2 / (9 * freedom)
    chance = (1 / n + 1 / m) * freedom * (1 - spread + DEVIATIONS * math.sqrt(spread)) ** 3
    return index, chance


def _place(labels: Labels, label: str) -> int:
    if label in labels.names:
        return labels.names.index(label)
    if len(labels.names) > MAX_LABELS:
        return 0
    labels.names.append(label)
    return len(labels.names) - 1


def _count(counts: list[int], place: int) -> None:
    counts.extend([0] * (place + 1 - len(counts)))
    counts[place] += 1


def _columns(labels: Labels) -> list[tuple[int, ...]]:
    """By label, the counts of each recent part."""
    for counts in (labels.reference, *labels.recent):
        counts.extend([0] * (len(labels.names) - len(counts)))
    return list(zip(*labels.recent, strict=True))
