"""Content-addressed blobs: a blob's name is the SHA-256 of its bytes.

In a local folder a blob appears whole or not at all: it is written under a temporary name, synced, and renamed. Any other place
is reached through fsspec; a torn upload there has another hash and is refused by every reader.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Protocol, runtime_checkable

from fedloop_events.blobs.filesystem import FileSystem
from fedloop_events.blobs.folder import Folder
from fedloop_events.blobs.naming import BLOB_NAME, Stored
from fedloop_events.errors import BlobError, FedloopError, UnreachableError, UsageError
from fedloop_events.signatures import SigningKey
from fedloop_events.types import BlobRef


class _Place(Protocol):
    """Where blobs lie: what differs between a folder, an fsspec file system and a gateway."""

    def write(self, chunks: Iterable[bytes | memoryview]) -> BlobRef: ...

    def open(self, name: str) -> IO[bytes]: ...

    def size(self, name: str) -> int | None: ...

    def names(self) -> Iterator[str]: ...

    def stored(self) -> Iterator[Stored]: ...

    def refresh(self, ref: BlobRef) -> bool: ...

    def remove(self, name: str, before_s: float) -> int: ...


@runtime_checkable
class Identifiable(Protocol):
    """What must name on whose behalf it asks: a gateway's log and its blobs."""

    def identify(self, client_id: str, key: SigningKey) -> None:
        """From here on, ask as `client_id`, and sign with `key`."""


class BlobStore:
    """Blobs under `url`: a folder, which is made if it is absent, a gateway, or an fsspec URL from the configuration.

    Raises `UsageError` for chained (`::`) and `reference:` URLs, which would let a stored file choose what is read.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = str(url)
        self._place = _place(self.url)

    def put(self, chunks: Iterable[bytes | memoryview]) -> BlobRef:
        """Store the concatenation of `chunks`, durably, and name it; a blob that is there already is as young as a new one."""
        return self._place.write(chunks)

    def get(self, ref: BlobRef, *, max_bytes: int | None = None) -> bytes:
        """The bytes of `ref`, read once and checked. Raises `BlobError` if absent, larger than allowed, or not those bytes."""
        _check_size(ref, max_bytes)
        with self._opened(ref) as file:
            data = file.read(ref.size_bytes + 1)
        _check(ref, len(data), hashlib.sha256(data).hexdigest())
        return data

    def blocks(self, ref: BlobRef, *, block_bytes: int = 1 << 18, max_bytes: int | None = None) -> Iterator[memoryview]:
        """The bytes of `ref` in blocks, in flat memory; each block is valid until the next one.

        Raises `BlobError` as `get` does, but for wrong bytes only after the last block: do not use any before this ends.
        """
        _check_size(ref, max_bytes)
        digest, size = hashlib.sha256(), 0
        buffer = memoryview(bytearray(max(1, min(block_bytes, ref.size_bytes + 1))))
        with self._opened(ref) as file:
            while count := file.readinto(buffer):  # type: ignore[attr-defined]
                size += count
                if size > ref.size_bytes:
                    break
                digest.update(buffer[:count])
                yield buffer[:count]
        _check(ref, size, digest.hexdigest())

    def exists(self, ref: BlobRef) -> bool:
        return self._place.size(_name(ref)) == ref.size_bytes

    def size_bytes(self, sha256: str) -> int | None:
        """How many bytes lie under a name, unread and unchecked; None if there is no such blob."""
        return self._place.size(_name(BlobRef(sha256, 0)))

    def all(self) -> Iterator[str]:
        """The SHA-256 of every blob, in no order. Raises `UsageError` for a gateway, which lists none."""
        return self._place.names()

    def stored(self) -> Iterator[Stored]:
        """Every blob, unread, in no order. Raises `UsageError` for a gateway, which lists none."""
        return self._place.stored()

    def refresh(self, ref: BlobRef) -> bool:
        """Whether the blob is there, unread; if so, it is as young as one that has just been put."""
        _name(ref)
        return self._place.refresh(ref)

    def remove(self, sha256: str, before_s: float) -> int:
        """Remove a blob unless it was written, or put again, since `before_s` (seconds since 1970); the bytes that this frees.

        In a folder no writer is overtaken: who found the blob there has made it young before, and who comes later writes it.
        In another place the look and the removal are two requests, one right after the other.
        """
        return self._place.remove(_name(BlobRef(sha256, 0)), before_s)

    def identify(self, client_id: str, key: SigningKey) -> None:
        """Sign what is asked of a gateway as `client_id`; any other store has rights of its own and needs no name."""
        if isinstance(self._place, Identifiable):
            self._place.identify(client_id, key)

    @contextmanager
    def _opened(self, ref: BlobRef) -> Iterator[IO[bytes]]:
        try:
            with self._place.open(_name(ref)) as file:
                yield file
        except FileNotFoundError:
            raise BlobError(
                f"blob {ref.sha256} is not in the store",
                hint="try again, for it may still be on its way; if not, restore it from a copy",
            ) from None
        except FedloopError:
            raise
        except Exception as error:  # while it is read, any store's own
            raise UnreachableError(f"blob {ref.sha256} cannot be read", cause=str(error)) from error


def _name(ref: BlobRef) -> str:
    if BLOB_NAME.fullmatch(ref.sha256) is None:
        raise BlobError("a blob's name is not 64 lower-case hexadecimal digits")
    return ref.sha256


def _check_size(ref: BlobRef, max_bytes: int | None) -> None:
    if max_bytes is not None and ref.size_bytes > max_bytes:
        raise BlobError(f"blob {_name(ref)} has {ref.size_bytes:,} bytes; at most {max_bytes:,} are allowed")


def _check(ref: BlobRef, size_bytes: int, sha256: str) -> None:
    if size_bytes != ref.size_bytes:
        raise BlobError(f"blob {ref.sha256} does not have the {ref.size_bytes:,} bytes that it should have")
    if sha256 != ref.sha256:
        raise BlobError(f"blob {ref.sha256} holds other bytes than its name promises")


def _place(url: str) -> _Place:
    if "::" in url or url.startswith("reference:"):
        raise UsageError("a blob store's URL must name one place, without chaining (`::`) or `reference:`")
    if url.startswith("file://"):
        return Folder(Path(url.removeprefix("file://")))
    if url.startswith(("https://", "http://")):
        from fedloop_events.blobs.http import GatewayPlace

        return GatewayPlace(url)
    if "://" in url:
        return FileSystem(url)
    return Folder(Path(url))
