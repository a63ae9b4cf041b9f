"""Embedding shift: whether the texts of late mean what those of before did, by the maximum mean discrepancy of their embeddings.

Gretton et al. (2012), A Kernel Two-Sample Test, JMLR 13, with a Gaussian kernel in random Fourier features (Rahimi and Recht
2007, NeurIPS 20). Of each batch of texts only the mean of its features is kept: the discrepancy of two samples is that of the
means of their batches, and permuting batches tests it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Final

import numpy as np
from msgspec import Struct
from numpy.typing import NDArray

Embed = Callable[[Sequence[str]], NDArray[np.float32]]
"""Vectors [n, d] of n texts: a pure function of each text, or nearly."""
Array = NDArray[np.float64]

NAME: Final = "mmd"
BATCH: Final = 32
"""Texts that are embedded at once."""
MAX_CHARS: Final = 1000
"""Of a text: a model reads no more of it."""
REFERENCE: Final = 16
RECENT: Final = 8
"""Batches: the first ones, with which the last ones are compared after each."""
FEATURES: Final = 256
SQUARED_WIDTH: Final = 1.0
"""Of the kernel: unit vectors of texts that have nothing in common are at a squared distance of 2."""
PERMUTATIONS: Final = (200, 9800)
"""Most samples are so much alike that the first few say so."""
ALARM: Final = 2e-4
"""The p value: the same batches are looked at many times."""


class Embedded(Struct):
    """At most 31 texts of `MAX_CHARS`, and 24 KiB of means of features (float32, little-endian)."""

    waiting: list[str] = []
    reference: bytes = b""
    recent: bytes = b""
    seen: int = 0


def observe(embedded: Embedded, text: str, embed: Embed, seed: str) -> float | None:
    """Take in one text; the p value, if this one shows a shift. After that everything begins anew.

    `seed` is of the permutations, together with how many texts were seen.
    """
    embedded.seen += 1
    embedded.waiting.append(text[:MAX_CHARS])
    if len(embedded.waiting) < BATCH:
        return None
    mean = features(embed(embedded.waiting)).mean(axis=0).astype("<f4").tobytes()
    embedded.waiting = []
    if len(embedded.reference) < REFERENCE * len(mean):
        embedded.reference += mean
        return None
    embedded.recent = (embedded.recent + mean)[-RECENT * len(mean) :]
    if len(embedded.recent) < RECENT * len(mean):
        return None
    p_value = _p_value(embedded.reference + embedded.recent, f"{seed} {embedded.seen}")
    if p_value > ALARM:
        return None
    embedded.reference, embedded.recent, embedded.seen = b"", b"", 0
    return p_value


def features(vectors: NDArray[np.float32]) -> Array:
    """Random Fourier features [n, FEATURES] of the vectors' directions; what is not finite has none."""
    exact = np.nan_to_num(np.asarray(vectors, np.float64), posinf=0.0, neginf=0.0)
    exact /= np.maximum(np.linalg.norm(exact, axis=1, keepdims=True), 1e-12)
    frequencies, phases = _frequencies(exact.shape[1])
    found: Array = np.sqrt(2 / FEATURES) * np.cos(exact @ frequencies + phases)
    return found


def _p_value(batches: bytes, seed: str) -> float:
    """How often as large a discrepancy comes of dividing the same batches by chance."""
    means = np.frombuffer(batches, "<f4").reshape(-1, FEATURES).astype(np.float64)
    means -= means.mean(axis=0)
    alike = means @ means.T
    found = _discrepancies(alike, np.arange(len(means))[None])[0]
    exceeded = tried = 0
    for part, count in enumerate(PERMUTATIONS):
        order = np.argsort(_uniform(f"{seed} {part}", count * len(means)).reshape(count, -1), axis=1)
        exceeded, tried = exceeded + int(np.sum(_discrepancies(alike, order) >= found * (1 - 1e-9))), tried + count
        if exceeded:
            break
    return (exceeded + 1) / (tried + 1)


def _discrepancies(alike: Array, order: NDArray[np.int64]) -> Array:
    """Of each order of the batches: the squared distance between the mean of its last `RECENT` and that of the others."""
    count = alike.shape[0]
    weights = np.full(order.shape, -1 / (count - RECENT))
    np.put_along_axis(weights, order[:, -RECENT:], 1 / RECENT, axis=1)
    found: Array = ((weights @ alike) * weights).sum(axis=1)
    return found


@lru_cache(maxsize=4)
def _frequencies(width: int) -> tuple[Array, Array]:
    """Frequencies [width, FEATURES], normal, and phases [FEATURES]: the same ones for ever."""
    count = width * FEATURES
    radius = np.sqrt(-2 * np.log1p(-_uniform("radii", count)))
    normal = radius * np.cos(2 * np.pi * _uniform("angles", count))
    return normal.reshape(width, FEATURES) * np.sqrt(2 / SQUARED_WIDTH), 2 * np.pi * _uniform("phases", FEATURES)


def _uniform(seed: str, count: int) -> Array:
    """Numbers in [0, 1) that are a function of `seed`."""
    drawn = np.frombuffer(hashlib.shake_256(seed.encode()).digest(4 * count), "<u4")
    return drawn.astype(np.float64) / 2**32
