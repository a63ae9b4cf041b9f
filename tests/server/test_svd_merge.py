"""Rounds whose release is the best approximation of the mean of what devices trained."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import OPEN_CONFIG, World
from fedloop_events import types
from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_events.errors import TensorError
from fedloop_events.types import AcceptedUpdate, RoundOpened
from fedloop_server.aggregation.merging import MergeError, buffers, merge, weighted_mean
from fedloop_server.config import ServerConfig
from fedloop_server.rounds.rebuild import rebuild
from fedloop_tasks.classification.plan import ClassificationPlan
from fedloop_tasks.programs.svd import ROW_NORM
from fedloop_tasks.table import program_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from msgspec.structs import replace
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
RANK, WIDE, HIGH = 3, 7, 5
PAIRS = ("lora.4.query", "lora.5.value")
CONFIG = replace(OPEN_CONFIG, plan=ClassificationPlan(epsilon=None, strategy="svd"))


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def arrays(seed: int, rank: int = RANK) -> Arrays:
    """An update; of a smaller rank, what is left is zero."""
    random, made = np.random.default_rng(seed), {}
    for name in PAIRS:
        made[name + ".A"] = random.normal(size=(RANK, WIDE)).astype(np.float32)
        made[name + ".B"] = random.normal(size=(HIGH, RANK)).astype(np.float32)
        made[name + ".A"][rank:], made[name + ".B"][:, rank:] = 0, 0
    return made | {"head.weight": random.normal(size=(4, HIGH)).astype(np.float32), "head.bias": np.ones(4, np.float32)}


BASE = arrays(99)


def opened(upload: list[str]) -> RoundOpened:
    return RoundOpened(
        origin="tests", epoch=1, run_id="main", round_id="r0001", request_id="q", number=1, model="default",
        base_release="0000-x", base=types.BlobRef("0" * 64, 1), strategy="svd", cohort=[], quorum=1, deadline_s=1.0,
        upload=upload, max_upload_bytes=10**6, max_update_norm=1e6,
    )  # fmt: skip


def accepted(blobs: BlobStore, update: Arrays, weight: float) -> AcceptedUpdate:
    return AcceptedUpdate("c", "0" * 32, "0" * 32, blobs.put(tensors.encode(update)), weight)


def products(update: Mapping[str, NDArray[Any]], name: str) -> NDArray[np.float64]:
    made: NDArray[np.float64] = update[name + ".B"].astype(np.float64) @ update[name + ".A"].astype(np.float64)
    return made


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.integers(0, RANK), st.floats(1e-3, 1e3)), min_size=1, max_size=6))
def test_the_release_is_the_best_approximation_of_the_weighted_mean(blobs: BlobStore, given: list[tuple[int, float]]) -> None:
    updates = [arrays(seed, rank) for seed, (rank, _) in enumerate(given)]
    weights = np.array([weight for _, weight in given])
    merged = merge(
        blobs, opened(list(BASE)), BASE, [accepted(blobs, each, weight) for each, (_, weight) in zip(updates, given, strict=True)]
    )
    assert tensors.specs(merged) == tensors.specs(BASE)
    for name in PAIRS:
        dense = sum(w * products(each, name) for w, each in zip(weights / weights.sum(), updates, strict=True))
        s = np.linalg.svd(dense, compute_uv=False)
        best = float(np.sqrt((s[RANK:] ** 2).sum()))
        assert np.linalg.norm(dense - products(merged, name)) <= best + 1e-5
        used = merged[name + ".B"].any(axis=0)
        np.testing.assert_allclose(np.linalg.norm(merged[name + ".A"][used], axis=1), ROW_NORM, rtol=1e-6)
        np.testing.assert_array_equal(merged[name + ".A"][~used], BASE[name + ".A"][~used])


def test_what_is_no_adapter_has_the_bytes_of_the_mean(blobs: BlobStore) -> None:
    updates = [accepted(blobs, arrays(seed), 1.0 + seed) for seed in range(3)]
    merged = merge(blobs, opened(list(BASE)), BASE, updates)
    mean = weighted_mean(blobs, [(each.blob, each.weight) for each in updates if each.blob], tensors.specs(BASE))
    for name in ("head.weight", "head.bias"):
        assert merged[name].tobytes() == mean[name].tobytes()


def test_of_factors_of_which_one_is_not_uploaded_the_mean_is_taken(blobs: BlobStore) -> None:
    upload = ["lora.4.query.B", "head.weight"]
    updates = [accepted(blobs, {name: arrays(seed)[name] for name in upload}, 1.0) for seed in range(2)]
    merged = merge(blobs, opened(upload), BASE, updates)
    specs = tensors.specs({name: BASE[name] for name in upload})
    mean = weighted_mean(blobs, [(each.blob, 1.0) for each in updates if each.blob], specs)
    assert merged["lora.4.query.B"].tobytes() == mean["lora.4.query.B"].tobytes()
    assert merged["lora.4.query.A"] is BASE["lora.4.query.A"]


def test_what_is_merged_once_more_stays(blobs: BlobStore) -> None:
    """A release is its own best approximation, with its components in the same order."""
    first = merge(blobs, opened(list(BASE)), BASE, [accepted(blobs, arrays(seed), 1.0) for seed in range(3)])
    again = merge(blobs, opened(list(BASE)), first, [accepted(blobs, first, 1.0)] * 2)
    for name in first:
        np.testing.assert_allclose(again[name], first[name], rtol=0, atol=1e-5)


def test_updates_of_other_bases_or_other_tensors_are_refused(blobs: BlobStore) -> None:
    assert not buffers(program_of("svd"))
    update = accepted(blobs, arrays(1), 1.0)
    with pytest.raises(MergeError, match="do not count in a round of svd"):
        merge(blobs, opened(list(BASE)), BASE, [update], {update.update_id: opened(list(BASE))})
    with pytest.raises(TensorError):
        merge(blobs, opened(list(BASE)), BASE, [accepted(blobs, {"head.bias": BASE["head.bias"]}, 1.0)])


# --- in rounds -----------------------------------------------------------------------------------------------------------


def world_of(folder: Path, config: ServerConfig = CONFIG) -> World:
    world = World(folder, config)
    for name in ("ann", "bob", "cem"):
        world.device(name, epsilon=config.plan.epsilon)  # type: ignore[attr-defined]
    world.request(2)
    return world


def test_anyone_can_make_the_releases_again(tmp_path: Path) -> None:
    world = world_of(tmp_path / "deployment")
    with world.serving():
        world.server().run(rounds=2)
    assert [each.strategy for each in world.payloads(types.ReleaseProposed)][-2:] == ["svd"] * 2
    rebuilt = rebuild(world.log, world.blobs, deep=True)
    assert [each.identical for each in rebuilt.steps] == [True, True]
    [*_, last] = world.releases.releases.values()
    made = tensors.decode(world.blobs.get(last.blob))
    np.testing.assert_allclose(np.linalg.norm(made["lora.0.query.A"], axis=1), ROW_NORM, rtol=1e-6)


def test_a_server_that_takes_over_before_the_merge_makes_the_same_release(tmp_path: Path) -> None:
    world = world_of(tmp_path / "deployment")
    first = world.server()
    with world.serving():
        while not world.payloads(types.RoundClosed):
            first.step()
    assert not [each for each in world.payloads(types.ReleaseProposed) if each.round_id]
    second = world.server()
    while len(world.releases.releases) < 2:
        second.step(wait_s=0.0)
    assert rebuild(world.log, world.blobs, list(world.releases.releases)[1], deep=True).identical


def test_a_private_round_trains_both_factors_and_a_buffer_holds_none(tmp_path: Path) -> None:
    private = ClassificationPlan(planned_rounds=3, sampling_rate=1.0, steps=1, nominal_examples=100, strategy="svd")
    assert list(private.mechanisms()) == ["sums", "svd"]
    world = world_of(tmp_path / "deployment", replace(CONFIG, plan=private, cohort_size=3, buffer_size=2))
    with world.serving():
        world.server().run(rounds=2)
    _, training = world.payloads(types.RoundOpened)
    assert (training.strategy, training.max_staleness, training.mechanism is not None) == ("svd", 0, True)
    assert "lora.0.query.A" in training.upload
    assert rebuild(world.log, world.blobs, deep=True).identical
