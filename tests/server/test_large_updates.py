"""Updates of a large adapter at the server: admitted one at a time and merged in blocks, however many there are."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedloop_events.blobs import tensors
from fedloop_events.blobs.reader import TensorReader
from fedloop_events.blobs.store import BlobStore
from fedloop_events.types import AcceptedUpdate, BlobRef, Content, RoundOpened
from fedloop_server.aggregation import releases
from fedloop_server.aggregation.merging import merge
from fedloop_server.flower.admission import Admission, ExpectedReply
from fedloop_tasks import updates
from fedloop_tasks.table import program_of
from msgspec.structs import replace
from server.test_admission import OPENED, SENT, UPDATE

SIZE = 16 << 20
UPDATES = 7
KEPT = 64 << 20
"""What a reader keeps of the updates that it has read, so that no strategy hashes them again."""
SLACK = 8 << 20


def arrays(seed: int) -> dict[str, np.ndarray[Any, Any]]:
    random = np.random.default_rng(seed)
    return {name: random.standard_normal((1024, SIZE // 8192), dtype=np.float32) for name in ("x.A", "x.B")}


def peak_of(work: Callable[[], object]) -> int:
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("bits", [32, 8])
def test_memory_holds_a_base_and_a_release_and_no_update_more(tmp_path: Path, bits: int) -> None:
    blobs, base = BlobStore(tmp_path), arrays(99)
    few = {"update_bits": float(bits)} if bits < 32 else {}
    terms = replace(
        OPENED, base=blobs.put(tensors.encode(base)), strategy="fedavg", upload=list(base), max_upload_bytes=2 * SIZE,
        max_update_norm=1e6, mechanism=None, hyperparameters=few,
    )  # fmt: skip
    refs = [blobs.put(tensors.encode(updates.encode(terms, base, arrays(seed)))) for seed in range(UPDATES)]
    del base
    assert peak_of(lambda: admit(blobs, terms, refs)) < SIZE + KEPT + max(SIZE, refs[0].size_bytes) + SLACK
    accepted = [AcceptedUpdate("c", "0" * 32, "0" * 32, ref) for ref in refs]

    def release() -> None:
        releases.put(blobs, merge(blobs, terms, releases.get(blobs, terms.base), accepted))

    most = (
        2 * SIZE + (SIZE // 2 + SIZE // 8 if bits < 32 else 0) + SLACK
    )  # in few bits: a tensor's base again, an update's scales
    assert peak_of(release) < most


def admit(blobs: BlobStore, terms: RoundOpened, refs: list[BlobRef]) -> None:
    reader = TensorReader(blobs)
    base = reader.tensors(terms.base)
    expected = ExpectedReply(updates.sent(program_of("fedavg").specs(terms, base), terms), terms, base)
    for ref in refs:
        content = Content(arrays={"arrays": ref}, metrics={"metrics": {"num-examples": 1}})
        assert Admission().check(replace(UPDATE, content=content, mechanism=None, spend_seq=None), SENT, expected, reader) is None
