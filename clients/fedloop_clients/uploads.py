"""The tensors of answers that the log does not have yet: kept in the device's store, and put again before the answer is sent.

A device may be away for longer than a blob store keeps what no event names. What was put into it then counts for nothing: when
the answer goes out, its tensors are put first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Final

from fedloop_events import envelope, types
from fedloop_events.blobs.naming import named_blobs
from fedloop_events.blobs.store import BlobStore
from fedloop_events.envelope import Event
from fedloop_events.errors import UsageError
from fedloop_events.types import BlobRef, Content

from fedloop_clients.store import Store

MAX_KEPT_BYTES: Final = 256 << 20
"""Of one blob: more does not go into a row of the store. A larger one is put once, when it is made."""
_PREFIX: Final = "upload/"


class Recorder:
    """What puts an answer's tensors into the blob store, and holds them until the answer is signed."""

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self.put_blobs: dict[str, bytes] = {}

    def put(self, chunks: Iterable[bytes | memoryview]) -> BlobRef:
        parts, size = [], 0
        for chunk in chunks:
            parts.append(bytes(chunk))
            size += len(parts[-1])
        ref = self._blobs.put(parts)
        if size <= MAX_KEPT_BYTES:
            self.put_blobs[ref.sha256] = b"".join(parts)
        return ref


class Uploads:
    """The kept tensors of the device in `store`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def keep(self, content: Content, made: Recorder) -> None:
        """Keep what the answer names of what was made for it, within the caller's transaction."""
        for ref in named_blobs(content):
            if (held := made.put_blobs.get(ref.sha256)) is not None:
                self._store.keep(_PREFIX + ref.sha256, held)

    def put(self, due: Sequence[Event], blobs: Callable[[], BlobStore]) -> None:
        """Put what the events name, before they are appended. Raises what the blob store raises."""
        answers = [envelope.decode(each) for each in due if each.type == types.UpdateSubmitted.type_name]
        for name in sorted({ref.sha256 for payload in answers for ref in named_blobs(payload)}):
            if (held := self._store.kept(_PREFIX + name)) is not None:
                # A gateway takes none for an answer that the log has already: then only its acknowledgement was lost.
                with suppress(UsageError):
                    if not blobs().refresh(BlobRef(name, len(held))):
                        blobs().put([held])

    def forget(self) -> None:
        """Let go of what is kept, unless an event is due that may name it."""
        if self._store.rows("SELECT 1 FROM kept WHERE name GLOB ?", (f"{_PREFIX}*",)):
            with self._store.transaction() as db:
                db.execute(
                    "DELETE FROM kept WHERE name GLOB ? AND NOT EXISTS (SELECT 1 FROM outbox WHERE event IS NOT NULL)",
                    (f"{_PREFIX}*",),
                )
