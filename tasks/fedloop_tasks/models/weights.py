"""A model's tensors in and out of safetensors files, some rows at a time: there is never a copy of the model in memory."""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec
import numpy as np
from fedloop_events.blobs.tensors import Array, TensorSpec, read_header
from fedloop_events.errors import TensorError, UsageError

from fedloop_tasks.models.families import Part
from fedloop_tasks.models.gguf_file import blocks

Dtype = Literal["f32", "bf16"]
Read = Callable[[Part], Iterable[Array]]
"""The values of a tensor in float32, as Hugging Face lays them out, in blocks of rows."""
_MAX_HEADER_BYTES: Final = 16 * 1024 * 1024


def size_bytes(parts: Sequence[Part], dtype: Dtype) -> int:
    return sum(spec.size_bytes for spec in _specs(parts, dtype))


def written(parts: Sequence[Part], dtype: Dtype, read: Read) -> Iterator[bytes | memoryview]:
    """The safetensors file of these tensors, in their order: a function of names, shapes and values alone.

    Raises UsageError for a value that is not finite in that type.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}  # which Transformers asks for
    offset = 0
    for spec in _specs(parts, dtype):
        end = offset + spec.size_bytes
        header[spec.name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [offset, end]}
        offset = end
    text = msgspec.json.encode(header)
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    exponent = np.uint32(0x7F80_0000) if dtype == "f32" else np.uint16(0x7F80)
    for part in parts:
        for block in read(part):
            values = np.ascontiguousarray(block, "<f4")
            stored = values if dtype == "f32" else bfloat16(values)
            if np.any((stored.view(exponent.dtype) & exponent) == exponent):
                raise UsageError(f"the tensor {part.name} holds values that are not finite in {dtype}")
            yield stored.reshape(-1).view(np.uint8).data


def bfloat16(values: Array) -> Array:
    """The bits of finite float32 values rounded to bfloat16, to the nearest, ties to even."""
    bits = values.view("<u4")
    rounded: Array = ((bits + (np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1)))) >> np.uint32(16)).astype("<u2")
    return rounded


class TensorFile:
    """A safetensors file whose tensors are read one at a time. Raises UsageError for one that is damaged."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            length = int.from_bytes(self._data[:8], "little")
            head = self._data[: 8 + min(length, _MAX_HEADER_BYTES)]
            specs, at = read_header(head, max_header_bytes=_MAX_HEADER_BYTES, total_bytes=len(self._data))
        except (OSError, ValueError, TensorError) as error:
            cause = error.message if isinstance(error, TensorError) else getattr(error, "strerror", None) or "it is empty"
            raise UsageError(f"{path} cannot be read as safetensors", cause=cause) from None
        self.specs: dict[str, TensorSpec] = {}
        self._begins: dict[str, int] = {}
        for spec in specs:
            self.specs[spec.name], self._begins[spec.name] = spec, at
            at += spec.size_bytes

    def read(self, name: str) -> Iterator[Array]:
        """The tensor in float32, some rows at a time. Raises UsageError for one of another type than F32, F16 and BF16."""
        spec = self.specs[name]
        code = {"F32": "<f4", "F16": "<f2", "BF16": "<u2"}.get(spec.dtype)
        if code is None:
            raise UsageError(f"{self._path}: the tensor {name} is {spec.dtype}", hint="take weights in F32, F16 or BF16")
        count = spec.size_bytes // np.dtype(code).itemsize
        values = np.frombuffer(self._data, code, count, self._begins[name]).reshape(spec.shape)
        for rows in blocks(values):
            yield (rows.astype("<u4") << np.uint32(16)).view("<f4") if spec.dtype == "BF16" else rows.astype("<f4", copy=False)


def _specs(parts: Sequence[Part], dtype: Dtype) -> Iterator[TensorSpec]:
    return (TensorSpec(part.name, {"f32": "F32", "bf16": "BF16"}[dtype], part.shape) for part in parts)
