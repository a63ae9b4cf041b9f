"""The second gate: what in feedback still looks personal, after the device's masker has been over it. Pure functions.

It is a fast check for what does most harm where it is missed, and finds no more than that: e-mail and IP addresses, telephone
and social security numbers (the masker's own patterns), cards and IBANs whose checksums hold, keys and tokens of well-known
providers, and URLs that carry a password or a token. Names and addresses are the masker's work alone. A placeholder, such as
`<PERSON_1>`, is never found. No clock is read: the patterns take time linear in a text, whose length an event bounds.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from ipaddress import AddressValueError, IPv6Address
from typing import Final

from fedloop_events.types import FeedbackRecorded
from fedloop_privacy.masking import patterns
from fedloop_privacy.masking.normalise import View, fold_text, unescape
from fedloop_privacy.masking.spans import PLACEHOLDER, Span, union

_CHECKED: Final = {"EMAIL_ADDRESS", "IP_ADDRESS", "PHONE_NUMBER", "US_SSN"}
_NOTHING: Final = "<~>"
"""Stands for a placeholder: no pattern reads across it."""
_APART: Final = f"\n{_NOTHING}\n"
"""Between texts that are read as one, which takes less time."""
_SEVEN_DIGITS: Final = re.compile("[0-9](?:[^0-9A-Za-z]{0,4}[0-9]){6}")
"""A telephone number has no fewer, with no more between two of them; cards, IBANs and social security numbers have more."""

_EMAILS: Final = tuple(each for each in patterns.NETWORK if each.type == "EMAIL_ADDRESS")
_IPV4: Final = tuple(each for each in patterns.NETWORK if each.type == "IP_ADDRESS")
_NUMBERS: Final = (
    *(each for each in patterns.NUMBERS if each.type in _CHECKED),
    patterns.Pattern("PHONE_NUMBER", 0.6, patterns.DIGIT, r"(?<![\d.,])\(?\d{3}\)?[-.\ ]\d{3}[-.\ ]\d{4}(?!\d)"),
    patterns.Pattern("PHONE_NUMBER", 0.5, patterns.DIGIT, r"(?<![\w.,])0\d{9,10}(?!\w)"),
)
_DOTTED: Final = re.compile(r"[0-9] ?[.(\[]")
_IPV6: Final = re.compile(r"(?<![\w:.])[0-9A-Fa-f]{4}(?::[0-9A-Fa-f]{0,4}){2,7}(?![\w:])", re.ASCII)
_RUN: Final = re.compile(r"[0-9](?:[ \t\r\n./_-]{0,3}[0-9]){11,}")
_GROUP: Final = re.compile("[0-9]+")
_CARD: Final = re.compile("(?:18|2[1-7]|[3-6][0-9])[0-9]{11,17}")
_IBAN: Final = re.compile(r"(?<![A-Z0-9])(?=([A-Z]{2} ?[0-9]{2}(?:[ .\n-]{0,2}[A-Z0-9]){11,30}))", re.ASCII | re.IGNORECASE)
_IBAN_CHARS: Final = range(15, 35)
_FEWEST_IBAN_DIGITS: Final = 8

_CREDENTIALS: Final = re.compile(
    r"""(?i)[a-z][a-z0-9+.-]{1,20}://(?:[^\s/?#:@<>"']{0,200}:[^\s/?#@<>"']{1,200}@
    |[^\s<>"']{1,500}?[?&#](?:access_token|api_?key|auth|client_secret|passw(?:or)?d|pwd|secret|sig(?:nature)?|token)=[^\s&<>"']{6,})""",
    re.VERBOSE,
)
_FEWEST_KEY_CHARS: Final = 15
"""In one word, of any of these."""
_KEYS: Final = re.compile(
    r"""(?<![A-Za-z0-9])(?:(?:AKIA|ASIA)[A-Z0-9]{16}\b|gh[oprsu]_[A-Za-z0-9]{30,}|github_pat_\w{22,}|glpat-[\w-]{20,}|xox[abeoprs]-[\w-]{10,}
    |[rs]k_(?:live|test)_[A-Za-z0-9]{16,}|sk-[\w-]{20,}|AIza[\w-]{35}|ya29\.[\w-]{20,}|hf_[A-Za-z0-9]{30,}|npm_[A-Za-z0-9]{36}|pypi-[\w-]{50,}
    |SG\.[\w-]{16,}\.[\w-]{16,}|eyJ[\w-]{8,}\.eyJ[\w-]{8,}\.[\w-]*|(?i:bearer)\ [\w.~+/-]{20,}=*
    |-----BEGIN\ (?:[A-Z]+\ ){0,3}PRIVATE\ KEY)""",
    re.VERBOSE | re.ASCII,
)


