"""Blobs in any place that fsspec reaches. A torn upload has another hash, and is refused by every reader."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import IO, Final

from fedloop_events.blobs.naming import BLOB_NAME, Stored, copy
from fedloop_events.errors import FedloopError, UnreachableError, UsageError
from fedloop_events.types import BlobRef

REFRESH_AFTER_S: Final = 3_600.0
"""A blob that is put again is written again if it is older: no sweep removes one that is younger."""


class FileSystem:
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
            ref = copy(chunks, file)
            if self.size(ref.sha256) == ref.size_bytes and self._is_young(ref):
                return ref
            file.seek(0)
            with translated("a blob cannot be written to the store"):
                self._fs.makedirs(f"{self._root}/{ref.sha256[:2]}", exist_ok=True)
                with self._fs.open(self._path(ref.sha256), "wb") as target:
                    while block := file.read(1 << 22):
                        target.write(block)
        return ref

    def refresh(self, ref: BlobRef) -> bool:
        if self.size(ref.sha256) != ref.size_bytes:
            return False
        if self._is_young(ref):
            return True
        try:
            with self.open(ref.sha256) as file:
                return self.write(iter(partial(file.read, 1 << 22), b"")) == ref
        except FileNotFoundError:
            return False

    def remove(self, name: str, before_s: float) -> int:
        with suppress(FileNotFoundError), translated(f"blob {name} cannot be removed"):
            size = int(self._fs.info(self._path(name))["size"])
            if self._written_s(name) < before_s:
                self._fs.rm_file(self._path(name))
                return size
        return 0

    def stored(self) -> Iterator[Stored]:
        for name in self.names():
            with suppress(FileNotFoundError), translated(f"blob {name} cannot be looked up"):
                yield Stored(name, int(self._fs.info(self._path(name))["size"]), self._written_s(name))

    def _is_young(self, ref: BlobRef) -> bool:
        """Whether it need not be written again, which is all that makes one younger here."""
        with suppress(FileNotFoundError), translated(f"blob {ref.sha256} cannot be looked up"):
            return self._written_s(ref.sha256) > time.time() - REFRESH_AFTER_S
        return False

    def _written_s(self, name: str) -> float:
        return float(self._fs.modified(self._path(name)).timestamp())

    def open(self, name: str) -> IO[bytes]:
        with translated(f"blob {name} cannot be read"):
            file: IO[bytes] = self._fs.open(self._path(name), "rb")
        return file

    def size(self, name: str) -> int | None:
        with suppress(FileNotFoundError), translated(f"blob {name} cannot be looked up"):
            return int(self._fs.info(self._path(name))["size"])
        return None

    def names(self) -> Iterator[str]:
        with translated("the blob store cannot be listed"):
            self._fs.invalidate_cache()
            paths = self._fs.find(self._root)
            self._fs.invalidate_cache()  # others write there as well
        for path in paths:
            name = "".join(str(path).rsplit("/", 2)[-2:])
            if BLOB_NAME.fullmatch(name):
                yield name

    def _path(self, name: str) -> str:
        return f"{self._root}/{name[:2]}/{name[2:]}"


@contextmanager
def translated(what: str) -> Iterator[None]:
    """Each store raises its own errors: botocore's, for one, are no `OSError`."""
    try:
        yield
    except (FedloopError, FileNotFoundError):
        raise
    except Exception as error:
        raise UnreachableError(
            what, cause=f"{type(error).__name__}: {error}", hint="check the store's address and the credentials for it"
        ) from error
