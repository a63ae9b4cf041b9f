"""Rounds whose merge loses nothing: what becomes fixed, against the dense sum."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import OPEN_CONFIG, SPEC, World
from fedloop_events import types
from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_events.errors import UsageError
from fedloop_events.types import AcceptedUpdate, RoundOpened
from fedloop_server.aggregation.merging import buffers, merge, weighted_mean
from fedloop_server.rounds.planner import Planner
from fedloop_server.rounds.rebuild import rebuild
from fedloop_tasks.classification.plan import ClassificationPlan
from fedloop_tasks.programs import factors
from fedloop_tasks.table import program_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
RANK, WIDE, HIGH = 3, 11, 7
PAIRS = ("lora.4.query", "lora.5.value")


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


@pytest.fixture(params=["stack", "residual"])
def strategy(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def drawn(seed: int, rank: int = RANK, size: float = 1.0) -> Arrays:
    random, made = np.random.default_rng(seed), {}
    for name in PAIRS:
        made[name + ".A"] = (random.normal(size=(rank, WIDE)) * size).astype(np.float32)
        made[name + ".B"] = (random.normal(size=(HIGH, rank)) * size).astype(np.float32)
    return made | {"head.weight": random.normal(size=(4, HIGH)).astype(np.float32)}


BASE = drawn(99)


def opened(strategy: str, number: int = 1) -> RoundOpened:
    return RoundOpened(
        origin="tests", epoch=1, run_id="main", round_id="r0001", request_id="q", number=number, model="default",
        base_release="0000-x", base=types.BlobRef("0" * 64, 1), strategy=strategy, cohort=[], quorum=1, deadline_s=1.0,
        upload=list(BASE), max_upload_bytes=10**6, max_update_norm=1e6,
    )  # fmt: skip


def merged_of(
    blobs: BlobStore,
    strategy: str,
    base: Mapping[str, NDArray[Any]],
    updates: list[Arrays],
    weights: list[float],
    number: int = 1,
) -> Arrays:
    accepted = [
        AcceptedUpdate("c", "0" * 32, "0" * 32, blobs.put(tensors.encode(each)), weight)
        for each, weight in zip(updates, weights, strict=True)
    ]
    return merge(blobs, opened(strategy, number), base, accepted)


def acting(arrays: Mapping[str, NDArray[Any]], name: str) -> NDArray[np.float64]:
    """What an adapter adds to its matrix, with all that is fixed."""
    a, b = factors.whole(arrays, name)
    made: NDArray[np.float64] = b.astype(np.float64) @ a.astype(np.float64)
    return made


def mean_of(base: Arrays, updates: list[Arrays], weights: list[float], name: str) -> tuple[NDArray[np.float64], float]:
    """The dense mean of what the devices trained over what is fixed, and the scale of its rounding."""
    whole, scale = sum(weights), 0.0
    total = np.zeros((HIGH, WIDE))
    for each, weight in zip(updates, weights, strict=True):
        trained = base | tensors.completed(each, base)
        total += weight / whole * acting(trained, name)
        scale += weight / whole * float(np.linalg.norm(trained[name + ".B"]) * np.linalg.norm(trained[name + ".A"]))
    return total, scale


@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rounds=st.lists(
        st.lists(
            st.tuples(st.integers(1, RANK), st.floats(1e-3, 1e3), st.sampled_from([1e-3, 1.0, 30.0])), min_size=1, max_size=5
        ),
        min_size=1,
        max_size=3,
    )
)
def test_a_release_acts_exactly_as_the_mean_of_what_the_devices_trained(
    blobs: BlobStore, strategy: str, rounds: list[list[tuple[int, float, float]]]
) -> None:
    """Round upon round, at ranks that are mixed where the program takes them, below the rank of the matrix and above."""
    base = BASE
    for number, each in enumerate(rounds, 1):
        ranks = [rank if strategy == "stack" else RANK for rank, _, _ in each]
        updates = [drawn(100 * number + n, rank, size) for n, (rank, (_, _, size)) in enumerate(zip(ranks, each, strict=True))]
        weights = [weight for _, weight, _ in each]
        made = merged_of(blobs, strategy, base, updates, weights, number)
        for name in PAIRS:
            wanted, scale = mean_of(base, updates, weights, name)
            scale += float(np.linalg.norm(wanted))
            assert np.linalg.norm(acting(made, name) - wanted) <= 1e-6 * scale
            assert len(made.get(f"{name}.fixed.A", [])) <= min(WIDE, HIGH)
        assert list(made)[: len(BASE)] == list(BASE)
        assert all(factors.is_fixed(name) for name in list(made)[len(BASE) :])
        assert all(values.dtype == np.float32 for values in made.values())
        base = made


def test_a_stack_begins_anew_with_factors_that_follow_from_the_rounds_number(blobs: BlobStore) -> None:
    updates = [drawn(seed) for seed in range(2)]
    first, again, other = (merged_of(blobs, "stack", BASE, updates, [1.0, 2.0], number) for number in (1, 1, 2))
    for name in PAIRS:
        assert not first[name + ".B"].any()
        assert np.abs(first[name + ".A"]).max() <= 1 / np.sqrt(WIDE)
        assert first[name + ".A"].tobytes() == again[name + ".A"].tobytes() != other[name + ".A"].tobytes()
        assert len(first[f"{name}.fixed.A"]) == 2 * RANK
    assert first[PAIRS[0] + ".A"].tobytes() != first[PAIRS[1] + ".A"].tobytes()


def test_a_residual_has_the_bytes_of_the_mean_and_nothing_fixed_where_all_agree(blobs: BlobStore) -> None:
    updates = [drawn(seed) for seed in range(3)]
    made = merged_of(blobs, "residual", BASE, updates, [1.0, 2.0, 3.0])
    refs = [(blobs.put(tensors.encode(each)), 1.0 + n) for n, each in enumerate(updates)]
    mean = weighted_mean(blobs, refs, tensors.specs(BASE))
    assert all(made[name].tobytes() == mean[name].tobytes() for name in BASE)
    assert list(merged_of(blobs, "residual", BASE, [updates[0]], [1.0])) == list(BASE)


def test_rounds_of_other_programs_and_updates_without_change_keep_what_is_fixed(blobs: BlobStore, strategy: str) -> None:
    base = merged_of(blobs, strategy, BASE, [drawn(seed) for seed in range(2)], [1.0, 2.0])
    assert program_of("fedadam").upload(list(base)) == [name for name in BASE if not name.endswith(".A")]
    for other in ("fedavg", "svd"):
        upload = program_of(other).upload(list(base))
        assert upload == list(BASE)
        made = merged_of(blobs, other, base, [drawn(5)], [1.0])
        assert list(made) == list(base)
        assert all(made[name].tobytes() == base[name].tobytes() for name in base if factors.is_fixed(name))
    unchanged = merged_of(blobs, strategy, base, [{name: base[name] for name in BASE}] * 2, [1.0, 1.0])
    for name in PAIRS:
        np.testing.assert_allclose(acting(unchanged, name), acting(base, name), rtol=0, atol=1e-5)


def test_neither_is_buffered_and_a_stack_alone_takes_smaller_ranks(strategy: str) -> None:
    program = program_of(strategy)
    assert not buffers(program)
    assert bool(program.smaller(opened(strategy), BASE)) == (strategy == "stack")


_MADE = """
import hashlib, sys
sys.path[:0] = {path!r}
from pathlib import Path
from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
import server.test_exact_merges as here
here.WIDE, here.HIGH, here.RANK = 384, 256, 40
for strategy in ("stack", "residual"):
    base, store = here.drawn(9, 40), BlobStore(Path({folder!r}))
    for number in (1, 2, 3):
        base = here.merged_of(store, strategy, base, [here.drawn(n, 40) for n in range(4)], [1.0, 2.0, 3.0, 4.0], number)
    print(hashlib.sha256(b"".join(map(bytes, tensors.encode(base)))).hexdigest())
