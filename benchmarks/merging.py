"""Merges: the mean of updates from the blob store, against reading and hashing the same bytes; low-rank products, against SVD."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_events.blobs.tensors import TensorSpec
from fedloop_events.types import BlobRef
from fedloop_server.aggregation.merging import weighted_mean
from fedloop_tasks.linalg.lowrank import Products

from benchmarks.harness import Row, costs, peak_rss_bytes, per_second, rates, scratch, timed_in_turn

EXTRA_BYTES = 64 << 20
"""How much a merge may hold beside one model."""
THREADS = (1, 2, 4)


def rows(quick: bool) -> list[Row]:
    sizes = [(4, 1_000_000)] if quick else [(100, 1_000_000), (10, 50_000_000)]
    means = [row for count, elements in sizes for row in _merge(count, elements, runs=1 if quick else 5)]
    size, ranks = (256, [(8, None)]) if quick else (4096, [(8, 500.0), (64, 30.0)])
    return means + [_low_rank(size, rank, at_least, runs=1 if quick else 3) for rank, at_least in ranks]


def _low_rank(size: int, rank: int, at_least: float | None, *, runs: int, clients: int = 10) -> Row:
    """The best factors of a mean of products, against the dense mean in float32 and numpy's singular value decomposition."""
    random = np.random.default_rng(0)
    pairs = [
        (random.standard_normal((size, rank), dtype=np.float32), random.standard_normal((rank, size), dtype=np.float32))
        for _ in range(clients)
    ]

    def ours() -> None:
        products = Products(size, size)
        for left, right in pairs:
            products.add(left.astype(np.float64) / clients, right.astype(np.float64))
        products.best(rank)

    def peer() -> None:
        u, s, v = np.linalg.svd(sum((left @ right for left, right in pairs), np.zeros((size, size), np.float32)) / clients)
        u[:, :rank] * s[:rank], v[:rank]

    what = f"rank-{rank} merge of {clients} updates of {size} x {size}"
    return costs(what, "their dense mean, and its SVD", timed_in_turn(ours, peer, runs=runs), "s", at_least)


def _merge(count: int, elements: int, *, runs: int) -> list[Row]:
    what = f"mean of {count} updates of {elements // 1_000_000} M float32"
    with scratch() as folder:
        blobs, specs = BlobStore(folder), [TensorSpec("a", "F32", (elements,))]
        updates = [(_update(blobs, seed, elements), 1.0 + seed) for seed in range(count)]
        total_bytes = sum(ref.size_bytes for ref, _ in updates)

        def ours() -> None:
            weighted_mean(blobs, updates, specs)

        def peer() -> None:
            for ref, _ in updates:
                _read_and_hash(folder / ref.sha256[:2] / ref.sha256[2:], ref)

        times = timed_in_turn(ours, peer, runs=runs)
        reports = [_in_a_process(folder, updates, elements, threads) for threads in THREADS]
    most = elements * 4 + EXTRA_BYTES
    peaks = [(int(report["peak_bytes"]) / 1e6, most / 1e6) for report in reports]
    same = [(float(report["sha256"] == reports[0]["sha256"]), 1.0) for report in reports]
    return [
        rates(what, "reading and SHA-256 of the same bytes, 1 thread", per_second(total_bytes / 1e9, times), "GB/s", 0.7),
        costs(f"{what}: peak memory", "one model and 64 MB", peaks, "MB", 1.0),
        rates(f"{what}: with 1, 2 and 4 threads", "the same bytes", same, "", 1.0),
    ]


def _update(blobs: BlobStore, seed: int, elements: int) -> BlobRef:
    random = np.random.default_rng(seed)
    return blobs.put(tensors.encode({"a": random.standard_normal(elements, dtype=np.float32)}))


def _read_and_hash(path: Path, ref: BlobRef) -> None:
    digest, buffer = hashlib.sha256(), memoryview(bytearray(1 << 20))
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(buffer):
            digest.update(buffer[:count])
    assert digest.hexdigest() == ref.sha256


def _in_a_process(folder: Path, updates: list[tuple[BlobRef, float]], elements: int, threads: int) -> dict[str, str]:
    """The hash of the mean, and what a process that merges holds beyond one that has only imported the same modules."""
    arguments = json.dumps([str(folder), elements, [[ref.sha256, ref.size_bytes, weight] for ref, weight in updates]])
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.merging"],
        input=arguments,
        env=os.environ | {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")},
        capture_output=True,
        text=True,
        check=True,
    )
    report: dict[str, str] = json.loads(done.stdout)
    return report


def _main() -> None:
    folder, elements, updates = json.load(sys.stdin)
    before = peak_rss_bytes()
    refs = [(BlobRef(sha256, size_bytes), weight) for sha256, size_bytes, weight in updates]
    merged = weighted_mean(BlobStore(folder), refs, [TensorSpec("a", "F32", (elements,))])
    peak_bytes = peak_rss_bytes() - before
    print(json.dumps({"sha256": hashlib.sha256(merged["a"].data).hexdigest(), "peak_bytes": peak_bytes}))


if __name__ == "__main__":
    _main()
