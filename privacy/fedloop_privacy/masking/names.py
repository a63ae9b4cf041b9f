"""Names of people and places in a folded text, by lists, letter case, neighbours and the words that introduce a name."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import regex

from fedloop_privacy.masking.gazetteer import PARTICLES, Gazetteer, word_set
from fedloop_privacy.masking.spans import Span

_TOKEN = regex.compile(r"(?:[OoDdLl]'(?=\p{L}{3}))?+\p{L}++|\d++")
_IDEOGRAPHS = regex.compile(r"[\p{Han}\p{Katakana}\p{Hiragana}\p{Hangul}ー]++")
_IDEOGRAPHIC_INTRODUCTION = regex.compile(r"(?:我叫|我是|名字是|名字叫|姓名|名前は|私は)[:\s]{0,2}(?<v>\p{Han}{2,4})")
_SPACED_LETTERS = regex.compile(r"(?<!\w)\p{L}(?:[ ._*-]\p{L}){3,30}(?!\w)")
_INTRODUCES_SURELY = regex.compile(
    r"""(?:\b(?:my|his|her|full|last|first|maiden|sur|middle|the|whose|their)\ ?(?:full\ |last\ |first\ )?
        name(?:\ is|'s|\ was|:)
    |\bnames?:|\bname\ =|\b(?:card|account)\ ?holder(?:\ name)?(?:\ is|:)?|\bnamed|\bcalled|\bname\ of
    |\bsigned(?:,|:|\ by)
    |\b(?:regards|sincerely|faithfully|truly|cheers|best\ wishes|yours|respectfully|love),?(?:\ from|\ yours)?
    |\bcalls?\ me|\bname's
    |\bich\ hei(?:ss|sz)e|\bmein\ name\ ist|\bje\ m'appelle|\bme\ llamo|\bmi\ chiamo|\bmi\ nombre\ es)[\s,:-]{1,4}$""",
    regex.VERBOSE | regex.IGNORECASE,
)
_INTRODUCES_WEAKLY = regex.compile(
    r"""\b(?:i'?\ ?am|i'm|im|this\ is|it's|its|hi|hey|hello|dear|thanks|thank\ you|from|with|contact|meet|told|wife|husband|son
    |daughter|brother|sister|mother|father|friend|partner|colleague|manager|agent|for|by|to|and)[\s,:]{1,3}$""",
    regex.VERBOSE | regex.IGNORECASE,
)
_GREETS = regex.compile(
    r"""\b(?:hi|hey|hello|dear|thanks|thank\ you|cheers|regards|sincerely|yours|wife|husband|son|daughter|brother|sister
    |mother|father|friend|partner|colleague)[\s,:]{1,3}$""",
    regex.VERBOSE | regex.IGNORECASE,
)
_LIVES_IN = regex.compile(
    r"""\b(?:(?:live|lives|lived|living|born|based|located|resid(?:e|es|ing)|situated|arriv(?:ed|ing)|staying|stay|work(?:s|ing)?
    |grew\ up|am|are|was|were|being|is)\ in|(?:live|lives|lived|living|based|work(?:s|ing)?)\ (?:at|near)
    |(?:moved?|moving|return(?:s|ed|ing)?|travel(?:l?ing|l?ed)?|flying|flew|fly|going|relocat(?:ed|ing)|trip|flight|ship(?:ped)?)
    \ (?:here\ )?(?:to|from)|i'?\ ?a?m\ from|originally\ from|comes?\ from|visit(?:ing|ed|s)?|city\ of|town\ of|village\ of
    |hometown\ is)\ $""",
    regex.VERBOSE | regex.IGNORECASE,
)
_HONORIFICS = word_set(
    """doctor dr frau herr madam madame miss mme monsieur mr mrs ms mx prof professor senor senora signor signora sir"""
)
# Those that are no other word, so that even an ordinary word after them is a name.
_TITLES = word_set("mr mrs ms dr")
_SUFFIXES = word_set("dds dvm esq ii iii iv jr md phd sr")
_LOCATIVE = word_set("across around at from in near of outside through to toward towards via")
_PLACE_ENDING = regex.compile(
    r"(?:berg|borough|burgh?|bury|chester|field|ford|fort|furt|haven|land|mouth|port|shire|side|stad|ton|town|view|ville)$"
)
_PLACE_BEGINNINGS = word_set("east lake new north port south west")
# Words that stand capitalised in the middle of a sentence without being anybody's name.
_NEVER_ALONE = word_set(
    """amazon american apple april atm august bank brown card cash chip christmas company december dollar dutch
    easter english euro express february franc french fri friday general german god google i jan january july june march
    master may mon monday no november october ok pin polish pound rand sat saturday sepa september spanish sun sunday swift
    thu thursday tue tuesday turkey union visa wed wednesday western will won young"""
)
# Surnames that in lower case are far oftener words that follow a name.
_FUNCTION_WORDS = word_set(
    "will may can long good more best else case day way call ask please said says went had has was is did does and but for"
)
_BRANDS = {("american", "express"), ("american", "airlines"), ("british", "airways"), ("french", "fries")}
_CONTEXT_CHARS = 40
_LOOKS_BACK_CHARS = 3


class _Token(NamedTuple):
    text: str
    start: int
    end: int
    word: str
    """Without case and apostrophe."""
    capital: bool
    shouted: bool
    opens: bool
    """Whether it opens a sentence or line, so that a capital says nothing."""


def _tokens(text: str) -> list[_Token]:
    out = []
    for match in _TOKEN.finditer(text):
        token, start = match[0], match.start()
        before = text[max(0, start - _LOOKS_BACK_CHARS) : start].rstrip(" \"'(*_>")
        capital = token[0].isupper() or (len(token) > 1 and not token.islower())
        opens = start == 0 or not before or before[-1] in ".!?:;\n\r-"
        word = token.casefold().replace("'", "")
        out.append(_Token(token, start, match.end(), word, capital, len(token) > 1 and token.isupper(), opens))
    return out


class NameFinder:
    """Finds names by a gazetteer. Every token is looked at a bounded number of times, so the time is linear in the text."""

    def __init__(self, gazetteer: Gazetteer) -> None:
        self._lists = gazetteer

    def find(self, text: str) -> list[Span]:
        """PERSON, LOCATION and NRP spans, which may overlap."""
        tokens = _tokens(text)
        shouting = sum(t.shouted for t in tokens) * 2 > len(tokens)
        places = list(self._places(text, tokens, shouting))
        return [*places, *self._people(text, tokens, shouting, {p.start for p in places}), *self._unspaced(text)]

    def _people(self, text: str, tokens: list[_Token], shouting: bool, place_starts: set[int]) -> Iterator[Span]:
        index = 0
        while index < len(tokens):
            if self._honorific(text, tokens, index):
                end = self._grown(text, tokens, index + 1)
                yield Span(tokens[index].start, tokens[end].end, "PERSON", 0.8)
            elif score := self._begins(text, tokens, index, shouting):
                end = self._grown(text, tokens, index)
                start = index
                while start and self._joins_left(text, tokens, start):
                    start -= 1
                # A place that is also a name stays a place unless more of a name follows.
                if end > start or tokens[index].start not in place_starts:
                    yield Span(tokens[start].start, tokens[end].end, "PERSON", score)
            else:
                index += 1
                continue
            index = end + 1

    def _honorific(self, text: str, tokens: list[_Token], index: int) -> bool:
        if tokens[index].word not in _HONORIFICS or index + 1 == len(tokens):
            return False
        following = tokens[index + 1]
        if text[tokens[index].end : following.start] not in (" ", ". ", "."):
            return False
        if following.word in PARTICLES:
            return any(token.capital for token in tokens[index + 2 : index + 4])
        if tokens[index].word in _TITLES and following.word in self._lists.english_surnames:
            return following.capital or following.word not in _FUNCTION_WORDS
        return following.capital or (self._lists.is_name(following.word) and following.word not in self._lists.ordinary)

    def _begins(self, text: str, tokens: list[_Token], index: int, shouting: bool) -> float:
        """How surely a name begins at this token; zero if it does not."""
        token, word = tokens[index], tokens[index].word
        if not token.text[0].isalpha() or len(word) < 2:
            return 0.0
        known, ordinary = self._lists.is_name(word), word in self._lists.ordinary or word in PARTICLES
        before = text[max(0, token.start - _CONTEXT_CHARS) : token.start]
        if not ordinary and len(word) > 1 and before and _INTRODUCES_SURELY.search(before):
            return 0.85
        if not known:
            both = self._odd(token) and token.capital and not token.shouted and self._odd_word_follows(text, tokens, index)
            return 0.4 if both and tokens[index + 1].capital and not tokens[index + 1].shouted else 0.0
        if not ordinary:
            if token.capital and (not token.shouted or shouting or len(word) > 5 or self._pair(text, tokens, index)):
                return 0.7 if len(word) > 2 or self._pair(text, tokens, index) else 0.0
            if word in self._lists.english_names and (len(word) > 3 or self._odd_word_follows(text, tokens, index)):
                return 0.5
            if self._pair(text, tokens, index) or (word in self._lists.first_names and _INTRODUCES_WEAKLY.search(before)):
                return 0.6 if len(word) > 2 else 0.0
            return 0.0
        if not token.capital or shouting:
            if self._ordinary_first_name(text, tokens, index):
                return 0.6
            return 0.5 if before and token.capital and _INTRODUCES_SURELY.search(before) else 0.0
        if self._pair(text, tokens, index) or self._first_and_odd(text, tokens, index):
            return 0.7
        if word in self._lists.english_names and _GREETS.search(before):
            return 0.6
        if token.shouted or token.opens or word in _NEVER_ALONE:
            return 0.0
        return 0.5 if len(word) > 2 and word in self._lists.english_names else 0.0

    def _pair(self, text: str, tokens: list[_Token], index: int) -> bool:
        """Whether this is a first name that a surname follows, the surname no ordinary word or both with capitals."""
        if index + 1 >= len(tokens) or tokens[index].word not in self._lists.first_names:
            return False
        token, following = tokens[index], tokens[index + 1]
        if text[token.end : following.start] not in (" ", "-"):
            return False
        if following.word not in self._lists.last_names or len(following.word) < 2:
            return False
        if following.word not in self._lists.ordinary:
            return following.capital or token.word not in self._lists.ordinary
        return token.capital and following.capital and not token.shouted and token.word not in _NEVER_ALONE

    def _ordinary_first_name(self, text: str, tokens: list[_Token], index: int) -> bool:
        """Whether an English first name that is also a word stands before an English surname that is none."""
        following = tokens[index + 1 : index + 2]
        if not following or tokens[index].word not in self._lists.english_names or len(following[0].word) < 4:
            return False
        beside = text[tokens[index].end : following[0].start] == " "
        return beside and following[0].word in self._lists.english_surnames and following[0].word not in self._lists.ordinary

    def _first_and_odd(self, text: str, tokens: list[_Token], index: int) -> bool:
        """Whether this first name is followed by a capitalised word that is on no list."""
        known = tokens[index].word in self._lists.first_names and tokens[index].capital and not tokens[index].shouted
        return (
            known and self._odd_word_follows(text, tokens, index) and tokens[index + 1].capital and not tokens[index + 1].shouted
        )

    def _odd_word_follows(self, text: str, tokens: list[_Token], index: int) -> bool:
        following = tokens[index + 1 : index + 2]
        return bool(following) and text[tokens[index].end : following[0].start] == " " and self._odd(following[0])

    def _odd(self, token: _Token) -> bool:
        """Whether it is a word that is neither ordinary nor short."""
        return len(token.word) > 2 and token.text[0].isalpha() and token.word not in self._lists.ordinary

    def _grown(self, text: str, tokens: list[_Token], index: int) -> int:
        """The last token of the name that begins at this one."""
        end = index
        for at in range(index + 1, min(len(tokens), index + 7)):
            gap = text[tokens[at - 1].end : tokens[at].start]
            if gap not in (" ", "-", ". ", ".", "'", ", ") or (gap[0] == "." and len(tokens[at - 1].text) > 2):
                break
            token = tokens[at]
            if gap == ", ":
                if token.word in _SUFFIXES:
                    end = at
                break
            initial = len(token.text) == 1 and token.text.isupper() and token.text != "I"
            particle = token.word in PARTICLES
            signed = gap[0] == "." and len(tokens[at - 1].text) == 1 and token.capital
            if signed or self._continues(tokens[index], token) or (particle and token.capital and tokens[index].capital):
                end = at
            elif not (particle or initial):
                break
        return end

    def _continues(self, first: _Token, token: _Token) -> bool:
        if not token.text[0].isalpha():
            return False
        ordinary = token.word in self._lists.ordinary
        if token.word in _SUFFIXES:
            return True
        if not token.capital:
            if token.word in self._lists.english_surnames and token.word not in _FUNCTION_WORDS:
                return len(token.word) > 2
            return len(token.word) > 2 and not ordinary and (not first.capital or token.word in self._lists.last_names)
        if token.shouted and not first.shouted and len(token.text) < 4:
            return False
        if token.shouted and ordinary:
            return first.shouted and token.word in self._lists.english_surnames and token.word not in _FUNCTION_WORDS
        return len(token.word) > 1 and (not ordinary or token.word in self._lists.last_names)

    def _joins_left(self, text: str, tokens: list[_Token], index: int) -> bool:
        """Whether the token before this one belongs to the same name."""
        before = tokens[index - 1]
        gap = text[before.end : tokens[index].start]
        if gap not in (" ", "-", ". ", ".") or not before.capital:
            return False
        if len(before.text) == 1:
            return before.text != "I" and before.text.isalpha()
        if gap[0] == "." or before.word in PARTICLES:
            return before.word in _HONORIFICS
        if before.word in self._lists.ordinary:
            return self._lists.is_name(before.word) and not before.opens and before.word not in _NEVER_ALONE
        return self._lists.is_name(before.word) or (gap == "-" and not before.shouted)

    def _places(self, text: str, tokens: list[_Token], shouting: bool) -> Iterator[Span]:
        index = 0
        while index < len(tokens):
            length = self._place_length(text, tokens, index, shouting)
            if length:
                start, end = tokens[index].start, tokens[index + length - 1].end
                yield Span(start, end, "LOCATION", 0.6)
                yield from _postcodes(text, tokens, index, index + length)
            elif self._demonym(tokens, index):
                yield Span(tokens[index].start, tokens[index].end, "NRP", 0.5)
            index += max(length, 1)

    def _demonym(self, tokens: list[_Token], index: int) -> bool:
        token = tokens[index]
        if tokens[index + 1 : index + 2] and (token.word, tokens[index + 1].word) in _BRANDS:
            return False
        known = token.word in self._lists.demonyms or token.word.removesuffix("s") in self._lists.demonyms
        return known and (token.capital or token.word not in self._lists.ordinary)

    def _place_length(self, text: str, tokens: list[_Token], index: int, shouting: bool) -> int:
        token = tokens[index]
        before = text[max(0, token.start - _CONTEXT_CHARS) : token.start]
        for rest in self._lists.places.get(token.word, ()):
            following = tokens[index : index + len(rest) + 1]
            if tuple(t.word for t in following[1:]) != rest or (rest and following[-1].end - token.start > 60):
                continue
            words = [t.word for t in following]
            ordinary = all(word in self._lists.ordinary or word in PARTICLES for word in words)
            capital = all(t.capital or t.word in PARTICLES or t.word in ("and", "upon", "on", "sur", "under") for t in following)
            if rest:
                sure = capital and following[0].capital and (not ordinary or index == 0 or tokens[index - 1].word in _LOCATIVE)
                sure = sure or (not ordinary and not shouting and len(words) > 1 and bool(_LIVES_IN.search(before)))
            elif ordinary:
                sure = capital and not token.shouted and index > 0 and bool(_LIVES_IN.search(before))
            else:
                sure = (capital and (not token.shouted or len(token.word) > 4)) or token.word in self._lists.large_cities
                sure = sure or bool(_LIVES_IN.search(before))
            if sure:
                return len(following)
        if self._compound_place(token):
            return 1
        if token.word in _PLACE_BEGINNINGS and self._odd_word_follows(text, tokens, index):
            following_word = tokens[index + 1]
            both = token.capital and following_word.capital and self._lists.is_name(following_word.word)
            if both or self._compound_place(following_word):
                return 2
        unknown = (
            token.capital
            and token.text[0].isalpha()
            and token.word not in self._lists.ordinary
            and (not token.shouted or len(token.word) > 4)
        )
        if unknown and not self._lists.is_name(token.word) and len(token.word) > 2 and _LIVES_IN.search(before):
            following = tokens[index + 1 : index + 2]
            return 2 if following and following[0].capital and text[token.end : following[0].start] in (" ", "-") else 1
        return 0

    def _compound_place(self, token: _Token) -> bool:
        """Whether it is a listed name with an ending that places have, as in Carolville, and no other word."""
        ending = _PLACE_ENDING.search(token.word)
        stem = token.word[: ending.start()] if ending else ""
        return len(stem) > 3 and token.word not in self._lists.ordinary and self._lists.is_name(stem)

    def _unspaced(self, text: str) -> Iterator[Span]:
        for match in _SPACED_LETTERS.finditer(text):
            if self._lists.is_name("".join(filter(str.isalpha, match[0])).casefold()):
                yield Span(match.start(), match.end(), "PERSON", 0.6)
        if text.isascii():
            return
        for match in _IDEOGRAPHIC_INTRODUCTION.finditer(text):
            yield Span(match.start("v"), match.end("v"), "PERSON", 0.7)
        for match in _IDEOGRAPHS.finditer(text):
            for start, end in self._ideographic(match[0]):
                yield Span(match.start() + start, match.start() + end, "PERSON", 0.6)

    def _ideographic(self, run: str) -> Iterator[tuple[int, int]]:
        """A surname of one to three characters and a given name of one to three that are both listed, at least three together."""
        at = 0
        while at < len(run):
            for surname, given in ((1, 2), (2, 2), (2, 1), (2, 3), (3, 2), (3, 1), (1, 3)):
                end = at + surname + given
                if end <= len(run) and {run[at : at + surname], run[at + surname : end]} <= self._lists.ideographic_names:
                    yield at, end
                    at = end - 1
                    break
            at += 1


def _postcodes(text: str, tokens: list[_Token], start: int, end: int) -> Iterator[Span]:
    """Numbers of three to six digits that stand beside a place."""
    for number, gap in (
        (tokens[start - 1] if start else None, text[tokens[start - 1].end : tokens[start].start] if start else ""),
        (tokens[end] if end < len(tokens) else None, text[tokens[end - 1].end : tokens[end].start] if end < len(tokens) else ""),
    ):
        if (
            number
            and number.text.isdigit()
            and 3 <= len(number.text) <= 6
            and gap in (" ", ", ", "\n", ",\n", "-", "\n ", ",\n ")
        ):
            yield Span(number.start, number.end, "POSTCODE", 0.5)