"""


def test_the_bytes_are_the_same_on_one_thread_and_on_two(tmp_path: Path) -> None:
    """The fixed factors exceed the matrix's rank, so that large products are made."""
    script = _MADE.format(path=[str(Path(__file__).parents[1])], folder=str(tmp_path))
    found = set()
    for threads in ("1", "2"):
        limits = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), threads)
        run = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | limits, capture_output=True, text=True, check=True, timeout=120
        )
        found.add(run.stdout)
    assert len(found) == 1
    assert len(next(iter(found)).split()) == 2


# --- in rounds -----------------------------------------------------------------------------------------------------------


def run(world: World, rounds: int) -> None:
    with world.serving():
        world.server().run(rounds=rounds)


def test_anyone_can_make_the_releases_again_and_devices_fetch_what_is_fixed(tmp_path: Path, strategy: str) -> None:
    world = World(tmp_path / "deployment", replace(OPEN_CONFIG, plan=ClassificationPlan(epsilon=None, strategy=strategy)), SPEC)  # type: ignore[arg-type]
    for name in ("ann", "bob"):
        world.device(name, epsilon=None)
    world.request(3)
    run(world, 3)
    assert [each.identical for each in rebuild(world.log, world.blobs, deep=True).steps] == [True] * 3
    *_, last = world.releases.releases.values()
    names = list(tensors.decode(world.blobs.get(last.blob)))
    assert names[-2:] == ["lora.0.query.fixed.A", "lora.0.query.fixed.B"]
    assert all(not factors.is_fixed(name) for each in world.payloads(types.RoundOpened) for name in each.upload)


