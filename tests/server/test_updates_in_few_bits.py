"""Updates in 16 and 8 bits: admitted, merged and rebuilt as what they stand for, in flat memory."""

from __future__ import annotations

import os
import subprocess
import sys
import tracemalloc
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import OPEN_CONFIG, initial_arrays
from fedloop_events import types
from fedloop_events.blobs import tensors
from fedloop_events.blobs.reader import TensorReader
from fedloop_events.blobs.store import BlobStore
from fedloop_events.errors import BlobError, TensorError, UsageError
from fedloop_events.types import AcceptedUpdate, Content, RoundOpened
from fedloop_server.aggregation import merging
from fedloop_server.aggregation.merging import merge
from fedloop_server.flower.admission import Admission, ExpectedReply
from fedloop_server.rounds.planner import Planner
from fedloop_server.rounds.rebuild import rebuild
from fedloop_tasks import updates
from fedloop_tasks.classification.plan import ClassificationPlan
from fedloop_tasks.table import program_of
from msgspec.structs import replace
from numpy.typing import NDArray
from server.test_admission import SENT, UPDATE
from server.test_buffered import BUFFERED, STALE, Script, accepted, refused, run, world_of

Arrays = Mapping[str, NDArray[Any]]
BASE: dict[str, NDArray[Any]] = {
    name: np.asarray(np.random.default_rng(1).normal(size=each.shape), np.float32) for name, each in initial_arrays(40).items()
}


def opened(program: str, bits: int, number: int = 1) -> RoundOpened:
    return RoundOpened(
        origin="o", epoch=1, run_id="main", round_id=f"r{number:04d}", request_id="q", number=number, model="m",
        base_release="0000-x", base=types.BlobRef("0" * 64, 1), strategy=program, cohort=[], quorum=1, deadline_s=1.0,
        upload=program_of(program).upload(list(BASE)), max_upload_bytes=10**6, max_update_norm=3.0,
        hyperparameters={"update_bits": bits} if bits < 32 else {},
    )  # fmt: skip


def trained(terms: RoundOpened, seed: int) -> dict[str, NDArray[Any]]:
    random = np.random.default_rng(seed)
    return {name: BASE[name] + (random.normal(size=BASE[name].shape) * 0.1).astype(np.float32) for name in terms.upload}


def submitted(blobs: BlobStore, arrays: Arrays, weight: float = 1.0) -> AcceptedUpdate:
    return AcceptedUpdate("c", "0" * 32, "0" * 32, blobs.put(tensors.encode(arrays)), weight)


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "blobs")


@pytest.mark.parametrize("block_bytes", [merging.BLOCK_BYTES, 601])
@pytest.mark.parametrize("bits", [16, 8])
@pytest.mark.parametrize("program", ["ffa", "fedavg", "svd", "fedavgm", "fedadam"])
def test_a_release_is_the_one_of_the_updates_that_are_stood_for(
    blobs: BlobStore, monkeypatch: pytest.MonkeyPatch, program: str, bits: int, block_bytes: int
) -> None:
    few, whole = opened(program, bits), opened(program, 32)
    sent = [updates.encode(few, BASE, trained(few, seed)) for seed in range(3)]
    meant = [updates.decode(few, BASE, each) for each in sent]
    assert not np.array_equal(meant[0]["head.weight"], trained(few, 0)["head.weight"])
    monkeypatch.setattr(merging, "BLOCK_BYTES", block_bytes)
    found = merge(blobs, few, BASE, [submitted(blobs, each, 1.0 + n) for n, each in enumerate(sent)])
    monkeypatch.undo()
    wanted = merge(blobs, whole, BASE, [submitted(blobs, each, 1.0 + n) for n, each in enumerate(meant)])
    assert list(found) == list(wanted)
    for name in ("head.weight", "head.bias"):
        np.testing.assert_allclose(found[name], wanted[name], rtol=0, atol=2e-4 if program == "fedadam" else 1e-6)
    products = [np.asarray(each["lora.0.query.B"] @ each["lora.0.query.A"]) for each in (found, wanted)]
    np.testing.assert_allclose(products[0], products[1], rtol=0, atol=1e-3 if program == "fedadam" else 1e-5)


