"""Updates of which the devices chose the rank: what is accepted, and what becomes of it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from devices import OPEN_CONFIG, SPEC, World
from fedloop_events import types
from fedloop_events.blobs import tensors
from fedloop_events.blobs.reader import TensorReader
from fedloop_events.blobs.store import BlobStore
from fedloop_events.types import AcceptedUpdate, Content, InstructionSent, RoundOpened, UpdateSubmitted
from fedloop_server.aggregation.merging import merge
from fedloop_server.flower.admission import Admission, ExpectedReply
from fedloop_server.rounds.rebuild import rebuild
from fedloop_tasks import updates
from fedloop_tasks.classification.plan import ClassificationPlan
from fedloop_tasks.programs.factors import whole
from fedloop_tasks.table import PROGRAMS, program_of
from fedloop_tasks.task import UPDATE_BITS
from msgspec.structs import replace
from numpy.typing import NDArray

Arrays = dict[str, NDArray[Any]]
RANK, WIDE, HIGH = 4, 7, 5
PAIRS = ("lora.4.query", "lora.5.value")


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def arrays(seed: int, rank: int = RANK) -> Arrays:
    random, made = np.random.default_rng(seed), {}
    for name in PAIRS:
        made[name + ".A"] = random.normal(size=(rank, WIDE)).astype(np.float32)
        made[name + ".B"] = random.normal(size=(HIGH, rank)).astype(np.float32)
    return made | {"head.weight": random.normal(size=(4, HIGH)).astype(np.float32)}


BASE = arrays(99)


def opened(strategy: str = "svd", upload: list[str] | None = None) -> RoundOpened:
    return RoundOpened(
        origin="o", epoch=1, run_id="main", round_id="r0001", request_id="q", number=1, model="default",
        base_release="0000-x", base=types.BlobRef("0" * 64, 1), strategy=strategy, cohort=["c"], quorum=1, deadline_s=1.0,
        upload=list(BASE) if upload is None else upload, max_upload_bytes=10**6, max_update_norm=20.0,
    )  # fmt: skip


def checked(blobs: BlobStore, update: Mapping[str, NDArray[Any]], terms: RoundOpened) -> str | None:
    sent = InstructionSent(
        origin="o", epoch=1, run_id="main", round_id="r0001", step=0, client_id="c", message_type="train", content=Content(),
        content_sha256="0" * 64,
    )  # fmt: skip
    submitted = UpdateSubmitted(
        origin="o", client_id="c", seq=1, run_id="main", instruction_id="1" * 32, round_id="r0001", base_release="0000-x",
        content=Content(arrays={"arrays": blobs.put(tensors.encode(update))}, metrics={"metrics": {"num-examples": 1}}),
    )  # fmt: skip
    program = program_of(terms.strategy)
    specs, *smaller = (updates.sent(each, terms) for each in (program.specs(terms, BASE), *program.smaller(terms, BASE)))
    expected = ExpectedReply(specs, terms, BASE, smaller)
    refusal = Admission().check(submitted, sent, expected, TensorReader(blobs))
    return refusal and refusal.reason


def test_an_update_of_any_rank_up_to_the_adapters_is_accepted_and_of_no_other(blobs: BlobStore) -> None:
    for rank in range(RANK + 2):
        right = 1 <= rank <= RANK
        assert (checked(blobs, arrays(1, rank), opened()) is None) == right, rank
        assert (checked(blobs, arrays(1, rank), opened("fedavg")) is None) == (rank == RANK), rank
    small, other = arrays(1, 2), arrays(1, 3)
    wrong: list[Arrays] = [
        small | {name: other[name] for name in (PAIRS[0] + ".A", PAIRS[0] + ".B")},
        small | {PAIRS[0] + ".A": other[PAIRS[0] + ".A"]},
        small | {"head.weight": small["head.weight"][:2]},
        {name: values for name, values in small.items() if not name.startswith(PAIRS[0])},
        small | {name: small[name].astype(np.float64) for name in small},
    ]
    assert {checked(blobs, each, opened()) for each in wrong} <= {"wrong-tensors", "wrong-size"}


def test_an_update_of_a_smaller_rank_is_finite_and_bound_in_its_distance_from_the_base_too(blobs: BlobStore) -> None:
    near = {name: BASE[name][tensors.first(values)] + np.float32(0.1) for name, values in arrays(1, 2).items()}
    assert checked(blobs, near, opened()) is None
    size = sum(values.size for values in near.values())
    assert checked(blobs, near, replace(opened(), max_update_norm=0.1 * np.sqrt(size) * 0.99)) == "norm"
    assert checked(blobs, near, replace(opened(), max_update_norm=0.1 * np.sqrt(size) * 1.01)) is None
    assert checked(blobs, near | {"head.weight": near["head.weight"] * np.float32(np.inf)}, opened()) == "not-finite"


def test_which_programs_take_smaller_ranks() -> None:
    """Those that merge products. Where one factor alone is uploaded there is nothing to choose."""
    base = BASE | {"head.bias": np.zeros(4, np.float32)}
    taking = {name for name, each in PROGRAMS.items() if each.smaller(opened(name, each.upload(list(BASE))), base)}
    assert taking == {"svd", "stack"}
    assert program_of("svd").smaller(opened(upload=[PAIRS[0] + ".B", "head.weight"]), BASE) == []
    assert program_of("svd").smaller(opened(upload=["head.weight"]), BASE) == []


def test_what_a_device_did_not_train_counts_as_it_is_in_the_base(blobs: BlobStore) -> None:
    """Against the dense mean, of ranks that are mixed."""
    trained = [arrays(seed, rank) for seed, rank in enumerate((1, RANK, 2))]
    weights = np.array([1.0, 3.0, 2.0])
    accepted = [
        AcceptedUpdate("c", "0" * 32, "0" * 32, blobs.put(tensors.encode(each)), weight)
        for each, weight in zip(trained, weights, strict=True)
    ]
    merged = merge(blobs, opened(), BASE, accepted)
    assert tensors.specs(merged) == tensors.specs(BASE)
    for name in PAIRS:
        dense = np.zeros((HIGH, WIDE))
        for share, each in zip(weights / weights.sum(), trained, strict=True):
            rank = len(each[name + ".A"])
            dense += share * (each[name + ".B"].astype(float) @ each[name + ".A"])
            dense += share * (BASE[name + ".B"][:, rank:].astype(float) @ BASE[name + ".A"][rank:])
        best = float(np.sqrt((np.linalg.svd(dense, compute_uv=False)[RANK:] ** 2).sum()))
        found = merged[name + ".B"].astype(float) @ merged[name + ".A"]
        assert np.linalg.norm(dense - found) <= best + 1e-5
    wholes = [blobs.put(tensors.encode(tensors.completed(each, BASE))) for each in trained]
    whole = [replace(each, blob=blob) for each, blob in zip(accepted, wholes, strict=True)]
    padded = merge(blobs, opened(), BASE, whole)
    assert all(padded[name].tobytes() == merged[name].tobytes() for name in merged)


@pytest.mark.parametrize(("bits", "off"), [(16, 1e-3), (8, 0.05)])
@pytest.mark.parametrize("strategy", ["svd", "stack"])
def test_a_smaller_rank_may_be_sent_in_few_bits(blobs: BlobStore, strategy: str, bits: int, off: float) -> None:
    plain, few = opened(strategy), replace(opened(strategy), hyperparameters={UPDATE_BITS: bits})
    trained = [arrays(seed, rank) for seed, rank in enumerate((1, RANK, 2))]

    def product(terms: RoundOpened, name: str) -> NDArray[Any]:
        sent = [updates.encode(terms, BASE, each) for each in trained]
        accepted = [
            AcceptedUpdate("c", "0" * 32, "0" * 32, blobs.put(tensors.encode(each)), weight)
            for each, weight in zip(sent, (1.0, 3.0, 2.0), strict=True)
        ]
        made = merge(blobs, terms, BASE, accepted)
        a, b = whole(made, name)
        return b.astype(float) @ a

    for name in PAIRS:
        wanted = product(plain, name)
        assert np.linalg.norm(product(few, name) - wanted) < off * np.linalg.norm(wanted)
    near = {name: BASE[name][tensors.first(values)] + np.float32(0.1) for name, values in trained[0].items()}
    assert checked(blobs, updates.encode(few, BASE, near), few) is None
    assert checked(blobs, near, few) in {"wrong-tensors", "wrong-size"}


def test_rounds_with_devices_of_different_ranks_can_be_made_again(tmp_path: Path) -> None:
    config = replace(OPEN_CONFIG, plan=ClassificationPlan(epsilon=None, strategy="svd"))
    world = World(tmp_path / "deployment", config, replace(SPEC, rank=2))

    def small(opened: RoundOpened, update: dict[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
        return update | {"lora.0.query.A": update["lora.0.query.A"][:1], "lora.0.query.B": update["lora.0.query.B"][:, :1]}

    world.device("ann", epsilon=None)
    world.device("bob", epsilon=None, behave=small)
    world.request(2)
    with world.serving():
        world.server().run(rounds=2)
    assert [len(each.accepted) for each in world.payloads(types.RoundClosed)] == [2, 2]
    assert [each.identical for each in rebuild(world.log, world.blobs, deep=True).steps] == [True, True]
