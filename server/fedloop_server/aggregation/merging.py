"""Merging updates: one pass over their blobs, in flat memory, with bytes that depend on nothing but the updates and their order.

Every element is multiplied by its weight, then added to an accumulator of float32 or wider, update after update: two rounded
operations that are the same on every CPU (a fused multiply-add is not) and for any number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import fedloop_tasks.updates as coding
import numpy as np
from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_events.blobs.tensors import TensorSpec
from fedloop_events.errors import FedloopError, TensorError
from fedloop_events.types import AcceptedUpdate, BlobRef, RoundOpened
from fedloop_tasks.table import program_of
from fedloop_tasks.task import STATE, Arrays, Program
from numpy.typing import NDArray

BLOCK_BYTES: Final = 256 * 1024
"""Fits into the second-level cache; larger than any header that is allowed."""
_WIRE: Final[Mapping[str, np.dtype[Any]]] = {"F16": np.dtype("<f2"), "I8": np.dtype("i1")}
_DTYPES: Final[Mapping[str, np.dtype[Any]]] = {"F16": np.dtype("<f2"), "F32": np.dtype("<f4"), "F64": np.dtype("<f8")}


class _Smaller(NamedTuple):
    """What updates of a round may hold that are a part of the base's tensors, as they are sent."""

    opened: RoundOpened
    base: Arrays
    specs: Sequence[Sequence[TensorSpec]]

    def holds(self, blobs: BlobStore, ref: BlobRef) -> bool:
        """Whether an update is one of them."""
        if not self.specs:
            return False
        found, _ = tensors.read_header(next(blobs.blocks(ref, block_bytes=BLOCK_BYTES)), total_bytes=ref.size_bytes)
        return found in self.specs

    def completed(self, blobs: BlobStore, ref: BlobRef) -> Arrays:
        """The whole tensors that an update stands for."""
        sent = tensors.decode(blobs.get(ref))
        return tensors.completed(coding.decode(self.opened, self.base, sent), self.base)


class MergeError(FedloopError):
    """There is nothing to merge, or nothing that can be."""


def weighted_mean(
    blobs: BlobStore, updates: Sequence[tuple[BlobRef, float]], specs: Sequence[TensorSpec]
) -> dict[str, NDArray[Any]]:
    """The mean of `updates`, each by its weight, in their order: float32 arrays, float64 where the updates are.

    With equal weights and float32 updates the bytes are those of Flower's FedAvg. Memory: the result and one block.

    Raises MergeError without updates or with a weight that is not positive and finite, TensorError if a blob holds anything but
    `specs`, BlobError if its bytes are wrong.
    """
    return _mean(blobs, updates, specs)


def _mean(
    blobs: BlobStore, updates: Sequence[tuple[BlobRef, float]], specs: Sequence[TensorSpec], smaller: _Smaller | None = None
) -> dict[str, NDArray[Any]]:
    whole = _whole([weight for _, weight in updates])
    return _accumulate(specs, [(weight / whole, _values(blobs, ref, specs, smaller)) for ref, weight in updates])


def total(blobs: BlobStore, updates: Sequence[BlobRef], specs: Sequence[TensorSpec]) -> dict[str, NDArray[Any]]:
    """The sum of `updates`, in their order; dtypes, memory and errors as for `weighted_mean`."""
    if not updates:
        raise MergeError("a sum needs at least one update")
    return _accumulate(specs, [(1.0, _values(blobs, ref, specs)) for ref in updates])


