"""Spans that touch become one mask that covers them all."""

from __future__ import annotations

from itertools import pairwise

from fedloop_privacy.masking.spans import Span, outside, union
from hypothesis import given
from hypothesis import strategies as st

spans = st.lists(
    st.builds(
        lambda start, length, kind, score: Span(start, start + length, kind, score),
        st.integers(0, 40), st.integers(1, 12), st.sampled_from("ABC"), st.sampled_from([0.3, 0.5, 0.9]),
    )
)  # fmt: skip


def _chars(found: list[Span]) -> set[int]:
    return {at for span in found for at in range(span.start, span.end)}


@given(spans)
def test_the_union_covers_every_character_once(found: list[Span]) -> None:
    merged = union(found)
    assert _chars(merged) == _chars(found)
    assert all(left.end <= right.start for left, right in pairwise(merged))


def test_the_surest_gives_the_type_and_the_longest_breaks_a_tie() -> None:
    assert union([Span(0, 9, "ACCOUNT", 0.3), Span(2, 5, "CARD", 0.9), Span(4, 12, "PHONE", 0.5)]) == [Span(0, 12, "CARD", 0.9)]
    assert union([Span(0, 3, "A", 0.5), Span(1, 9, "B", 0.5)]) == [Span(0, 9, "B", 0.5)]


@given(spans, spans)
def test_protected_stretches_are_cut_out(found: list[Span], walls: list[Span]) -> None:
    protected = [(span.start, span.end) for span in union(walls)]
    assert _chars(outside(found, protected)) == _chars(found) - _chars(walls)
