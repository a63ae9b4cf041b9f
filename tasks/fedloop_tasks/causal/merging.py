"""The whole model with a release multiplied into its weights, written some rows at a time: there is never a copy in memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import chain

from fedloop_events.blobs.tensors import Array

from fedloop_tasks.causal.adapted import Pair
from fedloop_tasks.models import weights
from fedloop_tasks.models.families import Part
from fedloop_tasks.models.sources import HuggingFace
from fedloop_tasks.models.weights import Read
from fedloop_tasks.task import Streamed


def merged(source: HuggingFace, pairs: Sequence[Pair], scale: float) -> Streamed:
    """`model.safetensors` of W + `scale` B A, computed and written in float32 as devices compute, in whatever type the base is
    kept; what is tied stays tied."""
    chunks = weights.written(source.parts, "f32", reading(source, pairs, scale))
    header = next(chunks)
    return Streamed(len(header) + weights.size_bytes(source.parts, "f32"), chain([header], chunks))


def reading(source: HuggingFace, pairs: Sequence[Pair], scale: float) -> Read:
    """Reads the merged weights in float32."""
    return partial(_read, source, {each.part.name: each for each in pairs}, scale)


def _read(source: HuggingFace, changes: Mapping[str, Pair], scale: float, part: Part) -> Iterable[Array]:
    pair = changes.get(part.name)
    return source.read(part) if pair is None else _changed(source.read(part), pair, scale)


def _changed(blocks: Iterable[Array], pair: Pair, scale: float) -> Iterator[Array]:
    """The rows of the weight, with those of the change added."""
    left, right = (pair.a.T, pair.b.T) if pair.part.laid == "transposed" else (pair.b, pair.a)
    at = 0
    for block in blocks:
        rows = slice(at, at + len(block))
        at += len(block)
        yield block + scale * (left[rows] @ right)
