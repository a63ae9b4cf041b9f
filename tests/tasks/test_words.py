"""Words as people compare them: what looks the same is the same."""

from __future__ import annotations

import pytest
from fedloop_tasks import words
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("cafe\u0301", "caf\u00e9"),
        ("\ufeffa\u200bb\u00ad", "ab"),
        ("\u2066a\u2069", "a"),
        (" a \t\n b\u3000c\u00a0", "a b c"),
        ("A", "A"),
        ("A\n\tB\x1fC\x7f", "A B C"),
        ("\u200b\u3164\ufe0f\u2060", ""),
        ("\x00\x1b a", "a"),
        ("\u2764\ufe0f", "\u2764"),
    ],
)
def test_what_shows_nothing_does_not_count(written: str, read: str) -> None:
    assert words.normalised(written) == read


@given(st.text())
def test_normalising_again_changes_nothing(text: str) -> None:
    once = words.normalised(text)
    assert words.normalised(once) == once


def test_a_word_is_found_exactly_then_normalised_then_in_any_case() -> None:
    known = ["loan", "Loan", "cafe\u0301"]
    assert words.find("Loan", known, any_case=True) == "Loan"
    assert words.find("caf\u00e9\u200b", known) == "cafe\u0301"
    assert words.find("LOAN", known) is None
    assert words.find("LOAN", known, any_case=True) == "loan"
    assert words.find("", known, any_case=True) is None


def test_words_that_differ_in_case_alone_stand_together() -> None:
    assert words.alike(["a", "Stra\u00dfe", "A", "STRASSE", "b"]) == [["a", "A"], ["Stra\u00dfe", "STRASSE"]]