def refusal(blobs: BlobStore, terms: RoundOpened, arrays: Arrays, *, refuse_unchanged: bool = False) -> str | None:
    specs = updates.sent(tensors.specs({name: BASE[name] for name in terms.upload}), terms)
    content = Content(arrays={"arrays": blobs.put(tensors.encode(arrays))}, metrics={"metrics": {"num-examples": 1}})
    update = replace(UPDATE, content=content, mechanism=None, spend_seq=None)
    found = Admission(refuse_unchanged=refuse_unchanged).check(
        update, SENT, ExpectedReply(specs, terms, BASE), TensorReader(blobs)
    )
    return found and found.reason


@pytest.mark.parametrize("bits", [16, 8])
def test_an_update_is_admitted_if_what_it_stands_for_is_within_the_norm(blobs: BlobStore, bits: int) -> None:
    terms = opened("fedavg", bits)
    good = dict(updates.encode(terms, BASE, trained(terms, 0)))
    scales = good[updates.SCALES]
    norm = np.sqrt(sum(float((each.astype(np.float64) ** 2).sum()) for each in updates.changes(good)))
    assert refusal(blobs, terms, good) is None
    assert refusal(blobs, replace(terms, max_update_norm=norm * 1.001), good) is None
    assert refusal(blobs, replace(terms, max_update_norm=norm * 0.999), good) == "norm"
    for wrong, reason in ((np.nan, "not-finite"), (np.inf, "not-finite"), (1e30, "norm")):
        assert refusal(blobs, terms, good | {updates.SCALES: np.full_like(scales, wrong)}) == reason
    assert refusal(blobs, terms, trained(terms, 0)) == "wrong-tensors"
    assert refusal(blobs, terms, good | {updates.SCALES: scales[:-1]}) == "wrong-tensors"
    assert refusal(blobs, terms, {name: good[name] for name in reversed(good)}) == "wrong-tensors"
    other = updates.encode(opened("fedavg", 24 - bits), BASE, trained(terms, 0))
    assert refusal(blobs, terms, other) == "wrong-tensors"
    still = updates.encode(terms, BASE, {name: BASE[name] for name in terms.upload})
    assert [refusal(blobs, terms, each, refuse_unchanged=True) for each in (good, still)] == [None, "unchanged"]


def test_float16_that_is_not_finite_is_refused(blobs: BlobStore) -> None:
    terms = opened("ffa", 16)
    good = dict(updates.encode(terms, BASE, trained(terms, 0)))
    assert refusal(blobs, terms, good | {"head.bias": np.full_like(good["head.bias"], np.inf)}) == "not-finite"


def test_a_torn_or_other_update_is_not_merged(blobs: BlobStore, tmp_path: Path) -> None:
    terms = opened("ffa", 8)
    update = submitted(blobs, updates.encode(terms, BASE, trained(terms, 0)))
    with pytest.raises(TensorError):
        merge(blobs, replace(terms, hyperparameters={"update_bits": 16}), BASE, [update])
    assert update.blob is not None
    path = tmp_path / "blobs" / update.blob.sha256[:2] / update.blob.sha256[2:]
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    with pytest.raises(BlobError):
        merge(blobs, terms, BASE, [update])


CONFIG = replace(OPEN_CONFIG, plan=ClassificationPlan(epsilon=None, update_bits=8))


def test_a_round_of_8_bits_makes_a_release_that_anyone_can_make_again(tmp_path: Path) -> None:
    world = world_of(tmp_path, replace(CONFIG, cohort_size=3), rounds=1)
    run(world.server(on_wait=Script(world, {1: [("ann", 1), ("bob", 1), ("cem", 1)]})))
    [terms] = world.payloads(RoundOpened)
    assert terms.hyperparameters["update_bits"] == 8
    assert refused(world) == []
    assert [each.status for each in world.releases.releases.values()] == ["published"] * 2
    base, made = (tensors.decode(world.blobs.get(each.blob)) for each in world.releases.releases.values())
    meant = [device.trained(terms) for device in world.devices.values()]
    for name, values in made.items():
        mean = np.mean([each[name].astype(np.float64) for each in meant], axis=0)
        largest = max(float(np.abs(each[other] - base[other]).max()) for each in meant for other in base)
        np.testing.assert_allclose(values, mean, rtol=0, atol=largest / 254 * 1.001)
    assert rebuild(world.log, world.blobs, deep=True).identical


