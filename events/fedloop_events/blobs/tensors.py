"""Tensors as safetensors bytes (https://huggingface.co/docs/safetensors#format), written deterministically and read strictly.

The reader refuses what the format's own library lets through: duplicate names, unbounded shapes and headers.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType
from typing import Annotated, Any, Final, NoReturn

import msgspec
import numpy as np
from msgspec import Meta, Struct

from fedloop_events.errors import TensorError

MAX_HEADER_BYTES: Final = 64 * 1024
MAX_RANK: Final = 8
_MAX_BYTES: Final = 2**53
_NAME: Final = re.compile(r"(?!__metadata__\Z)[!-~]{1,200}")
_SIZES: Final = {
    "BOOL": 1, "U8": 1, "I8": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8,
}  # fmt: skip
_NUMPY: Final = {
    "BOOL": "?", "U8": "u1", "I8": "i1", "U16": "<u2", "I16": "<i2", "F16": "<f2",
    "U32": "<u4", "I32": "<i4", "F32": "<f4", "U64": "<u8", "I64": "<i8", "F64": "<f8",
}  # fmt: skip
_NAMES: Final = {np.dtype(code): name for name, code in _NUMPY.items()}

Array = np.ndarray[Any, np.dtype[Any]]


class TensorSpec(Struct, frozen=True):
    """One tensor without its values; `dtype` as safetensors names it ("F32")."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def size_bytes(self) -> int:
        return math.prod(self.shape) * _SIZES[self.dtype]


_Dimension = Annotated[int, Meta(ge=0, le=_MAX_BYTES)]


class _Entry(Struct, frozen=True, forbid_unknown_fields=True):
    dtype: str
    shape: Annotated[list[_Dimension], Meta(max_length=MAX_RANK)]
    data_offsets: tuple[_Dimension, _Dimension]


def specs(arrays: Mapping[str, Array]) -> list[TensorSpec]:
    """What `encode(arrays)` holds. Raises `TensorError` for a name, dtype or rank that it cannot hold."""
    return [_spec(name, array) for name, array in arrays.items()]


