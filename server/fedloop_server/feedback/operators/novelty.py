"""How new a text is: the distance of its embedding from a sample of those before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final

import numpy as np
from fedloop_events.ids import derived_id
from msgspec import Struct

Embed = Callable[[str], Sequence[float]]
"""The embedding of a text, always of the same width, not all zero."""

MAX_SAMPLED: Final = 32
MAX_WIDTH: Final = 4_096


class Sampled(Struct):
    """One embedding of the sample, of length 1, as float32, and its rank, which is as good as drawn by chance."""

    rank: str
    embedding: bytes


def novelty(sample: list[Sampled], event_id: str, embedding: Sequence[float]) -> float:
    """1 - the largest cosine with one of the sample, between 0 and 1; 1 where there is none. Then it joins the sample.

    The sample keeps the `MAX_SAMPLED` of the smallest ranks, which are functions of the event ids: a uniform one, in any order.
    Raises `ValueError` for what is no embedding.
    """
    vector = np.asarray(embedding, np.float32)
    if not 0 < vector.size <= MAX_WIDTH or not np.isfinite(vector).all() or not (length := float(np.linalg.norm(vector))):
        raise ValueError(f"an embedding has 1 to {MAX_WIDTH} finite numbers that are not all zero")
    vector = vector / length
    known = [np.frombuffer(each.embedding, np.float32) for each in sample]
    nearest = max((float(vector @ each) for each in known if each.size == vector.size), default=0.0)
    sample.append(Sampled(derived_id("sampled", event_id), vector.tobytes()))
    sample.sort(key=lambda each: each.rank)
    del sample[MAX_SAMPLED:]
    return min(1.0, max(0.0, 1.0 - nearest))