def test_a_stale_update_counts_in_the_bits_of_its_own_round(tmp_path: Path) -> None:
    """The first round asks for 32 bits, the second one for 8, and an answer to the first comes in the second."""
    world = world_of(tmp_path, BUFFERED)
    script, few = Script(world, STALE), replace(BUFFERED, plan=CONFIG.plan)
    server = world.server(on_wait=script)
    while len(world.releases.releases) < 2:
        server.step(wait_s=0.0)
    run(world.server(on_wait=script, config=few))
    first, second = world.payloads(RoundOpened)
    assert [each.hyperparameters.get("update_bits") for each in (first, second)] == [None, 8]
    assert (accepted(world, 2), refused(world)) == (["ann", "cem"], [])
    _, base, made = (tensors.decode(world.blobs.get(each.blob)) for each in world.releases.releases.values())
    before = tensors.decode(world.blobs.get(first.base))
    fresh, stale = world.devices["ann"].trained(second), world.devices["cem"].trained(first)
    for name, values in made.items():
        expected = base[name] + 0.5 * (fresh[name] - base[name]) + 0.5 * np.sqrt(0.5) * (stale[name] - before[name])
        np.testing.assert_allclose(values, expected, rtol=0, atol=0.02)
    assert rebuild(world.log, world.blobs, deep=True).identical


def test_what_an_update_may_have_counts_as_it_is_sent() -> None:
    arrays: dict[str, NDArray[Any]] = {
        "lora.0.query.A": np.zeros((8, 1000), np.float32),
        "lora.0.query.B": np.zeros((1000, 8), np.float32),
    }
    arrays |= {"head.weight": np.zeros((2, 1000), np.float32), "head.bias": np.zeros(2, np.float32)}
    Planner(replace(CONFIG, max_upload_bytes=30_000)).check(arrays)
    with pytest.raises(UsageError, match="max_upload_bytes"):
        Planner(replace(OPEN_CONFIG, max_upload_bytes=30_000)).check(arrays)


def test_memory_does_not_grow_with_the_number_of_updates(blobs: BlobStore) -> None:
    size = 1 << 20
    terms = replace(opened("ffa", 8), upload=["x.B"])
    base = {"x.B": np.zeros(size, np.float32)}
    made = [submitted(blobs, updates.encode(terms, base, {"x.B": np.full(size, n, np.float32)})) for n in range(8)]
    tracemalloc.start()
    try:
        merged = merge(blobs, terms, base, made)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    np.testing.assert_allclose(merged["x.B"], 3.5, rtol=1e-5)
    assert peak < size * (4 + 4) + (6 << 20), "the sum, the base in its type, some blocks and their scales"


_SCRIPT = """
import sys
import numpy as np
from pathlib import Path
from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_server.aggregation.merging import merge
from server.test_updates_in_few_bits import BASE, opened, submitted, trained
from fedloop_tasks import updates
blobs = BlobStore(Path(sys.argv[1]))
for bits in (16, 8):
    terms = opened("fedavg", bits)
    sent = [submitted(blobs, updates.encode(terms, BASE, trained(terms, seed)), 1.0 + seed) for seed in range(3)]
    for values in merge(blobs, terms, BASE, sent).values():
        sys.stdout.buffer.write(values.tobytes())
"""


@pytest.mark.slow
def test_the_bytes_do_not_depend_on_threads_or_vector_width(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(__file__).parent.parent), os.environ.get("PYTHONPATH", "")])
    environments = [
        {"OMP_NUM_THREADS": "1"},
        {"OMP_NUM_THREADS": "2"},
        {"OMP_NUM_THREADS": "1", "NPY_DISABLE_CPU_FEATURES": "AVX2 FMA3"},
    ]
    outputs = {
        subprocess.run(
            [sys.executable, "-c", _SCRIPT, str(tmp_path)],
            env=os.environ | {"PYTHONPATH": path} | each,
            capture_output=True,
            check=True,
        ).stdout
        for each in environments
    }
    assert len(outputs) == 1
    assert outputs.pop()
