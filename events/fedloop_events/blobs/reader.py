"""Reading tensor blobs, hash checked, without reading one twice."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import Any

from numpy.typing import NDArray

from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_events.types import BlobRef


class TensorReader:
    """Reads tensor blobs, hash checked, each whole in one read.

    Keeps the last blob, and the first ones that fit into `keep_bytes` together: a strategy that goes through the replies again
    does not hash them again, and memory stays flat.
    """

    def __init__(self, blobs: BlobStore, *, keep_bytes: int = 64 << 20) -> None:
        self.blobs, self.keep_bytes = blobs, keep_bytes
        self._kept: dict[str, dict[str, NDArray[Any]]] = {}
        self._kept_bytes = 0
        self._last: tuple[str, dict[str, NDArray[Any]]] = ("", {})
        self._lock = threading.Lock()

    def tensors(self, ref: BlobRef) -> Mapping[str, NDArray[Any]]:
        """Read-only arrays by name, in the order of the blob. Raises BlobError or TensorError."""
        with self._lock:
            if (kept := self._kept.get(ref.sha256)) is not None:
                return kept
            if self._last[0] != ref.sha256:
                self._last = ("", {})  # let go of it before the next one is read
                arrays = tensors.decode(self.blobs.get(ref, max_bytes=ref.size_bytes))
                if self._kept_bytes + ref.size_bytes <= self.keep_bytes:
                    self._kept[ref.sha256] = arrays
                    self._kept_bytes += ref.size_bytes
                self._last = (ref.sha256, arrays)
            return self._last[1]

    def forget(self) -> None:
        """Let go of what is kept; what is asked for later is read again."""
        with self._lock:
            self._kept, self._kept_bytes, self._last = {}, 0, ("", {})
