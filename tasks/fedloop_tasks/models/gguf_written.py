"""GGUF files written by the package `gguf` (0.19): its header goes into memory, the tensors follow it some rows at a time."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, Final, Literal, NamedTuple

import numpy as np
from fedloop_events.blobs.tensors import Array
from fedloop_events.errors import UsageError

from fedloop_tasks.task import Streamed

_TYPES: Final = {"F32": "<f4", "F16": "<f2"}


class Laid(NamedTuple):
    """A tensor of the file: its name and shape there, its type, and its values in float32, in that shape, by blocks of rows."""

    name: str
    shape: tuple[int, ...]
    dtype: Literal["F32", "F16"]
    read: Callable[[], Iterable[Array]]


def writer(architecture: str) -> Any:
    """A `GGUFWriter` without a file, for the metadata. Raises UsageError if the package is not installed."""
    try:
        import gguf
    except ImportError:
        raise UsageError("the package that writes GGUF files is not installed", hint="install fedloop[models]") from None
    return gguf.GGUFWriter(None, architecture)


def streamed(header: Any, tensors: Sequence[Laid]) -> Streamed:
    """The file of the metadata in `header` and of these tensors. A value that is not finite in its tensor's type raises
    UsageError where the chunks are read."""
    alignment, size = header.data_alignment, 0
    for each in tensors:
        count = int(np.prod(each.shape)) * np.dtype(_TYPES[each.dtype]).itemsize
        header.add_tensor_info(each.name, each.shape, np.dtype(_TYPES[each.dtype]), count)
        size += count + -count % alignment
    head = _head(header)
    head += bytes(-len(head) % alignment)
    return Streamed(len(head) + size, _chunks(head, tensors, alignment))


def _head(header: Any) -> bytes:
    """All that stands before the tensors: the writer takes an open file in place of a path, if it believes to have opened it."""
    from gguf.gguf_writer import WriterState

    file = io.BytesIO()
    header.fout, header.state = [file], WriterState.EMPTY
    header.write_header_to_file()
    header.write_kv_data_to_file()
    header.write_ti_data_to_file()
    return file.getvalue()


def _chunks(head: bytes, tensors: Sequence[Laid], alignment: int) -> Iterator[bytes | memoryview]:
    yield head
    for each in tensors:
        size = 0
        for block in each.read():
            with np.errstate(over="ignore"):  # it is looked for below
                stored = np.ascontiguousarray(block, _TYPES[each.dtype])
            if not np.isfinite(stored).all():
                raise UsageError(f"the tensor {each.name} holds values that are not finite in {each.dtype}")
            size += stored.nbytes
            yield stored.reshape(-1).view(np.uint8).data
        yield bytes(-size % alignment)
