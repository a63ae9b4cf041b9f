"""Readings of a text for matching, each with an exact way back to the original characters.

A person reads "john" in full-width letters, with a zero-width space inside, or with a Cyrillic letter that looks like the Latin
one, as the same word; a pattern does not. The recognisers therefore see a folded reading, and what they find is mapped back, so
that the original is masked. Unicode TR15 (NFKC), TR36 and TR39 (confusables) say why each step is needed.
"""
# ruff: noqa: RUF001

from __future__ import annotations

import base64
import binascii
import html
import unicodedata
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from urllib.parse import unquote

import regex

# Look-alikes of ASCII letters that NFKC leaves alone (the commonest of Unicode TR39's confusables).
_CYRILLIC = dict(zip("аеорсухіјѕԁԛԝһӏьАВЕКМНОРСТУХІЈЅԌԚԜҺӀ", "aeopcyxijsdqwhlbABEKMHOPCTYXIJSGQWHI", strict=True))
_GREEK = dict(zip("αικνορυχϲΑΒΕΖΗΙΚΜΝΟΡΤΥΧϹ", "aikvopuxcABEZHIKMNOPTYXC", strict=True))
_PUNCTUATION = {**dict.fromkeys("‘’‚‛′ʼʹ´", "'"), **dict.fromkeys("“”„‟″«»", '"'), **dict.fromkeys("。·∙•・‧", "."), "−": "-"}
_UNDECOMPOSED = {"ß": "ss", "ẞ": "SS", "æ": "ae", "Æ": "AE", "œ": "oe", "Œ": "OE", "þ": "th", "Þ": "Th", "ð": "d", "Ð": "D"}
_LOOKALIKES = _CYRILLIC | _GREEK | _PUNCTUATION | _UNDECOMPOSED

_LETTER_NAME = regex.compile(
    r"(?:NEGATIVE (?:CIRCLED|SQUARED) )?LATIN (?:(SMALL) |CAPITAL )?LETTER (?:SMALL CAPITAL )?(?:DOTLESS )?([A-Z])(?: WITH .*)?"
)
_CONTROLS = {code: None for code in (*range(32), 127) if chr(code) not in "\t\n\r"}
_BLANK_LOOKING = frozenset("\u115f\u1160\u2800\u3164\uffa0")
_ESCAPE = regex.compile(r"((?:%[0-9A-Fa-f]{2})+)|(&(?:#\d{1,7}|#[xX][0-9A-Fa-f]{1,6}|[A-Za-z]{2,32}[0-9]{0,2});)")
_ENCODED = regex.compile(
    r"(?<![\w+/=%-])(?:(?<hex>(?:[0-9A-Fa-f]{2}){8,}+)|(?<b64>[\w+/-]{16,}+={0,2}))(?![\w+/=-])", regex.ASCII
)
_WORD = regex.compile(r"[\p{L}\p{M}\p{N}\p{Cf}]++")
_LATIN = regex.compile(r"\p{Latin}")
_LATIN_LIKE = regex.compile(r"[\p{Cyrillic}\p{Greek}\p{Armenian}\p{Cherokee}\p{Coptic}--\N{GREEK SMALL LETTER MU}]", regex.V1)


@dataclass(frozen=True, slots=True)
class View:
    """One reading of an original text: character i of `text` stands for original[starts[i]:ends[i]]."""

    text: str
    starts: Sequence[int]
    ends: Sequence[int]

    @classmethod
    def of(cls, text: str) -> View:
        """The text itself."""
        return cls(text, range(len(text)), range(1, len(text) + 1))

    def origin(self, start: int, end: int) -> tuple[int, int]:
        """The original offsets of the non-empty stretch [start, end) of this reading."""
        return self.starts[start], self.ends[end - 1]

    def rewritten(self, pieces: Iterable[tuple[int, int, str]]) -> View:
        """This reading with each stretch [start, end) replaced; pieces are sorted, apart from each other and not empty.

        Every character of a replacement stands for the whole stretch that it replaces.
        """
        parts, starts, ends, at = [], list[int](), list[int](), 0
        for start, end, replacement in pieces:
            parts += [self.text[at:start], replacement]
            origin_start, origin_end = self.origin(start, end)
            starts += [*self.starts[at:start], *[origin_start] * len(replacement)]
            ends += [*self.ends[at:start], *[origin_end] * len(replacement)]
            at = end
        parts.append(self.text[at:])
        return View("".join(parts), [*starts, *self.starts[at:]], [*ends, *self.ends[at:]])


