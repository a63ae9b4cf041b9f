"""The sentiment of a masked comment: VADER (Hutto & Gilbert 2014, ICWSM-14), a lexicon with rules for English."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import TYPE_CHECKING, Final

from fedloop_events.errors import UsageError
from fedloop_privacy.masking.spans import PLACEHOLDER

if TYPE_CHECKING:
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

MAX_CHARS: Final = 1_000
"""Of a comment: VADER is made for short texts, and takes time that more than grows with their length."""

_WORD: Final = re.compile(r"[^\W\d_]+")
_ENGLISH_WORDS: Final = (
    "the and this that you your of for with have has are but what my they it to not be would very can should will how its"
)
_FOREIGN_WORDS: Final = (
    "der die das und ist nicht ich ein eine mit auf zu war sehr les le la et est pas je une des du que qui dans pour avec trop"
    " el los las por para con muy es en un una che di il per sono molto não nao uma um de het een niet ik van nie jest og och"
    " inte det"
)
"""The commonest words of some neighbours of English, which VADER would take for English ones: "die", "war"."""

_ENGLISH, _FOREIGN = frozenset(_ENGLISH_WORDS.split()), frozenset(_FOREIGN_WORDS.split())


def sentiment(comment: str) -> float | None:
    """From -1 to 1; None for what does not look English, by its commonest words, and for what no rule says anything about."""
    text = PLACEHOLDER.sub(" ", comment[:MAX_CHARS])
    words = _WORD.findall(text.lower())
    english = sum(word in _ENGLISH for word in words)
    foreign = sum(word in _FOREIGN for word in words)
    if foreign and foreign >= english:
        return None
    score = float(_vader().polarity_scores(text)["compound"])
    return score if english or score else None


@lru_cache(maxsize=1)
def _vader() -> SentimentIntensityAnalyzer:
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError as error:
        raise UsageError(
            f"scoring comments needs the package {error.name}, which is not installed", hint="pip install 'fedloop[feedback]'"
        ) from None

    return SentimentIntensityAnalyzer()
