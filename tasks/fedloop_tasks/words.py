"""Words and texts as people compare them, not byte by byte."""

from __future__ import annotations

import unicodedata
from typing import Final

_UNSEEN: Final = frozenset({"Cf", "Cc"})


def normalised(text: str) -> str:
    """`text` in NFC, without characters that show nothing, each stretch of white space one space, and none at the ends.

    Two texts that look the same in the same script are mostly equal then (UAX 15, UTS 39). Upper and lower case stay.
    """
    seen = "".join(char for char in text if char.isspace() or unicodedata.category(char) not in _UNSEEN)
    return " ".join(unicodedata.normalize("NFC", seen).split())
