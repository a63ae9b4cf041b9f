"""The blobs of a deployment, as a gateway lets one client read and add to them."""

from __future__ import annotations

import hashlib
import io
import tempfile
from collections.abc import Iterable, Iterator
from typing import IO, Final

import httpx

from fedloop_events.blobs.naming import Stored
from fedloop_events.errors import BlobError, UnreachableError, UsageError
from fedloop_events.logs.http.transport import Transport
from fedloop_events.signatures import SigningKey
from fedloop_events.types import BlobRef

_BLOCK_BYTES: Final = 1 << 18
_IN_MEMORY_BYTES: Final = 8 << 20


class GatewayPlace:
    """Where blobs lie for a `BlobStore`: names are asked for by hash, and what is sent is named by its hash first."""

    def __init__(self, url: str, *, timeout_s: float = 60.0) -> None:
        self._transport = Transport(url, timeout_s=timeout_s)

    def identify(self, client_id: str, key: SigningKey) -> None:
        self._transport.identify(client_id, key)

    def write(self, chunks: Iterable[bytes | memoryview]) -> BlobRef:
        """Send what this client has not sent before."""
        with tempfile.SpooledTemporaryFile(max_size=_IN_MEMORY_BYTES) as file:
            digest, size = hashlib.sha256(), 0
            for chunk in chunks:
                view = memoryview(chunk).cast("B")
                digest.update(view)
                for start in range(0, len(view), _BLOCK_BYTES):  # what is written at once stands in memory before it is too much
                    size += file.write(view[start : start + _BLOCK_BYTES])
            ref = BlobRef(digest.hexdigest(), size)
            if self.size(ref.sha256) != size:

                def content() -> Iterator[bytes]:
                    file.seek(0)
                    while block := file.read(_BLOCK_BYTES):
                        yield block

                headers = {"content-length": str(size), "content-type": "application/octet-stream"}
                self._transport.call(
                    "PUT",
                    f"/v1/blobs/{ref.sha256}",
                    content=content,
                    sha256=digest.digest(),
                    headers=headers,
                    doing=("blobs", "write to"),
                )
        return ref

    def open(self, name: str) -> IO[bytes]:
        return io.BufferedReader(_Answer(self._transport, name), _BLOCK_BYTES)

    def size(self, name: str) -> int | None:
        try:
            answer = self._transport.call("HEAD", f"/v1/blobs/{name}", doing=("blobs", "read"))
            return int(answer.headers["content-length"])
        except BlobError:
            return None
        except (KeyError, ValueError):
            raise UnreachableError(f"{self._transport.base} answers, but not as a gateway does") from None

    def refresh(self, ref: BlobRef) -> bool:
        return self.size(ref.sha256) == ref.size_bytes  # the gateway makes it young when it takes the event that names it

    def names(self) -> Iterator[str]:
        raise _not_here()

    def stored(self) -> Iterator[Stored]:
        raise _not_here()

    def remove(self, name: str, before_s: float) -> int:
        raise _not_here()


def _not_here() -> UsageError:
    return UsageError("a gateway lists no blobs, and removes none", hint="do this where the blob store is")


class _Answer(io.RawIOBase):
    """A blob's bytes as they come."""

    def __init__(self, transport: Transport, name: str) -> None:
        self._opened = transport.opened("GET", f"/v1/blobs/{name}", stream=True, doing=("blobs", "read"))
        self._blocks, self._left = self._opened.__enter__().blocks, b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        try:
            block = self._left or next(self._blocks, b"")
        except httpx.TransportError as error:
            raise UnreachableError("the gateway broke off within a blob", cause=type(error).__name__) from None
        count = min(len(buffer), len(block))
        buffer[:count], self._left = block[:count], block[count:]
        return count

    def close(self) -> None:
        if not self.closed:
            super().close()
            self._opened.__exit__(None, None, None)
