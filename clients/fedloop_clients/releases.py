"""The release that a device answers with: its name and its tensors, kept in the device's store."""

from __future__ import annotations

import hashlib
from typing import Final

import msgspec
from fedloop_events.blobs.store import BlobStore
from fedloop_events.errors import BlobError, UsageError
from fedloop_events.folds.releases import ReleaseState
from fedloop_events.types import BlobRef, Spec
from msgspec import Struct

from fedloop_clients.store import Store

_RELEASE: Final = "release"
_TENSORS: Final = "tensors"
MAX_RELEASE_BYTES: Final = 512 << 20
"""Half of what SQLite can hold in one value."""


class NoReleaseError(UsageError):
    """The device has no release to answer with yet."""


class KeptRelease(Struct, frozen=True):
    """A release whose tensors the store has, and the spec of its model."""

    model: str
    release: str
    blob: BlobRef
    spec: Spec


class KeptReleases:
    """One release at a time: the newest whose tensors could be had, which any process that opens the store sees."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def current(self, model: str) -> KeptRelease | None:
        """The release of `model` that is kept."""
        found = self._store.kept(_RELEASE)
        kept = None if found is None else msgspec.msgpack.decode(found, type=KeptRelease)
        return kept if kept is not None and kept.model == model else None

    def keep(self, model: str, spec: Spec, release: ReleaseState, blobs: BlobStore) -> None:
        """Fetch a release's tensors, unless they are kept, and keep them in place of another's. Raises what `BlobStore` does."""
        kept = self.current(model)
        new = KeptRelease(model, release.release, release.blob, spec)
        if kept == new:
            return
        same = kept is not None and kept.blob == release.blob
        data = None if same else blobs.get(release.blob, max_bytes=MAX_RELEASE_BYTES)
        with self._store.transaction():
            self._store.keep(_RELEASE, msgspec.msgpack.encode(new))
            if data is not None:
                self._store.keep(_TENSORS, data)

    def tensors(self, blob: BlobRef) -> bytes:
        """The bytes of the release's blob. Raises `BlobError` if those of another one are kept by now."""
        data = self._store.kept(_TENSORS) or b""
        if hashlib.sha256(data).hexdigest() != blob.sha256:
            raise BlobError(f"blob {blob.sha256} is not in the device's store", hint="another release took its place: try again")
        return data
