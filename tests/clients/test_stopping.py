"""Texts that end an answer: `fedloop_clients.stopping`."""

from __future__ import annotations

from itertools import pairwise

from fedloop_clients.stopping import stopped
from fedloop_tasks.chats import Answer
from hypothesis import given
from hypothesis import strategies as st

LETTERS = st.text("abc", max_size=20)
STOPS = st.lists(st.text("abc", min_size=1, max_size=4), max_size=3)


def grown(text: str, cuts: list[int]) -> list[Answer]:
    """The text as a model writes it, in pieces that end at the cuts."""
    ends = [*sorted(cut for cut in cuts if cut < len(text)), len(text)]
    return [Answer(text[:end], number, 0.5, finished=False, cut=0) for number, end in enumerate(ends, 1)]


@given(LETTERS, st.lists(st.integers(0, 20), max_size=10), STOPS)
def test_an_answer_is_shown_up_to_the_first_stop_and_nothing_of_it_is_taken_back(
    text: str, cuts: list[int], stops: list[str]
) -> None:
    shown = list(stopped(iter(grown(text, cuts)), stops))
    for before, after in pairwise(shown):
        assert after.text.startswith(before.text)
    assert text.startswith(shown[-1].text)
    assert not [stop for stop in stops if stop in shown[-1].text]
    holds_one = any(stop in text for stop in stops)
    assert shown[-1].finished == holds_one
    assert holds_one or shown[-1].text == text


def test_what_comes_after_a_stop_is_never_written() -> None:
    pieces = iter(grown("one two three", [3, 6, 9]))
    assert [each.text for each in stopped(pieces, ["two", "three"])] == ["one", "one ", "one "]
    assert next(pieces).text == "one two three"