@lru_cache(maxsize=16_384)
def _folded(char: str) -> str:
    category = unicodedata.category(char)
    if char in "\t\n\r" or char in _LOOKALIKES:
        return _LOOKALIKES.get(char, char)
    if char in _BLANK_LOOKING or category in ("Zs", "Zl", "Zp"):
        return "\n" if category in ("Zl", "Zp") else " "
    if category in ("Cc", "Cf", "Mn", "Me", "Cs"):
        return ""
    if category == "Pd":
        return "-"
    if (digit := unicodedata.digit(char, None)) is not None:
        return str(digit)
    if match := _LETTER_NAME.fullmatch(unicodedata.name(char, "")):
        return str(match[2].lower() if match[1] or "SMALL CAPITAL" in match[0] else match[2])
    compatible = unicodedata.normalize("NFKC", char)
    if compatible != char:
        return "".join(map(_folded, compatible))
    stripped = [c for c in unicodedata.normalize("NFD", char) if unicodedata.category(c) not in ("Mn", "Me")]
    bare = unicodedata.normalize("NFC", "".join(stripped))
    return _folded(bare) if bare != char and len(bare) == 1 else bare


def fold(view: View) -> View:
    """The reading without invisible characters and accents, with ASCII digits, and with letters for what looks like them.

    An invisible character belongs to the one before it, so a mask takes both.
    """
    if view.text.isascii() and view.text.isprintable():
        return view
    out, starts, ends = [], list[int](), list[int]()
    for index, char in enumerate(view.text):
        folded = _folded(char)
        start, end = view.starts[index], view.ends[index]
        if folded:
            out.append(folded)
            starts += [start] * len(folded)
            ends += [end] * len(folded)
        elif ends:
            ends[-1] = max(ends[-1], end)
    return View("".join(out), starts, ends)


def fold_text(text: str) -> str:
    """The text of `fold`, for whoever needs no way back."""
    if text.isascii():
        return text if text.isprintable() else text.translate(_CONTROLS)
    return "".join(map(_folded, text))


def fold_word(word: str) -> str:
    """The key under which a word of a list is looked up: folded and without case."""
    return word.casefold() if word.isascii() else "".join(map(_folded, word)).casefold()


def unescape(view: View) -> View | None:
    """The reading with percent- and HTML-escapes resolved, also nested ones; None where there is none."""
    rounds = 0
    # Double escaping is common, deeper nesting is a trick: four rounds reach past anything that software writes.
    for rounds in range(5):
        pieces = []
        for match in _ESCAPE.finditer(view.text):
            plain = unquote(match[0], errors="replace") if match[1] else html.unescape(match[0])
            if plain != match[0]:
                pieces.append((*match.span(), plain))
        if not pieces or rounds == 4:
            break
        view = view.rewritten(pieces)
    return view if rounds else None


def encoded_stretches(text: str) -> list[tuple[int, int]]:
    """Where base64 or hexadecimal text stands that decodes to something a person can read.

    Random letters do so with a probability below 1e-5 at twelve bytes, so that what is found was encoded on purpose.
    """
    return [match.span() for match in _ENCODED.finditer(text) if _readable(match)]


def _readable(match: regex.Match[str]) -> bool:
    try:
        if match["hex"]:
            raw = bytes.fromhex(match["hex"])
        else:
            token = match["b64"].rstrip("=").replace("-", "+").replace("_", "/")
            raw = base64.b64decode(token + "=" * (-len(token) % 4))
        return len(raw) >= 8 and raw.decode().isprintable()
    except (ValueError, binascii.Error):
        return False


def mixed_script_words(text: str) -> list[tuple[int, int]]:
    """Words that mix Latin letters with those of a script that has look-alikes of them: no language writes so."""
    if text.isascii():
        return []
    return [m.span() for m in _WORD.finditer(text) if _LATIN_LIKE.search(m[0]) and _LATIN.search(m[0])]
