"""An update of a large adapter leaves the device in pieces: beside its tensors there is never a copy in memory."""

from __future__ import annotations

import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from fedloop_clients.store import Store
from fedloop_clients.uploads import PIECE_BYTES, Recorder, Uploads
from fedloop_events import envelope, types
from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_events.envelope import Event
from gateway import rounds
from gateway.harness import serving

SIZE = 32 << 20
MOST = 14 << 20
"""What may be held beside the tensors: a block, a piece, and what a gateway's client keeps before it takes a file."""


@contextmanager
def place(kind: str, folder: Path) -> Iterator[BlobStore]:
    if kind == "gateway":
        with serving(folder, "device-1") as served:
            rounds.ask(served.log, "device-1")
            yield served.blobs_of("device-1")
    else:
        yield BlobStore(folder / "blobs" if kind == "folder" else f"local://{folder}/blobs")


def answer(ref: types.BlobRef) -> tuple[types.Content, Event]:
    content = types.Content(arrays={"arrays": ref})
    payload = types.UpdateSubmitted("o", "device-1", 0, "main", "0" * 32, content)
    return content, envelope.encode(payload, id="1" * 32, time_s=0)


def update(size_bytes: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng(0)
    return {name: random.standard_normal(size_bytes // 8, dtype=np.float32) for name in "ab"}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store.create(tmp_path / "store.db", bytes(32))
    yield made
    made.close()


@pytest.mark.parametrize("kind", ["folder", "elsewhere", "gateway"])
def test_an_update_is_put_kept_and_put_again_without_a_copy_in_memory(store: Store, tmp_path: Path, kind: str) -> None:
    """Behind a gateway, which runs in this process, its memory counts too."""
    trained, uploads = update(SIZE), Uploads(store)
    with place(kind, tmp_path) as blobs:
        tracemalloc.start()
        try:
            made = Recorder(blobs)
            content, event = answer(made.put(tensors.encode(trained)))
            with store.transaction():
                uploads.keep(content, made)
            uploads.put([event], lambda: blobs)
            ref = content.arrays["arrays"]
            if kind == "folder":
                assert blobs.remove(ref.sha256, float("inf")) == ref.size_bytes
                uploads.put([event], lambda: blobs)
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert blobs.exists(ref)
        assert peak < MOST, f"{peak / 1e6:.0f} MB beside the {SIZE / 1e6:.0f} MB of the tensors"
        assert all((tensors.decode(blobs.get(ref))[name] == values).all() for name, values in trained.items())


@pytest.mark.parametrize("size", [0, 8, PIECE_BYTES - 200, PIECE_BYTES, 3 * PIECE_BYTES + 8])
def test_what_is_kept_in_pieces_is_the_blob(store: Store, tmp_path: Path, size: int) -> None:
    blobs, uploads, trained = BlobStore(tmp_path / "blobs"), Uploads(store), update(size)
    made = Recorder(blobs)
    content, event = answer(made.put(tensors.encode(trained)))
    uploads.keep(content, made)
    before = blobs.get(content.arrays["arrays"])
    blobs.remove(content.arrays["arrays"].sha256, float("inf"))
    uploads.put([event], lambda: blobs)
    assert blobs.get(content.arrays["arrays"]) == before
    uploads.forget()
    assert store.rows("SELECT name FROM kept WHERE name GLOB 'upload/*'") == []


def test_what_an_earlier_version_has_kept_whole_is_put(store: Store, tmp_path: Path) -> None:
    blobs = BlobStore(tmp_path / "blobs")
    ref = blobs.put([b"tensors"])
    blobs.remove(ref.sha256, float("inf"))
    store.keep(f"upload/{ref.sha256}", b"tensors")
    Uploads(store).put([answer(ref)[1]], lambda: blobs)
    assert blobs.get(ref) == b"tensors"