def test_a_server_that_takes_over_before_the_merge_makes_the_same_release(tmp_path: Path, strategy: str) -> None:
    hashes = set()
    for name, servers in (("one", 1), ("other", 3)):
        world = World(tmp_path / name, replace(OPEN_CONFIG, plan=ClassificationPlan(epsilon=None, strategy=strategy)), SPEC)  # type: ignore[arg-type]
        for device in ("ann", "bob"):
            world.device(device, epsilon=None)
        world.request(3)
        for _ in range(servers):
            run(world, 3 // servers)
        hashes.add(tuple(each.blob.sha256 for each in world.releases.releases.values()))
    assert len(hashes) == 1


def test_a_private_round_costs_what_another_programs_does(tmp_path: Path, strategy: str) -> None:
    private = ClassificationPlan(planned_rounds=3, sampling_rate=1.0, steps=1, nominal_examples=100, strategy=strategy)  # type: ignore[arg-type]
    world = World(tmp_path / "deployment", replace(OPEN_CONFIG, plan=private), SPEC)
    for name in ("ann", "bob"):
        world.device(name)
    world.request(3)
    run(world, 3)
    opened = [each for each in world.payloads(types.RoundOpened) if each.strategy == strategy]
    assert len(opened) == 2
    assert all(each.mechanism is not None for each in opened)
    assert [each.identical for each in rebuild(world.log, world.blobs, deep=True).steps] == [True] * 3


def test_a_model_whose_releases_no_file_could_hold_is_refused_before_its_first_round(strategy: str) -> None:
    many = {f"lora.{layer}.self_attn.q_proj.{factor}": np.zeros((2, 2), np.float32) for layer in range(330) for factor in "AB"}
    planner = Planner(replace(OPEN_CONFIG, plan=ClassificationPlan(epsilon=None, strategy=strategy)))  # type: ignore[arg-type]
    planner.check(dict(list(many.items())[:200]))
    Planner(replace(OPEN_CONFIG, plan=ClassificationPlan(epsilon=None, strategy="svd"))).check(dict(list(many.items())[:600]))
    with pytest.raises(UsageError, match=f"no file can hold a release of rounds of {strategy}, which has up to 1200 tensors"):
        planner.check(dict(list(many.items())[:600]))