def encode(arrays: Mapping[str, Array], metadata: Mapping[str, str] = MappingProxyType({})) -> Iterator[bytes | memoryview]:
    """The safetensors file of `arrays`, in their order, without copying those that are C-contiguous and little-endian.

    A function of names, dtypes, shapes, values and `metadata` alone. Raises `TensorError` before the first chunk.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    offset = 0
    for spec in specs(arrays):
        end = offset + spec.size_bytes
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [offset, end]}
        offset = end
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    for array in arrays.values():
        if array.size:
            plain = np.ascontiguousarray(array, dtype=array.dtype.newbyteorder("<"))
            yield plain.reshape(-1).view(np.uint8).data


def decode(data: bytes | memoryview, *, max_header_bytes: int = MAX_HEADER_BYTES) -> dict[str, Array]:
    """The arrays in `data`, in its order, as read-only views of it. Raises `TensorError` unless it is exactly such a file."""
    entries, offset = read_header(data, max_header_bytes=max_header_bytes)
    view = memoryview(data).cast("B")
    arrays: dict[str, Array] = {}
    for spec in entries:
        if spec.dtype not in _NUMPY:
            raise TensorError(f"tensor {spec.name} is {spec.dtype}, which numpy does not have")
        if spec.dtype == "BOOL" and any(view[offset : offset + spec.size_bytes].tobytes().translate(None, b"\0\1")):
            raise TensorError(f"tensor {spec.name} holds a truth value that is neither 0 nor 1")
        array = np.frombuffer(view, _NUMPY[spec.dtype], math.prod(spec.shape), offset).reshape(spec.shape)
        array.flags.writeable = False
        arrays[spec.name] = array
        offset += spec.size_bytes
    return arrays


def read_header(
    data: bytes | memoryview, *, max_header_bytes: int = MAX_HEADER_BYTES, total_bytes: int | None = None
) -> tuple[list[TensorSpec], int]:
    """What a safetensors file holds, in the order of its bytes, and where they begin.

    `data` is the file, or as much of its beginning as holds the header, with `total_bytes` the size of the whole. Tensors must
    cover the rest of the file without hole or overlap, in the header's own order. Raises `TensorError`.
    """
    view = memoryview(data).cast("B")
    total = len(view) if total_bytes is None else total_bytes
    length = int.from_bytes(view[:8], "little")
    if len(view) < 8 or not 2 <= length <= min(max_header_bytes, len(view) - 8):
        raise TensorError(f"not a tensor file: its header must have 2 to {max_header_bytes:,} bytes and be complete")
    entries, end = [], 0
    for name, entry in _parse(bytes(view[8 : 8 + length])):
        if _NAME.fullmatch(name) is None:
            raise TensorError("a tensor's name is not 1 to 200 printable ASCII characters")
        if entry.dtype not in _SIZES:
            raise TensorError(f"tensor {name} has a dtype that is not in the list")
        spec = TensorSpec(name, entry.dtype, tuple(entry.shape))
        if entry.data_offsets[0] != end or entry.data_offsets[1] != end + spec.size_bytes:
            raise TensorError(f"tensor {name} does not lie where the one before it ends, or has not the size of its shape")
        end += spec.size_bytes
        entries.append(spec)
    if 8 + length + end != total:
        raise TensorError(f"a tensor file has {total:,} bytes; its header describes {8 + length + end:,}")
    return entries, 8 + length


def metadata(data: bytes | memoryview, *, total_bytes: int | None = None) -> dict[str, str]:
    """The free text in the header of a file that `read_header` takes. Raises `TensorError`."""
    _, start = read_header(data, total_bytes=total_bytes)
    found = json.loads(bytes(memoryview(data).cast("B")[8:start])).get("__metadata__", {})
    return msgspec.convert(found, dict[str, str])


def check(got: Sequence[TensorSpec], expected: Sequence[TensorSpec]) -> None:
    """Raise `TensorError`, naming the first difference, unless `got` is exactly `expected`, in order."""
    for number, (one, other) in enumerate(zip(got, expected, strict=False)):
        if one.name != other.name:
            raise TensorError(f"tensor {number} is not {other.name}")
        if one != other:
            raise TensorError(
                f"tensor {other.name} is {one.dtype} {list(one.shape)}, not {other.dtype} {list(other.shape)}",
            )
    if len(got) != len(expected):
        raise TensorError(f"there are {len(got)} tensors, not {len(expected)}")


def first(values: Array) -> tuple[slice, ...]:
    """Where in a tensor that is as large, or larger, those are that stand first in every dimension."""
    return tuple(map(slice, values.shape))


def completed(part: Mapping[str, Array], whole: Mapping[str, Array]) -> dict[str, Array]:
    """Tensors of which some are the first rows and columns of those of `whole`, with the rest as it is there."""
    made = {}
    for name, values in part.items():
        made[name] = values
        if values.shape != whole[name].shape:
            made[name] = whole[name].copy()
            made[name][first(values)] = values
    return made


def _spec(name: str, array: Array) -> TensorSpec:
    dtype = _NAMES.get(array.dtype.newbyteorder("<"))
    if dtype is None:
        raise TensorError(f"dtype {array.dtype} cannot be stored", hint=f"use one of {', '.join(_NUMPY)}")
    if _NAME.fullmatch(name) is None:
        raise TensorError("a tensor's name is not 1 to 200 printable ASCII characters")
    if array.ndim > MAX_RANK:
        raise TensorError(f"tensor {name} has {array.ndim} dimensions; at most {MAX_RANK} can be stored")
    return TensorSpec(name, dtype, array.shape)


def _parse(text: bytes) -> list[tuple[str, _Entry]]:
    try:
        # The standard parser is the one that shows duplicate names.
        pairs = json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_refuse, parse_float=_refuse)
        if not isinstance(pairs, dict):
            raise TensorError("a tensor file's header is not a JSON object")
        msgspec.convert(pairs.pop("__metadata__", {}), dict[str, str])
        return list(msgspec.convert(pairs, dict[str, _Entry]).items())
    except (ValueError, RecursionError, msgspec.ValidationError):
        raise TensorError("a tensor file's header is not what the safetensors format says") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise TensorError("a tensor file's header names something twice")
    return result


def _refuse(text: str) -> NoReturn:
    raise ValueError("not an integer")
