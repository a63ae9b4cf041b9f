"""Merging against float64 and against Flower's own mean, bit by bit."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_events.blobs.tensors import TensorSpec
from fedloop_events.errors import BlobError, TensorError
from fedloop_events.types import AcceptedUpdate, BlobRef, Mechanism, RoundOpened
from fedloop_server.aggregation import merging
from fedloop_server.aggregation.merging import MergeError, merge, total, weighted_mean
from fedloop_tasks.table import UnknownProgramError, program_of
from flwr.app import Array, ArrayRecord, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def update(seed: int, shapes: dict[str, tuple[int, ...]], dtype: str = "float32") -> Arrays:
    random = np.random.default_rng(seed)
    return {name: random.normal(size=shape).astype(dtype) for name, shape in shapes.items()}


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    weights=st.lists(st.integers(1, 2**40) | st.floats(1e-6, 1e6), min_size=1, max_size=5),
    shapes=st.dictionaries(st.sampled_from("abcd"), st.lists(st.integers(0, 7), max_size=3).map(tuple), min_size=1),
    dtype=st.sampled_from(["float16", "float32", "float64"]),
)
def test_the_mean_is_that_of_float64(blobs: BlobStore, weights: list[float], shapes: dict[str, Any], dtype: str) -> None:
    updates = [update(seed, shapes, dtype) for seed in range(len(weights))]
    refs = [blobs.put(tensors.encode(each)) for each in updates]
    merged = weighted_mean(blobs, list(zip(refs, weights, strict=True)), tensors.specs(updates[0]))
    assert list(merged) == list(shapes)
    for name, values in merged.items():
        exact = sum(w * each[name].astype(np.float64) for w, each in zip(weights, updates, strict=True)) / sum(weights)
        assert values.dtype == (np.float64 if dtype == "float64" else np.float32)
        assert values.shape == updates[0][name].shape
        np.testing.assert_allclose(values, exact, rtol=1e-5, atol=1e-5)


def test_a_mean_of_many_blocks_has_the_bytes_of_flowers_fedavg(blobs: BlobStore) -> None:
    shapes = {"a": (300, 701), "b": (5,), "c": (), "d": (65_537,)}
    updates, weights = [update(seed, shapes) for seed in range(7)], [3, 1, 4, 1, 5, 9, 2]
    records = [
        RecordDict(
            {
                "arrays": ArrayRecord({name: Array(np.asarray(values)) for name, values in each.items()}),
                "metrics": MetricRecord({"num-examples": weight}),
            }
        )
        for each, weight in zip(updates, weights, strict=True)
    ]
    theirs = aggregate_arrayrecords(records, "num-examples")
    refs = [blobs.put(tensors.encode(each)) for each in updates]
    ours = weighted_mean(blobs, list(zip(refs, weights, strict=True)), tensors.specs(updates[0]))
    assert {name: values.tobytes() for name, values in ours.items()} == {
        name: array.numpy().tobytes() for name, array in theirs.items()
    }


def test_float16_is_accumulated_wider(blobs: BlobStore) -> None:
    ref = blobs.put(tensors.encode({"a": np.ones(3, np.float16)}))
    merged = weighted_mean(blobs, [(ref, 1.0)] * 1000, [TensorSpec("a", "F16", (3,))])
    np.testing.assert_allclose(merged["a"], 1.0, rtol=1e-5)


def test_a_header_that_is_not_padded_cuts_no_element(blobs: BlobStore, monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.arange(1000, dtype=np.float32)
    header = b'{"a":{"dtype":"F32","shape":[1000],"data_offsets":[0,4000]}}'
    header += b" " * ((8 + len(header)) % 4 == 0)
    ref = blobs.put([len(header).to_bytes(8, "little"), header, values.tobytes()])
    monkeypatch.setattr(merging, "BLOCK_BYTES", 256)
    merged = weighted_mean(blobs, [(ref, 1.0), (ref, 3.0)], [TensorSpec("a", "F32", (1000,))])
    np.testing.assert_array_equal(merged["a"], values)


def test_what_cannot_be_merged_is_a_typed_error(blobs: BlobStore, tmp_path: Path) -> None:
    specs = [TensorSpec("a", "F32", (4,))]
    ref = blobs.put(tensors.encode({"a": np.ones(4, np.float32)}))
    for weights in ([], [0.0], [-1.0, 2.0], [float("nan")], [float("inf")]):
        with pytest.raises(MergeError):
            weighted_mean(blobs, [(ref, weight) for weight in weights], specs)
    with pytest.raises(MergeError):
        total(blobs, [], specs)
    other = blobs.put(tensors.encode({"b": np.ones(4, np.float32)}))
    with pytest.raises(TensorError):
        weighted_mean(blobs, [(ref, 1.0), (other, 1.0)], specs)
    with pytest.raises(TensorError):
        weighted_mean(blobs, [(ref, 1.0)], [TensorSpec("a", "I32", (4,))])
    path = tmp_path / ref.sha256[:2] / ref.sha256[2:]
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(BlobError):
        weighted_mean(blobs, [(ref, 1.0)], specs)


def test_memory_does_not_grow_with_the_number_of_updates(blobs: BlobStore) -> None:
    size = 1 << 20
    refs = [blobs.put(tensors.encode({"a": np.full(size, i, np.float32)})) for i in range(8)]
    tracemalloc.start()
    try:
        weighted_mean(blobs, [(ref, 1.0) for ref in refs], [TensorSpec("a", "F32", (size,))])
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < size * 4 + (2 << 20), "one model and some blocks"


BASE: Arrays = {
    "lora.5.query.A": np.full((2, 3), 5, np.float32),
    "lora.5.query.B": np.full((3, 2), 6, np.float32),
    "head.weight": np.full((4, 3), 7, np.float32),
    "head.bias": np.full(4, 8, np.float32),
}
FFA = ["lora.5.query.B", "head.weight", "head.bias"]


def opened(program: str, upload: list[str], **hyperparameters: float) -> RoundOpened:
    return msgspec.convert(
        {
            "origin": "tests", "epoch": 1, "run_id": "main", "round_id": "r0001", "request_id": "q", "number": 1,
            "model": "default", "base_release": "0000-x", "base": {"sha256": "0" * 64, "size_bytes": 1},
            "strategy": program, "cohort": [], "quorum": 1, "deadline_s": 1, "upload": upload, "max_upload_bytes": 10**6,
            "max_update_norm": 1e6, "hyperparameters": hyperparameters,
            "mechanism": Mechanism(1.0, 1.0, 1.0, 1, 1.0),
        },
        RoundOpened,
    )  # fmt: skip


def accepted(blobs: BlobStore, arrays: Arrays, weight: float = 1.0) -> AcceptedUpdate:
    return AcceptedUpdate("c", "0" * 32, "0" * 32, blobs.put(tensors.encode(arrays)), weight)


@pytest.mark.parametrize("upload", [FFA, list(BASE)])
def test_what_is_uploaded_replaces_the_base_and_the_rest_stays(blobs: BlobStore, upload: list[str]) -> None:
    updates = [{name: np.full_like(BASE[name], value) for name in upload} for value in (1, 2)]
    merged = merge(blobs, opened("ffa", upload), BASE, [accepted(blobs, each) for each in updates])
    assert list(merged) == list(BASE), "a release keeps its order"
    for name, values in merged.items():
        np.testing.assert_array_equal(values, np.full_like(BASE[name], 1.5) if name in upload else BASE[name])
    assert [spec.name for spec in program_of("ffa").specs(opened("ffa", upload), BASE)] == upload


def test_class_sums_become_the_head(blobs: BlobStore) -> None:
    sums = [{"sums": np.array([[3, 0, 0], [0, 4, 0], [0, 0, 0], [1, 1, 1]], np.float32)}] * 2
    merged = merge(blobs, opened("sums", ["sums"], head_scale=5.0), BASE, [accepted(blobs, each) for each in sums])
    third = 5 / np.sqrt(3)
    np.testing.assert_allclose(merged["head.weight"], [[5, 0, 0], [0, 5, 0], [0, 0, 0], [third] * 3], rtol=1e-6)
    assert not merged["head.bias"].any()
    assert merged["lora.5.query.A"] is BASE["lora.5.query.A"]


def test_an_update_without_tensors_or_a_base_without_the_upload_is_an_error(blobs: BlobStore) -> None:
    with pytest.raises(MergeError):
        merge(blobs, opened("ffa", FFA), BASE, [AcceptedUpdate("c", "0" * 32, "0" * 32, None)])
    with pytest.raises(TensorError):
        merge(blobs, opened("ffa", ["absent"]), BASE, [])
    with pytest.raises(UnknownProgramError):
        merge(blobs, opened("no-such", FFA), BASE, [])


_SCRIPT = """
import sys
from fedloop_events.blobs.store import BlobStore
from fedloop_events.blobs.tensors import TensorSpec
from fedloop_events.types import BlobRef
from fedloop_server.aggregation.merging import weighted_mean
store, size, *refs = sys.argv[1:]
updates = [(BlobRef(ref, int(size)), 1.0 + number) for number, ref in enumerate(refs)]
merged = weighted_mean(BlobStore(store), updates, [TensorSpec("a", "F32", (500_000,))])
sys.stdout.buffer.write(merged["a"].tobytes())
"""


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_threads_or_vector_width(blobs: BlobStore) -> None:
    refs: list[BlobRef] = [blobs.put(tensors.encode(update(seed, {"a": (500_000,)}))) for seed in range(3)]
    arguments = [sys.executable, "-c", _SCRIPT, blobs.url, str(refs[0].size_bytes), *(ref.sha256 for ref in refs)]
    environments = [
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "2"},
        {"OMP_NUM_THREADS": "1", "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3"},
    ]
    outputs = {subprocess.run(arguments, env=os.environ | each, capture_output=True, check=True).stdout for each in environments}
    assert len(outputs) == 1
    assert len(outputs.pop()) == 2_000_000
