"""What names a blob: its hash, and the events."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator
from typing import IO, Final

from msgspec import Struct

from fedloop_events.types import BlobRef

BLOB_NAME: Final = re.compile("[0-9a-f]{64}")


class Stored(Struct, frozen=True):
    """A blob as it lies in a store: its name, its size, and when it was written, or put again, in seconds since 1970."""

    sha256: str
    size_bytes: int
    written_s: float


def named_blobs(value: object) -> Iterator[BlobRef]:
    """Every blob that a payload names, wherever it stands."""
    if isinstance(value, BlobRef):
        yield value
    elif isinstance(value, Struct):
        for field in value.__struct_fields__:
            yield from named_blobs(getattr(value, field))
    elif isinstance(value, dict):
        for each in value.values():
            yield from named_blobs(each)
    elif isinstance(value, list) and value and not isinstance(value[0], (str, int, float)):
        for each in value:
            yield from named_blobs(each)


def copy(chunks: Iterable[bytes | memoryview], file: IO[bytes]) -> BlobRef:
    """Write `chunks` into `file`; the name of what they are together."""
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        digest.update(view)
        size += len(view)
        while view:
            view = view[file.write(view) :]
    file.flush()
    return BlobRef(sha256=digest.hexdigest(), size_bytes=size)