def merge(
    blobs: BlobStore,
    opened: RoundOpened,
    base: Arrays,
    accepted: Sequence[AcceptedUpdate],
    stale: Mapping[str, RoundOpened] = MappingProxyType({}),
) -> dict[str, NDArray[Any]]:
    """The release that a round makes of its accepted updates: a function of its arguments alone, so that anyone can repeat it.

    `base` are the arrays of the round's base release, with what its program remembers (`releases.get`); so are those that are
    returned. What is made of the total, or of the mean, is the round's program's.
    `stale` are the terms of the earlier rounds that some of the updates, by id, were made in: of such a one what counts is its
    change of its own base, times `staleness_weight`.

    Raises MergeError, TensorError and BlobError as `weighted_mean` does, UnknownProgramError for a program that is not there.
    """
    program = program_of(opened.strategy)
    own = f"{STATE}{program.name}."
    base = {name: values for name, values in base.items() if not name.startswith(STATE) or name.startswith(own)}
    updates = [(update.blob, update.weight) for update in accepted if update.blob is not None]
    if len(updates) != len(accepted):
        raise MergeError("an accepted update has no tensors")
    specs = program.specs(opened, base)
    smaller = _Smaller(opened, base, [coding.sent(each, opened) for each in program.smaller(opened, base)])
    if stale or coding.bits(opened) < 32:
        combined = _mean_of_changes(blobs, opened, base, accepted, stale, specs, smaller)
    elif program.combines == "sum":
        combined = total(blobs, [ref for ref, _ in updates], specs)
    else:
        combined = _mean(blobs, updates, specs, smaller)
    if callable(program.combines):
        combined = program.combines(opened, base, combined, _shares(blobs, updates, smaller))
    return program.apply(opened, base, combined)


def buffers(program: Program) -> bool:
    """Whether updates of different bases can be merged: what counts of each is how it changed its base."""
    return program.from_base and program.combines == "mean"


def staleness_weight(rounds: int) -> float:
    """How much an update counts that many rounds after its own (Nguyen et al. 2022, arXiv 2106.06639, appendix D.1)."""
    return 1.0 / math.sqrt(1.0 + rounds)


def _mean_of_changes(
    blobs: BlobStore,
    opened: RoundOpened,
    base: Arrays,
    accepted: Sequence[AcceptedUpdate],
    stale: Mapping[str, RoundOpened],
    specs: Sequence[TensorSpec],
    smaller: _Smaller,
) -> dict[str, NDArray[Any]]:
    """base + sum of c (update - its base), where c is an update's share of the weights times what its staleness leaves of it.

    What is sent in few bits is that difference.
    """
    if stale and not buffers(program_of(opened.strategy)):
        raise MergeError(f"updates of earlier rounds do not count in a round of {opened.strategy}")
    whole = _whole([each.weight for each in accepted])
    shares: list[tuple[float, Iterator[NDArray[Any]]]] = []
    of_base: dict[BlobRef, float] = {}
    for update in accepted:
        made_in = stale.get(update.update_id, opened)
        share = update.weight / whole * staleness_weight(opened.number - made_in.number)
        assert update.blob is not None
        if coding.bits(made_in) < 32 and not smaller.holds(blobs, update.blob):
            shares.append((share, _changes(blobs, update.blob, coding.sent(specs, made_in))))
        else:
            shares.append((share, _values(blobs, update.blob, specs, smaller)))
            of_base[made_in.base] = of_base.get(made_in.base, 0.0) + share
    result = _accumulate(specs, shares)
    left = {ref: -share for ref, share in of_base.items()} | {opened.base: 1.0 - of_base.get(opened.base, 0.0)}
    for ref, share in left.items():
        arrays = base if ref == opened.base else tensors.decode(blobs.get(ref))
        tensors.check(tensors.specs({name: arrays[name] for name in result if name in arrays}), specs)
        for name, values in result.items():
            values += arrays[name].astype(values.dtype) * values.dtype.type(share)
    return result


def _whole(weights: Sequence[float]) -> float:
    whole = sum(weights)
    if not weights or not all(weight > 0 for weight in weights) or not np.isfinite(whole):
        raise MergeError("a mean needs at least one update, and weights that are positive and finite")
    return whole


def _shares(blobs: BlobStore, updates: Sequence[tuple[BlobRef, float]], smaller: _Smaller) -> Iterator[tuple[Arrays, float]]:
    """The tensors of each update, and its share of the weights."""
    whole = sum(weight for _, weight in updates)
    return ((smaller.completed(blobs, ref), weight / whole) for ref, weight in updates)


