"""A release's tensors in blobs: the model's in its own, what its program remembers in another one, which it names by its hash.

The name stands in the `__metadata__` of the release's file, so a release's hash covers what its program remembers, and devices,
which read tensors alone, neither fetch nor see it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from typing import Final

from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_events.blobs.tensors import Array
from fedloop_events.errors import TensorError
from fedloop_events.types import BlobRef
from fedloop_tasks.task import STATE, Arrays

_KEY: Final = "state"
_MAX_HEADER_BYTES: Final = 1 << 20
"""Several tensors for each one of the model's, with longer names."""


def put(blobs: BlobStore, arrays: Arrays) -> BlobRef:
    """Store a release, what its program remembers first."""
    state = _state(arrays)
    return blobs.put(_encoded(arrays, blobs.put(tensors.encode(state)) if state else None))


def get(blobs: BlobStore, ref: BlobRef) -> dict[str, Array]:
    """A release, with what its program remembers. Raises BlobError, and TensorError for a file that is none."""
    data = blobs.get(ref)
    arrays = tensors.decode(data)
    if (state := _state_of(tensors.metadata(data))) is not None:
        arrays |= tensors.decode(blobs.get(state), max_header_bytes=_MAX_HEADER_BYTES)
    return arrays


def remembered(blobs: BlobStore, ref: BlobRef) -> BlobRef | None:
    """The blob with what a release's program remembers, if it names one; of the release its header alone is read.

    Raises BlobError for a release that is not there, TensorError for a file that is none.
    """
    return _state_of(tensors.metadata(next(blobs.blocks(ref), b""), total_bytes=ref.size_bytes))


def _state_of(metadata: Mapping[str, str]) -> BlobRef | None:
    if (named := metadata.get(_KEY)) is None:
        return None
    sha256, _, size = named.partition(" ")
    if not size.isdecimal():
        raise TensorError("a release names no blob as what its program remembers")
    return BlobRef(sha256, int(size))


def encode(arrays: Arrays) -> Iterator[bytes | memoryview]:
    """The bytes of a release's own blob: a function of all of its tensors."""
    if not (state := _state(arrays)):
        return _encoded(arrays, None)
    digest, size = hashlib.sha256(), 0
    for chunk in tensors.encode(state):
        digest.update(chunk)
        size += len(chunk)
    return _encoded(arrays, BlobRef(digest.hexdigest(), size))


def _encoded(arrays: Arrays, state: BlobRef | None) -> Iterator[bytes | memoryview]:
    model = {name: values for name, values in arrays.items() if not name.startswith(STATE)}
    return tensors.encode(model, {} if state is None else {_KEY: f"{state.sha256} {state.size_bytes}"})


def _state(arrays: Arrays) -> dict[str, Array]:
    return {name: values for name, values in arrays.items() if name.startswith(STATE)}
