"""Which blobs an event names."""

from __future__ import annotations

from collections.abc import Iterator

from msgspec import Struct

from fedloop_events.types import BlobRef


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
