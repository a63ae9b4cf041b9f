"""What an update is sent as: its tensors in float32, or, in 16 or 8 bits, how they change the base's.

A change in few bits has one float32 scale for each `BLOCK` values, in the order of the tensors, and of each value a multiple of
its block's: a float16, or an integer from -127 to 127. Of a block whose largest value is m, no value is off by more than m / 254
in 8 bits; in 16 bits by 2^-11 of itself, or 2^-39 of m where that is more. Nothing overflows: what m is, the scale takes up.

What is sent so is computed from what is sent otherwise, after clipping and noise: it costs no privacy.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, Final

import numpy as np
from fedloop_events.blobs import tensors
from fedloop_events.blobs.tensors import Array, TensorSpec
from fedloop_events.errors import TensorError
from fedloop_events.types import RoundOpened
from numpy.typing import NDArray

from fedloop_tasks.table import program_of
from fedloop_tasks.task import UPDATE_BITS, Arrays, TermsError

SCALES: Final = "update.scales"
"""The first tensor of an update in few bits."""
BLOCK: Final = 64
_PIECE: Final = BLOCK * 1024
_DTYPES: Final = {16: "F16", 8: "I8"}
_LARGEST: Final = 127
_ROOM: Final = 15
"""The largest value of a block in float16 is below 2 to this, which is half of what float16 holds."""
_TINY: Final = float(np.finfo(np.float32).tiny)
"""A block whose scale would be smaller, which not every machine computes with, counts as zero: its values are below 2^-110."""

Floats = NDArray[np.float32]


def bits(opened: RoundOpened) -> int:
    """Of a value in a round's updates, 32 where the round does not say. Raises `TermsError` for what there is not."""
    found = opened.hyperparameters.get(UPDATE_BITS, 32)
    if found != 32 and (found not in _DTYPES or not program_of(opened.strategy).from_base):
        raise TermsError(f"hyperparameter {UPDATE_BITS} must be 32, or 16 or 8 for a change of the base, not {found!r}")
    return int(found)


def sent(specs: Sequence[TensorSpec], opened: RoundOpened) -> list[TensorSpec]:
    """What an update of the round is sent as, whose tensors are `specs`. Raises `TermsError`, and `TensorError` for tensors that
    cannot be sent so."""
    if (width := bits(opened)) == 32:
        return list(specs)
    if any(spec.dtype != "F32" or spec.name == SCALES for spec in specs):
        raise TensorError(f"tensors that are sent in {width} bits must be float32, and none may be called {SCALES}")
    values = sum(math.prod(spec.shape) for spec in specs)
    scales = TensorSpec(SCALES, "F32", (-(-values // BLOCK),))
    return [scales, *(TensorSpec(spec.name, _DTYPES[width], spec.shape) for spec in specs)]


def encode(opened: RoundOpened, base: Arrays, trained: Arrays) -> Arrays:
    """What is sent of the tensors that a device has trained of `base`, or of the first rows and columns of its tensors: the
    nearest that can be said in so many bits.

    Raises `TermsError`, and `TensorError` for a value that is not finite.
    """
    if (width := bits(opened)) == 32:
        return trained
    specs = sent(tensors.specs(trained), opened)
    change = np.concatenate(
        [np.subtract(values, base[name][tensors.first(values)]).reshape(-1) for name, values in trained.items()]
    )
    scales = np.zeros(specs[0].shape, np.float32)
    values = np.zeros(len(change), np.float16 if width == 16 else np.int8)
    for start in range(0, len(change), _PIECE):
        piece = change[start : start + _PIECE]
        found = _scales(piece, width)
        scales[start // BLOCK : start // BLOCK + len(found)] = found
        multiples = piece / np.repeat(np.where(found > 0, found, np.float32(np.inf)), BLOCK)[: len(piece)]
        values[start : start + _PIECE] = multiples if width == 16 else np.clip(np.rint(multiples), -_LARGEST, _LARGEST)
    return {SCALES: scales, **_split(values, specs[1:])}


def _scales(piece: Floats, width: int) -> Floats:
    largest = np.maximum.reduceat(np.abs(piece), np.arange(0, len(piece), BLOCK))
    if not np.isfinite(largest).all():
        raise TensorError("an update holds a value that is not finite")
    if width == 16:
        scales = np.ldexp(np.float32(1), np.frexp(largest)[1] - _ROOM)
        scales[largest == 0] = 0
    else:
        scales = largest / np.float32(_LARGEST)
    scales[scales < _TINY] = 0
    return np.asarray(scales, np.float32)


def change(scales: Floats, values: NDArray[Any], start: int = 0) -> Floats:
    """What `values` stand for, of which the first one is number `start` of all: the one place where it is computed, in float32,
    so that it is the same on every machine."""
    first = start // BLOCK
    own = np.repeat(scales[first : -(-(start + len(values)) // BLOCK)], BLOCK)[start - first * BLOCK :]
    found: Floats = np.multiply(values, own[: len(values)], dtype=np.float32)
    return found


def decode(opened: RoundOpened, base: Arrays, update: Arrays) -> Arrays:
    """The tensors that an update of the round, which holds what `sent` says, stands for."""
    if bits(opened) == 32:
        return update
    moved, at = {}, 0
    for name, values in update.items():
        if name != SCALES:
            moved[name] = base[name][tensors.first(values)] + change(update[SCALES], values.reshape(-1), at).reshape(values.shape)
            at += values.size
    return moved


def changes(update: Arrays) -> Iterator[Floats]:
    """How an update in few bits changes its base, piece by piece."""
    at = 0
    for name, values in update.items():
        flat = values.reshape(-1)
        for start in range(0, 0 if name == SCALES else flat.size, _PIECE):
            piece = flat[start : start + _PIECE]
            yield change(update[SCALES], piece, at)
            at += len(piece)


def _split(flat: NDArray[Any], specs: Sequence[TensorSpec]) -> dict[str, Array]:
    arrays, at = {}, 0
    for spec in specs:
        size = math.prod(spec.shape)
        arrays[spec.name] = flat[at : at + size].reshape(spec.shape)
        at += size
    return arrays