def _accumulate(specs: Sequence[TensorSpec], updates: Sequence[tuple[float, Iterator[NDArray[Any]]]]) -> dict[str, NDArray[Any]]:
    """The sum of the updates, which come in blocks, each times its factor."""
    dtype = _common_dtype(specs)
    wide = np.promote_types(dtype, np.float32)
    count = sum(spec.size_bytes for spec in specs) // dtype.itemsize
    result, scratch = np.zeros(count, wide), np.empty(BLOCK_BYTES, wide)
    for number, (weight, blocks) in enumerate(updates):
        at = 0
        for values in blocks:
            part = result[at : at + values.size]
            if number == 0:
                np.multiply(values, wide.type(weight), out=part, dtype=wide)
            else:
                product = np.multiply(values, wide.type(weight), out=scratch[: values.size], dtype=wide)
                np.add(part, product, out=part)
            at += values.size
    return _split(result, specs)


def _values(
    blobs: BlobStore, ref: BlobRef, specs: Sequence[TensorSpec], smaller: _Smaller | None = None
) -> Iterator[NDArray[Any]]:
    """The elements of a blob in blocks, in order; each block is valid until the next. Of a smaller one, those of the
    whole that it is a part of."""
    if smaller is None or not smaller.holds(blobs, ref):
        yield from _elements(_data(blobs, ref, specs), _common_dtype(specs))
        return
    for values in smaller.completed(blobs, ref).values():
        flat = values.reshape(-1)
        yield from (flat[start : start + BLOCK_BYTES] for start in range(0, flat.size, BLOCK_BYTES))


def _changes(blobs: BlobStore, ref: BlobRef, specs: Sequence[TensorSpec]) -> Iterator[NDArray[Any]]:
    """The same of what an update in few bits stands for: its scales are kept, a sixteenth of its values in float32."""
    data, held = _data(blobs, ref, specs), bytearray()
    while len(held) < specs[0].size_bytes and (block := next(data, None)) is not None:
        held += block
    scales = np.frombuffer(bytes(held[: specs[0].size_bytes]), "<f4")
    del held[: specs[0].size_bytes]
    at = 0
    for values in _elements(chain([held], data), _WIRE[specs[-1].dtype]):
        yield coding.change(scales, values, at)
        at += values.size


def _data(blobs: BlobStore, ref: BlobRef, specs: Sequence[TensorSpec]) -> Iterator[bytes | bytearray | memoryview]:
    """The bytes after a blob's header, which is checked; each block is valid until the next."""
    for number, block in enumerate(blobs.blocks(ref, block_bytes=BLOCK_BYTES)):
        start = 0
        if number == 0:
            found, start = tensors.read_header(block, total_bytes=ref.size_bytes)
            tensors.check(found, specs)
        yield block[start:]


def _elements(data: Iterator[bytes | bytearray | memoryview], dtype: np.dtype[Any]) -> Iterator[NDArray[Any]]:
    """At most `BLOCK_BYTES` of them at once, however many bytes come together."""
    rest = b""
    for block in data:
        # Elements are cut only where another writer's header was not padded, or the file system gave less than asked for.
        together = rest + bytes(block) if rest else block
        whole = len(together) // dtype.itemsize * dtype.itemsize
        rest = bytes(together[whole:])
        for begin in range(0, whole, BLOCK_BYTES):
            yield np.frombuffer(together[begin : min(begin + BLOCK_BYTES, whole)], dtype)


def _common_dtype(specs: Sequence[TensorSpec]) -> np.dtype[Any]:
    names = {spec.dtype for spec in specs}
    if len(names) != 1 or (dtype := _DTYPES.get(min(names))) is None:
        raise TensorError("tensors that are merged must all be F16, all F32 or all F64")
    return dtype


def _split(flat: NDArray[Any], specs: Sequence[TensorSpec]) -> dict[str, NDArray[Any]]:
    arrays, at = {}, 0
    for spec in specs:
        size = int(np.prod(spec.shape, dtype=np.int64))
        arrays[spec.name] = flat[at : at + size].reshape(spec.shape)
        at += size
    return arrays
