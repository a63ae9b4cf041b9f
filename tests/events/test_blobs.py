"""Blobs, in a folder and in an fsspec file system: whole or absent, and nothing but what their name promises."""

from __future__ import annotations

import hashlib
import os
import secrets
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from fedloop_events.blobs.folder import ORPHAN_AFTER_S
from fedloop_events.blobs.store import BlobStore
from fedloop_events.errors import BlobError, UnreachableError, UsageError
from fedloop_events.types import BlobRef

DATA = bytes(range(256)) * 100


@pytest.fixture(params=["folder", "file", "memory"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> BlobStore:
    urls = {"folder": str(tmp_path / "blobs"), "file": f"file://{tmp_path}/blobs", "memory": f"memory://{secrets.token_hex(8)}/b"}
    return BlobStore(urls[request.param])


def path_of(folder: Path, ref: BlobRef) -> Path:
    return folder / ref.sha256[:2] / ref.sha256[2:]


def test_a_blob_is_named_by_its_hash_and_comes_back(store: BlobStore) -> None:
    ref = store.put([DATA[:7], memoryview(DATA)[7:5000], b"", DATA[5000:]])
    assert ref == BlobRef(sha256=hashlib.sha256(DATA).hexdigest(), size_bytes=len(DATA))
    assert store.get(ref) == DATA
    assert b"".join(map(bytes, store.blocks(ref, block_bytes=999))) == DATA
    assert store.exists(ref)
    assert list(store.all()) == [ref.sha256]


def test_an_empty_blob_is_a_blob(store: BlobStore) -> None:
    ref = store.put([])
    assert store.get(ref) == b""
    assert list(store.blocks(ref)) == []


def test_putting_the_same_bytes_again_changes_nothing(store: BlobStore) -> None:
    assert store.put([DATA]) == store.put([DATA[:1], DATA[1:]])
    assert len(list(store.all())) == 1


def test_an_absent_blob_is_an_error(store: BlobStore) -> None:
    ref = BlobRef(sha256="0" * 64, size_bytes=1)
    assert not store.exists(ref)
    assert list(store.all()) == []
    for read in (lambda: store.get(ref), lambda: list(store.blocks(ref))):
        with pytest.raises(BlobError, match="not in the store"):
            read()


def test_a_blob_of_another_size_than_named_or_allowed_is_refused(store: BlobStore) -> None:
    ref = store.put([DATA])
    for size in (len(DATA) - 1, len(DATA) + 1):
        wrong = BlobRef(sha256=ref.sha256, size_bytes=size)
        assert not store.exists(wrong)
        for read in (store.get, lambda ref: list(store.blocks(ref, block_bytes=100))):
            with pytest.raises(BlobError, match="does not have"):
                read(wrong)
    with pytest.raises(BlobError, match="at most"):
        store.get(ref, max_bytes=len(DATA) - 1)
    with pytest.raises(BlobError, match="at most"):
        next(store.blocks(ref, max_bytes=len(DATA) - 1))


@pytest.mark.parametrize("name", ["0" * 64 + "\n", "../" + "0" * 61, "A" * 64, "", "0" * 63, "/" * 64])
def test_a_name_that_is_no_hash_is_refused(store: BlobStore, name: str) -> None:
    for read in (store.get, store.exists, lambda ref: list(store.blocks(ref))):
        with pytest.raises(BlobError, match="64 lower-case"):
            read(BlobRef(sha256=name, size_bytes=1))


def test_a_changed_byte_is_found(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    ref = store.put([DATA])
    content = bytearray(DATA)
    content[100] ^= 1
    path_of(tmp_path, ref).write_bytes(content)
    for read in (store.get, lambda ref: list(store.blocks(ref))):
        with pytest.raises(BlobError, match="other bytes"):
            read(ref)


def test_a_changed_byte_in_a_remote_store_is_found() -> None:
    store = BlobStore(f"memory://{secrets.token_hex(8)}")
    ref = store.put([DATA])
    with store._place._fs.open(store._place._path(ref.sha256), "wb") as file:  # type: ignore[attr-defined]
        file.write(DATA[:-1] + b"x")
    with pytest.raises(BlobError, match="other bytes"):
        store.get(ref)


def test_symbolic_links_and_other_things_are_never_followed(tmp_path: Path) -> None:
    store = BlobStore(tmp_path / "blobs")
    ref = store.put([DATA])
    path = path_of(tmp_path / "blobs", ref)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    for _ in range(2):
        assert not store.exists(ref)
        with pytest.raises((BlobError, UnreachableError)):
            store.get(ref)
        path.unlink()
        os.mkfifo(path)
    path.unlink()
    shard = path.parent
    shard.rename(tmp_path / "shard")
    (tmp_path / "elsewhere").rename(tmp_path / "shard" / path.name)
    shard.symlink_to(tmp_path / "shard")
    assert not store.exists(ref)
    with pytest.raises((BlobError, UnreachableError)):
        store.get(ref)


def test_a_put_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def chunks() -> Iterator[bytes]:
        yield DATA
        raise KeyError("the source broke")

    store = BlobStore(tmp_path)
    with pytest.raises(KeyError):
        store.put(chunks())
    assert list(tmp_path.iterdir()) == []


def test_a_half_written_blob_has_no_name_yet(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    found: list[str] = []

    def chunks() -> Iterator[bytes]:
        yield DATA
        found.extend(store.all())

    store.put(chunks())
    assert found == []


def test_what_a_crashed_writer_left_is_swept_when_it_is_old(tmp_path: Path) -> None:
    for name, age_s in (("old", ORPHAN_AFTER_S + 60), ("young", 60)):
        path = tmp_path / f".tmp-{name}"
        path.write_bytes(b"half")
        now = path.stat().st_mtime
        os.utime(path, (now - age_s, now - age_s))
    BlobStore(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == [".tmp-young"]


def test_many_threads_put_the_same_and_other_blobs(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    threads = [threading.Thread(target=lambda n=n: store.put([b"x" * 100_000, bytes([n % 3])])) for n in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(store.all())) == 3
    assert not list(tmp_path.glob(".tmp-*"))


@pytest.mark.parametrize("url", ["zip://x::memory://y", "reference://x", "reference:x", "nonsense://x", "filecache::s3://x"])
def test_urls_that_let_a_file_choose_what_is_read_are_refused(url: str) -> None:
    with pytest.raises(UsageError):
        BlobStore(url)


def test_a_folder_that_cannot_be_made_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UnreachableError):
        BlobStore(tmp_path / "file" / "blobs").put([b"x"])


def test_a_folder_is_made_by_the_first_blob_and_by_no_reader(tmp_path: Path) -> None:
    """Where a disk is not mounted, a reader would leave a folder in which nothing can be made any more."""
    store = BlobStore(tmp_path / "not mounted" / "blobs")
    assert not store.exists(BlobRef("0" * 64, 1))
    assert list(store.all()) == []
    with pytest.raises(BlobError):
        store.get(BlobRef("0" * 64, 1))
    assert not (tmp_path / "not mounted").exists()
    assert store.get(store.put([b"x"])) == b"x"


def test_whatever_a_remote_store_raises_is_an_error_that_says_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    from fsspec.implementations.memory import MemoryFileSystem

    class NoCredentialsError(Exception):
        """As botocore's: no `OSError`."""

    def fail(*args: object, **kwargs: object) -> object:
        raise NoCredentialsError("unable to locate credentials")

    store = BlobStore(f"memory://{secrets.token_hex(8)}")
    ref = store.put([b"x"])
    for name in ("info", "open", "find"):
        monkeypatch.setattr(MemoryFileSystem, name, fail)
    for attempt in (lambda: store.put([b"y"]), lambda: store.get(ref), lambda: store.exists(ref), lambda: list(store.all())):
        with pytest.raises(UnreachableError) as caught:
            attempt()
        assert caught.value.cause == "NoCredentialsError: unable to locate credentials"
