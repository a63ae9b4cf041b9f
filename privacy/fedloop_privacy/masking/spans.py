"""Spans of personal data, and how those that touch become one mask."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Final, NamedTuple

import regex

PLACEHOLDER: Final = regex.compile(r"<(?<type>[A-Z][A-Z0-9_]{0,37})_(?<number>[1-9]\d{0,3})>")
"""What stands in a masked text for a value."""


class Span(NamedTuple):
    """The stretch [start, end) of a text, in characters; `type` is Presidio's entity name; `score` is in (0, 1]."""

    start: int
    end: int
    type: str
    score: float


def union(spans: Iterable[Span]) -> list[Span]:
    """Sorted spans apart from each other that cover every character of those given.

    Overlapping ones become one, with the type and score of the one that is surest, and among equals the longest.
    """
    merged: list[Span] = []
    rank: tuple[float, int] = (0.0, 0)
    for span in sorted(spans):
        own = (span.score, span.end - span.start)
        if merged and span.start < merged[-1].end:
            last = merged[-1]
            best = span if own > rank else last
            rank = max(rank, own)
            merged[-1] = Span(last.start, max(last.end, span.end), best.type, best.score)
        else:
            merged.append(span)
            rank = own
    return merged


def outside(spans: Iterable[Span], protected: Iterable[tuple[int, int]]) -> list[Span]:
    """The parts of the spans that lie outside the protected stretches, which are sorted and apart from each other."""
    walls = list(protected)
    if not walls:
        return list(spans)
    parts: list[Span] = []
    for span in spans:
        at = span.start
        for start, end in walls:
            if end <= at or start >= span.end:
                continue
            if at < start:
                parts.append(span._replace(start=at, end=start))
            at = end
        if at < span.end:
            parts.append(span._replace(start=at))
    return parts
