"""Content-addressed blobs: a blob's name is the SHA-256 of its bytes.

In a local folder a blob appears whole or not at all: it is written under a temporary name, synced, and renamed. Any other place
is reached through fsspec; a torn upload there has another hash and is refused by every reader.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Final, Protocol, runtime_checkable

from fedloop_events.errors import BlobError, FedloopError, UnreachableError, UsageError
from fedloop_events.files import fsync_folder, new_file, reason
from fedloop_events.signatures import SigningKey
from fedloop_events.types import BlobRef

_NAME: Final = re.compile("[0-9a-f]{64}")
_TEMPORARY: Final = ".tmp-"
ORPHAN_AFTER_S: Final = 24 * 3600.0


class _Place(Protocol):
    """Where blobs lie: the two things that differ between a folder and an fsspec file system."""

    def write(self, chunks: Iterable[bytes | memoryview]) -> BlobRef: ...

    def open(self, name: str) -> IO[bytes]: ...

    def size(self, name: str) -> int | None: ...

    def names(self) -> Iterator[str]: ...


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
        """Store the concatenation of `chunks`, durably, and name it; a blob that is there already is not written again."""
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
    if _NAME.fullmatch(ref.sha256) is None:
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
        return _Folder(Path(url.removeprefix("file://")))
    if url.startswith(("https://", "http://")):
        from fedloop_events.blobs.http import GatewayPlace

        return GatewayPlace(url)
    if "://" in url:
        return _FileSystem(url)
    return _Folder(Path(url))


class _Folder:
    """A local folder, sharded by the first two digits. Symbolic links below it are never followed."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._sweep()

    def write(self, chunks: Iterable[bytes | memoryview]) -> BlobRef:
        try:
            self.root.mkdir(parents=True, exist_ok=True)  # not before: where a disk is not mounted a reader makes no folder
            with new_file(self.root, _TEMPORARY) as new:
                ref = _copy(chunks, new.file)
                if self.size(ref.sha256) != ref.size_bytes:
                    new.publish(self._shard(ref.sha256) / ref.sha256[2:])
        except OSError as error:
            raise UnreachableError(
                f"a blob cannot be written to {self.root}",
                cause=reason(error, self.root),
                hint="check the disk's space and the permissions",
            ) from error
        return ref

    def open(self, name: str) -> IO[bytes]:
        shard = os.open(self.root / name[:2], os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            file = os.open(name[2:], os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=shard)
        finally:
            os.close(shard)
        if not stat.S_ISREG(os.fstat(file).st_mode):
            os.close(file)
            raise BlobError(f"blob {name} is no regular file")
        return os.fdopen(file, "rb", buffering=0)

    def size(self, name: str) -> int | None:
        try:
            with self.open(name) as file:
                return os.fstat(file.fileno()).st_size
        except (OSError, BlobError):
            return None

    def names(self) -> Iterator[str]:
        for shard in self.root.iterdir() if self.root.is_dir() else ():
            if len(shard.name) == 2 and shard.is_dir():
                for path in shard.iterdir():
                    if _NAME.fullmatch(shard.name + path.name):
                        yield shard.name + path.name

    def _shard(self, name: str) -> Path:
        """The folder of a blob, which is made if it is absent."""
        shard = self.root / name[:2]
        if not shard.is_dir():
            shard.mkdir(exist_ok=True)
            fsync_folder(self.root)
        return shard

    def _sweep(self) -> None:
        """Remove what crashed writers left behind."""
        for path in self.root.glob(f"{_TEMPORARY}*"):
            with suppress(OSError):
                if path.lstat().st_mtime < time.time() - ORPHAN_AFTER_S:
                    path.unlink()


class _FileSystem:
    """Any fsspec file system."""

    def __init__(self, url: str) -> None:
        from fsspec.core import url_to_fs

        try:
            self._fs, root = url_to_fs(url)
        except (ValueError, ImportError) as error:
            raise UsageError(f"the blob store {url} cannot be opened", cause=str(error)) from error
        self._root = str(root).rstrip("/")

    def write(self, chunks: Iterable[bytes | memoryview]) -> BlobRef:
        with tempfile.TemporaryFile() as file:
            ref = _copy(chunks, file)
            if self.size(ref.sha256) == ref.size_bytes:
                return ref
            file.seek(0)
            with _translated("a blob cannot be written to the store"):
                self._fs.makedirs(f"{self._root}/{ref.sha256[:2]}", exist_ok=True)
                with self._fs.open(self._path(ref.sha256), "wb") as target:
                    while block := file.read(1 << 22):
                        target.write(block)
        return ref

    def open(self, name: str) -> IO[bytes]:
        with _translated(f"blob {name} cannot be read"):
            file: IO[bytes] = self._fs.open(self._path(name), "rb")
        return file

    def size(self, name: str) -> int | None:
        with suppress(FileNotFoundError), _translated(f"blob {name} cannot be looked up"):
            return int(self._fs.info(self._path(name))["size"])
        return None

    def names(self) -> Iterator[str]:
        with _translated("the blob store cannot be listed"):
            paths = self._fs.find(self._root)
        for path in paths:
            name = "".join(str(path).rsplit("/", 2)[-2:])
            if _NAME.fullmatch(name):
                yield name

    def _path(self, name: str) -> str:
        return f"{self._root}/{name[:2]}/{name[2:]}"


@contextmanager
def _translated(what: str) -> Iterator[None]:
    """Each store raises its own errors: botocore's, for one, are no `OSError`."""
    try:
        yield
    except (FedloopError, FileNotFoundError):
        raise
    except Exception as error:
        raise UnreachableError(
            what, cause=f"{type(error).__name__}: {error}", hint="check the store's address and the credentials for it"
        ) from error


def _copy(chunks: Iterable[bytes | memoryview], file: IO[bytes]) -> BlobRef:
    digest, size = hashlib.sha256(), 0
    for chunk in chunks:
        view = memoryview(chunk).cast("B")
        digest.update(view)
        size += len(view)
        while view:
            view = view[file.write(view) :]
    file.flush()
    return BlobRef(sha256=digest.hexdigest(), size_bytes=size)
