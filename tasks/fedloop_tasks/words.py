"""Words and texts as people compare them, not byte by byte."""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import Final

_CATEGORIES: Final = frozenset({"Cf", "Cc"})
_BLANK: Final = frozenset("\u034f\u115f\u1160\u17b4\u17b5\u2800\u3164\uffa0") | {chr(code) for code in range(0xFE00, 0xFE10)}
"""Fillers, variation selectors and the like: letters and marks by category, which show nothing."""


def normalised(text: str) -> str:
    """`text` in NFC, without characters that show nothing, each stretch of white space one space, and none at the ends.

    What is left of a text that shows nothing is "". Upper and lower case stay. See UAX 15, and UAX 44 for what can be ignored.
    """
    seen = (char for char in text if char.isspace() or not (char in _BLANK or unicodedata.category(char) in _CATEGORIES))
    return " ".join(unicodedata.normalize("NFC", "".join(seen)).split())


def find(given: str, words: Sequence[str], *, any_case: bool = False) -> str | None:
    """The one of `words` that `given` is, once both are normalised; with `any_case` also one in another case."""
    if given in words:
        return given
    wanted = normalised(given)
    found = next((word for word in words if normalised(word) == wanted), None)
    if found is None and any_case:
        return next((word for word in words if normalised(word).casefold() == wanted.casefold()), None)
    return found


def alike(words: Iterable[str]) -> list[list[str]]:
    """The words that differ in case alone, together."""
    groups: dict[str, list[str]] = {}
    for word in words:
        groups.setdefault(normalised(word).casefold(), []).append(word)
    return [group for group in groups.values() if len(group) > 1]