def found(feedback: FeedbackRecorded) -> dict[str, int]:
    """How many values look personal in all that a device has written, by type."""
    counts = _personal(_APART.join(map(fold_text, texts(feedback))))
    return dict(sorted(counts.items()))


def texts(feedback: FeedbackRecorded) -> Iterator[str]:
    """Everything in it that could hold a user's words."""
    for masked in (feedback.text, feedback.response, feedback.correction, feedback.comment):
        if masked is not None:
            yield masked.text
    for turn in feedback.context:
        yield turn.text.text
    for label in (feedback.predicted, feedback.label):
        if label is not None:
            yield label


def personal(text: str) -> Counter[str]:
    """How many values look personal in a text, by type; what stands in percent- or HTML-escapes counts as well."""
    return _personal(fold_text(text))


def _personal(folded: str) -> Counter[str]:
    reading = PLACEHOLDER.sub(_NOTHING, folded) if "<" in folded else folded
    counts = Counter(span.type for span in union(_spans(reading)))
    if ("%" in reading or "&" in reading) and (plain := unescape(View.of(reading))) is not None:
        counts |= Counter(span.type for span in union(_spans(PLACEHOLDER.sub(_NOTHING, plain.text))))
    return counts


def _spans(text: str) -> Iterator[Span]:
    there = patterns.present(text)
    for pattern in _EMAILS:
        if pattern.needs in there:
            yield from pattern.spans(text, None)
    if "://" in text:
        yield from (Span(*match.span(), "URL_CREDENTIALS", 1.0) for match in _CREDENTIALS.finditer(text))
    if max(map(len, text.split()), default=0) >= _FEWEST_KEY_CHARS or "PRIVATE KEY" in text:
        yield from (Span(*match.span(), "SECRET", 1.0) for match in _KEYS.finditer(text))
    if text.count(":") >= 2:
        yield from (Span(*match.span(), "IP_ADDRESS", 0.8) for match in _IPV6.finditer(text) if _is_ipv6(match[0]))
    if patterns.DIGIT not in there:
        return
    if _DOTTED.search(text):
        for pattern in _IPV4:
            yield from (span for span in pattern.spans(text, None) if _is_ipv4(text[span.start : span.end]))
    if _SEVEN_DIGITS.search(text):
        for pattern in _NUMBERS:
            yield from pattern.spans(text, None)
        yield from _cards(text)
        yield from _ibans(text)


def _is_ipv4(value: str) -> bool:
    return all(int(each) <= 255 for each in _GROUP.findall(value))


def _is_ipv6(value: str) -> bool:
    try:
        IPv6Address(value)
    except AddressValueError:
        return False
    return any(map(str.isdigit, value))


def _cards(text: str) -> Iterator[Span]:
    """Card numbers in stretches of digits: other numbers may stand right beside them, but none in one word with them."""
    for run in _RUN.finditer(text):
        groups = [(run.start() + each.start(), each[0]) for each in _GROUP.finditer(run[0])]
        for first, (start, _) in enumerate(groups):
            digits = ""
            for at, group in groups[first:]:
                digits += group
                if len(digits) > 19:
                    break
                if _CARD.fullmatch(digits) and patterns.luhn(digits):
                    yield Span(start, at + len(group), "CREDIT_CARD", 0.95)


def _ibans(text: str) -> Iterator[Span]:
    """Account numbers whose check digits hold (ISO 13616-1, section 6.1), however they are grouped, and whatever follows."""
    for match in _IBAN.finditer(text):
        value, compact = match[1] + " ", ""
        for at, char in enumerate(value):
            if char.isalnum():
                compact += char.upper()
            elif value[at - 1].isalnum() and len(compact) in _IBAN_CHARS and _iban_holds(compact):
                yield Span(match.start(1), match.start(1) + at, "IBAN_CODE", 0.95)
                break


def _iban_holds(compact: str) -> bool:
    if sum(map(str.isdigit, compact)) < _FEWEST_IBAN_DIGITS:
        return False
    return int("".join(str(int(each, 36)) for each in compact[4:] + compact[:4])) % 97 == 1
