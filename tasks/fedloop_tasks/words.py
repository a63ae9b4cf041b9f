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
    plain = " ".join(text.split())
    if plain.isascii() and plain.isprintable():
        return plain  # the same, and at once: every character shows something
    seen = (char for char in text if char.isspace() or not (char in _BLANK or unicodedata.category(char) in _CATEGORIES))
    return " ".join(unicodedata.normalize("NFC", "".join(seen)).split())


class Index:
    """Finds the one of `words` that a text is, once both are normalised."""

    def __init__(self, words: Iterable[str]) -> None:
        self._exact: dict[str, str] = {}
        self._folded: dict[str, str] = {}
        for word in words:
            self._exact.setdefault(normalised(word), word)
            self._folded.setdefault(normalised(word).casefold(), word)

    def find(self, given: str, *, any_case: bool = False) -> str | None:
        """That word, or None; with `any_case` also one in another case, unless one is in the same."""
        wanted = normalised(given)
        found = self._exact.get(wanted)
        return self._folded.get(wanted.casefold()) if found is None and any_case else found


def find(given: str, words: Sequence[str], *, any_case: bool = False) -> str | None:
    """`Index.find`, for one text."""
    return given if given in words else Index(words).find(given, any_case=any_case)


def alike(words: Iterable[str]) -> list[list[str]]:
    """The words that differ in case alone, together."""
    groups: dict[str, list[str]] = {}
    for word in words:
        groups.setdefault(normalised(word).casefold(), []).append(word)
    return [group for group in groups.values() if len(group) > 1]
