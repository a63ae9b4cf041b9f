"""The tensors of answers that the log does not have yet: kept in the device's store, and put again before the answer is sent.

A device may be away for longer than a blob store keeps what no event names. What was put into it then counts for nothing: when
the answer goes out, its tensors are put first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
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
"""Of one blob: more does not go into the store. A larger one is put once, when it is made."""
PIECE_BYTES: Final = 1 << 20
"""Of one row of the store: a blob goes in and comes out in pieces, and is never in memory beside the tensors it is made of."""
_PREFIX: Final = "upload/"


class Recorder:
    """What puts an answer's tensors into the blob store, and remembers what they are until the answer is signed.

    It remembers the chunks as they are given, without a copy: until then nobody changes what they are views of.
    """

    def __init__(self, blobs: BlobStore) -> None:
        self._blobs = blobs
        self.put_chunks: dict[str, list[bytes | memoryview]] = {}
        """By the hash of what they are together."""

    def put(self, chunks: Iterable[bytes | memoryview]) -> BlobRef:
        held: list[bytes | memoryview] = []
        ref = self._blobs.put(_remembered(chunks, held))
        if ref.size_bytes <= MAX_KEPT_BYTES:
            self.put_chunks[ref.sha256] = held
        return ref


class Uploads:
    """The kept tensors of the device in `store`."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def keep(self, content: Content, made: Recorder) -> None:
        """Keep what the answer names of what was made for it, within the caller's transaction."""
        for ref in named_blobs(content):
            pieces = _pieces(made.put_chunks.get(ref.sha256, []))
            for number, piece in enumerate(pieces):
                self._store.keep(f"{_PREFIX}{ref.sha256}/{number:06}", piece)

    def put(self, due: Sequence[Event], blobs: Callable[[], BlobStore]) -> None:
        """Put what the events name, before they are appended. Raises what the blob store raises."""
        answers = [envelope.decode(each) for each in due if each.type == types.UpdateSubmitted.type_name]
        for name in sorted({ref.sha256 for payload in answers for ref in named_blobs(payload)}):
            rows = self._store.rows(
                "SELECT name, length(value) FROM kept WHERE name GLOB ? ORDER BY name", (f"{_PREFIX}{name}*",)
            )
            if rows:
                # A gateway takes none for an answer that the log has already: then only its acknowledgement was lost.
                with suppress(UsageError):
                    if not blobs().refresh(BlobRef(name, sum(size for _, size in rows))):
                        blobs().put(self._store.kept(row) or b"" for row, _ in rows)

    def forget(self) -> None:
        """Let go of what is kept, unless an event is due that may name it."""
        if self._store.rows("SELECT 1 FROM kept WHERE name GLOB ?", (f"{_PREFIX}*",)):
            with self._store.transaction() as db:
                db.execute(
                    "DELETE FROM kept WHERE name GLOB ? AND NOT EXISTS (SELECT 1 FROM outbox WHERE event IS NOT NULL)",
                    (f"{_PREFIX}*",),
                )


def _remembered(chunks: Iterable[bytes | memoryview], held: list[bytes | memoryview]) -> Iterator[bytes | memoryview]:
    """The chunks, each of them also in `held`."""
    for chunk in chunks:
        held.append(chunk)
        yield chunk


def _pieces(chunks: Iterable[bytes | memoryview]) -> Iterator[bytes]:
    """The bytes of the chunks in pieces of `PIECE_BYTES`, the last one smaller."""
    piece = bytearray()
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        while len(view):
            taken = view[: PIECE_BYTES - len(piece)]
            piece += taken
            view = view[len(taken) :]
            if len(piece) == PIECE_BYTES:
                yield bytes(piece)
                piece.clear()
    if piece:
        yield bytes(piece)
