"""GGUF files (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, version 2 and 3), read with bounds on what they claim.

The `gguf` package's own reader (0.19) takes every count in a file at its word; only its arithmetic of quantised values is used.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import numpy as np
from fedloop_events.blobs.tensors import Array
from fedloop_events.errors import UsageError
from msgspec import Struct

_MAX_KEYS: Final = 4_096
_MAX_TENSORS: Final = 65_536
_MAX_ITEMS: Final = 4_194_304
"""Of one array: ten times the largest vocabulary in use."""
_MAX_TEXT_BYTES: Final = 1_048_576
_MAX_DIMENSIONS: Final = 4
_BLOCK_VALUES: Final = 1_048_576
_TEXT, _ARRAY = 8, 9
_SCALARS: Final = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_PLAIN: Final = {"F32": "<f4", "F16": "<f2"}


def blocks(array: Array) -> Iterator[Array]:
    """Its rows in their order, so many at a time that they are not large in any type; as many for each type."""
    rows = max(1, _BLOCK_VALUES * len(array) // max(array.size, 1))
    return (array[at : at + rows] for at in range(0, len(array), rows))


class GgufTensor(Struct, frozen=True):
    """Where a tensor lies in the file; the last dimension of `shape` is the one whose values lie side by side."""

    name: str
    shape: tuple[int, ...]
    quantisation: str
    begin: int
    size_bytes: int


class GgufFile:
    """The metadata and the tensors of a GGUF file, which is mapped into memory and not read as a whole.

    Raises UsageError for what is no such file, is cut short, or claims more than it holds.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with path.open("rb") as file:
                self._data = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:  # an empty file cannot be mapped
            raise UsageError(f"{path} cannot be read", cause=getattr(error, "strerror", None) or "it is empty") from None
        self._at = 0
        if self._data[:4] != b"GGUF":
            raise UsageError(f"{path} is no GGUF file", hint="give a GGUF file, or a Hugging Face folder with safetensors")
        self._at = 4
        version = self._number("<I")
        if version not in (2, 3):
            raise self._wrong(f"its version is {version}, and 2 and 3 can be read")
        tensors = self._count(_MAX_TENSORS, "tensors")
        keys = self._count(_MAX_KEYS, "keys")
        self.metadata: dict[str, Any] = {}
        for _ in range(keys):
            key = self._text()
            if key in self.metadata:
                raise self._wrong(f"the key {key[:80]!r} is there twice")
            self.metadata[key] = self._value(self._number("<I"))
        self.tensors = self._read_tensors(tensors)

    def get(self, key: str, kind: type, default: Any = None) -> Any:
        """The value of `key`. Raises UsageError if it is of another kind, or (without a default) not there."""
        value = self.metadata.get(key, default)
        if value is None:
            raise self._wrong(f"it has no {key}")
        if kind is float and type(value) is int:
            value = float(value)
        if type(value) is not kind:
            raise self._wrong(f"its {key} is no {kind.__name__}")
        return value

    def read(self, name: str) -> Iterator[Array]:
        """The tensor's values in float32, and in the file's shape, some rows at a time. Raises UsageError for a quantisation that
        cannot be read."""
        tensor = self.tensors[name]
        data = np.frombuffer(self._data, np.uint8, tensor.size_bytes, tensor.begin)
        if (plain := _PLAIN.get(tensor.quantisation)) is not None:
            yield from (rows.astype(np.float32, copy=False) for rows in blocks(data.view(plain).reshape(tensor.shape)))
            return
        from gguf import GGMLQuantizationType, dequantize

        for rows in blocks(data.reshape(*tensor.shape[:-1], -1)):
            try:
                yield dequantize(rows, GGMLQuantizationType[tensor.quantisation])
            except (NotImplementedError, ValueError):
                raise self._wrong(
                    f"{name} is quantised as {tensor.quantisation}, which cannot be read", "take a file in Q8_0 or F16"
                ) from None

    def _read_tensors(self, count: int) -> dict[str, GgufTensor]:
        found: list[tuple[str, tuple[int, ...], str, int, int]] = []
        for _ in range(count):
            name = self._text()
            dimensions = self._number("<I")
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                raise self._wrong(f"a tensor has {dimensions} dimensions")
            shape = tuple(self._number("<Q") for _ in range(dimensions))[::-1]
            kind, offset = self._number("<I"), self._number("<Q")
            quantisation, size_bytes = self._size(name, shape, kind)
            found.append((name, shape, quantisation, offset, size_bytes))
        alignment = self.get("general.alignment", int, 32)
        if not 8 <= alignment <= 4_096 or alignment % 8:
            raise self._wrong(f"its alignment is {alignment}")
        base = -(-self._at // alignment) * alignment
        tensors = {}
        for name, shape, quantisation, offset, size_bytes in found:
            if name in tensors:
                raise self._wrong(f"the tensor {name[:80]!r} is there twice")
            if base + offset + size_bytes > len(self._data) or offset % alignment:
                raise self._wrong(f"the tensor {name[:80]!r} does not lie within the file: it is cut short or damaged")
            tensors[name] = GgufTensor(name, shape, quantisation, base + offset, size_bytes)
        return tensors

    def _size(self, name: str, shape: tuple[int, ...], kind: int) -> tuple[str, int]:
        """How a tensor is quantised, and how many bytes it has."""
        try:
            from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
        except ImportError:
            raise UsageError("the package that reads GGUF files is not installed", hint="install fedloop[models]") from None
        try:
            quantisation = GGMLQuantizationType(kind)
        except ValueError:
            raise self._wrong(f"{name[:80]!r} is quantised in a way of number {kind}, which is not known") from None
        block, block_bytes = GGML_QUANT_SIZES[quantisation]
        if not all(1 <= each <= 2**40 for each in shape) or shape[-1] % block:
            raise self._wrong(f"the tensor {name[:80]!r} has the shape {list(shape)}")
        return quantisation.name, math.prod(shape) // block * block_bytes

    def _value(self, kind: int) -> Any:
        if kind == _TEXT:
            return self._text()
        if kind == _ARRAY:
            below = self._number("<I")
            if below == _TEXT:
                return [self._text() for _ in range(self._count(_MAX_ITEMS, "items"))]
            if (code := _SCALARS.get(below)) is None:
                raise self._wrong(f"a value is a list of kind {below}")
            size = self._count(_MAX_ITEMS, "items") * struct.calcsize(code)
            return [each for (each,) in struct.iter_unpack(code, self._take(size))]
        if (code := _SCALARS.get(kind)) is None:
            raise self._wrong(f"a value is of kind {kind}")
        return self._number(code)

    def _text(self) -> str:
        length = self._number("<Q")
        if length > _MAX_TEXT_BYTES:
            raise self._wrong(f"a text claims to have {length:,} bytes")
        try:
            return self._take(length).decode()
        except UnicodeDecodeError:
            raise self._wrong("a text is not UTF-8") from None

    def _count(self, most: int, what: str) -> int:
        """How many things follow; each is read before anything is allocated for the next."""
        count: int = self._number("<Q")
        if count > most:
            raise self._wrong(f"it claims to have {count:,} {what}")
        return count

    def _number(self, code: str) -> Any:
        return struct.unpack(code, self._take(struct.calcsize(code)))[0]

    def _take(self, size: int) -> bytes:
        data = self._data[self._at : self._at + size]
        if len(data) < size:
            raise self._wrong("it is cut short")
        self._at += size
        return data

    def _wrong(self, cause: str, hint: str = "") -> UsageError:
        return UsageError(f"{self.path} cannot be read as a model", cause=cause, hint=hint)
