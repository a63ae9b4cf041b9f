"""Readings of a text lead back to the very characters they came from."""

from __future__ import annotations

import base64

import pytest
from fedloop_privacy.masking.normalise import View, encoded_stretches, fold, mixed_script_words, unescape
from hypothesis import given
from hypothesis import strategies as st


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("\uff4a\uff4f\uff48\uff4e", "john"),
        ("jo\u200bh\u00adn\u202e\ufe0f", "john"),
        ("\u017deljko \u0141ukasz \u00d8rsted Stra\u00dfe", "Zeljko Lukasz Orsted Strasse"),
        ("e\u0301\u0302", "e"),
        ("\U0001d409\u1d0f\u24d7\U0001f15d", "JohN"),
        ("\u0664\u0967\u2460\u2776\u00b2", "41112"),
        ("1\u20132\u22123", "1-2-3"),
        ("a\u00a0b\u3000c\u2028d", "a b c\nd"),
        ("\ud55c\uad6d\uc5b4", "\ud55c\uad6d\uc5b4"),
        ("\u0430\u0435\u043e\u0440\u0441", "aeopc"),
        ("4\x001\x1b1", "411"),
    ],
)
def test_look_alikes_fold_to_what_they_look_like(text: str, folded: str) -> None:
    assert fold(View.of(text)).text == folded


@given(st.text())
def test_every_folded_character_stands_for_its_own_stretch(text: str) -> None:
    view = fold(View.of(text))
    assert len(view.text) == len(view.starts) == len(view.ends)
    assert all(0 <= start < end <= len(text) for start, end in zip(view.starts, view.ends, strict=True))
    assert list(view.starts) == sorted(view.starts)
    assert list(view.ends) == sorted(view.ends)
    for folded, start, end in zip(view.text, view.starts, view.ends, strict=True):
        assert folded in fold(View.of(text[start:end])).text


@given(st.text())
def test_folding_twice_is_folding_once(text: str) -> None:
    once = fold(View.of(text)).text
    assert fold(View.of(once)).text == once


@given(st.text(alphabet="ab@%&;#x0123456789", max_size=60))
def test_unescaped_characters_stand_for_their_escapes(text: str) -> None:
    view = unescape(View.of(text))
    if view is not None:
        assert len(view.text) == len(view.starts) == len(view.ends)
        assert all(0 <= start < end <= len(text) for start, end in zip(view.starts, view.ends, strict=True))


def test_nested_escapes_are_resolved() -> None:
    text = "x john%2540example&period;com"
    view = unescape(View.of(text))
    assert view is not None
    assert view.text == "x john@example.com"
    assert view.origin(2, len(view.text)) == (2, len(text))
    assert text[slice(*view.origin(6, 7))] == "%2540"
    assert unescape(View.of("50% off & more; 100%")) is None


def test_encoded_text_is_told_from_long_words_and_numbers() -> None:
    token = base64.urlsafe_b64encode("J\u00f3hn Smith, 24 Clarke Avenue".encode()).decode()
    assert encoded_stretches(f"see {token}!") == [(4, 4 + len(token))]
    assert encoded_stretches("hex " + b"john@example.com".hex()) == [(4, 36)]
    assert encoded_stretches("internationalization 1234567812345678 misunderstandings GB82WEST12345698765432") == []


def test_words_of_two_scripts_are_found() -> None:
    assert mixed_script_words("J\u043ehn and \u0418\u0432\u0430\u043d paid 5 \u00b5m") == [(0, 4)]


def test_a_mask_takes_the_invisible_characters_after_a_value() -> None:
    view = fold(View.of("jo\u200b hn\u0301\u00ad x"))
    assert view.text == "jo hn x"
    assert view.origin(0, 2) == (0, 3)
    assert view.origin(3, 5) == (4, 8)
