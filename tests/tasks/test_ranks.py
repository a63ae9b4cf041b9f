"""Adapters of which some components are fixed: those of a release, and those above the rank at which a device trains."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import numpy as np
import pytest
import tiny_models as tiny
import torch
from fedloop_events.blobs import tensors
from fedloop_events.errors import TensorError
from fedloop_events.types import BlobRef, Mechanism, RoundOpened
from fedloop_tasks.causal import memory
from fedloop_tasks.causal.examples import Example, Pair
from fedloop_tasks.causal.model import CausalModel, describe
from fedloop_tasks.classification.examples import Example as Labelled
from fedloop_tasks.classification.model import EmbeddingClassifier
from fedloop_tasks.classification.model import describe as describe_classifier
from fedloop_tasks.models.tensors import Adapted, Arrays
from fedloop_tasks.programs import factors
from fedloop_tasks.table import program_of
from fedloop_tasks.task import TooLittleMemoryError
from fedloop_tasks.turns import Turn
from msgspec.structs import replace

ASKED = (Turn("user", "where is my card"),)
EXAMPLES = [Example(ASKED, "we have sent it"), Example((Turn("user", "a loan"),), "yes, for a house")]
RANK, FIXED = 4, 3
LARGER: Final = {"A": (20, 1), "B": (1, 20)}


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(params=[True, False], ids=["activated", "everywhere"])
def activated(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def made(folder: Path, *, rank: int = RANK, alpha: float = 8.0, **settings: Any) -> CausalModel:
    settings = {"layers": 2, "max_answer_tokens": 24} | settings
    spec = describe(folder.name, model_dir=folder, rank=rank, alpha=alpha, **settings)
    return CausalModel(spec, model_dir=folder, device="cpu")


def drawn(model: Adapted, *, fixed: int = 0, seed: int = 0) -> Arrays:
    """A release; with `fixed`, all adapters but the first have fixed factors of that rank."""
    random = np.random.default_rng(seed)
    found = {name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in model.shapes.items()}
    for name in factors.pairs(list(found))[1:] if fixed else []:
        for factor, shape in (("A", (fixed, found[name + ".A"].shape[1])), ("B", (found[name + ".B"].shape[0], fixed))):
            found[f"{name}.fixed.{factor}"] = random.normal(0, 0.1, shape).astype(np.float32)
    return found


def widened(arrays: Arrays, rank: int) -> Arrays:
    """The same adapters with all factors trained, of one rank: components of zeros where there are fewer."""
    made = {name: values for name, values in arrays.items() if not factors.is_fixed(name)}
    for name in factors.pairs(list(made)):
        a, b = factors.whole(arrays, name)
        made[name + ".A"] = np.concatenate([a, np.zeros((rank - len(a), a.shape[1]), np.float32)])
        made[name + ".B"] = np.concatenate([b, np.zeros((len(b), rank - b.shape[1]), np.float32)], axis=1)
    return made


def opened(upload: list[str], mechanism: Mechanism | None, strategy: str = "svd") -> RoundOpened:
    return RoundOpened(
        origin="tests", epoch=1, run_id="main", round_id="r0001", request_id="q", number=1, model="default",
        base_release="0000-x", base=BlobRef("0" * 64, 1), strategy=strategy, cohort=[], quorum=1, deadline_s=1.0,
        upload=upload, max_upload_bytes=10**6, max_update_norm=1e6, mechanism=mechanism, hyperparameters={"lora_lr": 2.0},
    )  # fmt: skip


def losses(model: CausalModel) -> list[float]:
    return [each.loss for each in model.scores(model.encoded(EXAMPLES))]


def test_fixed_factors_act_exactly_where_an_adapter_of_the_sum_of_the_ranks_does(folder: Path, activated: bool) -> None:
    model, wide = made(folder, activated=activated), made(
        folder, rank=RANK + FIXED, alpha=8.0 * (RANK + FIXED) / RANK, activated=activated
    )  # fmt: skip
    release = drawn(model, fixed=FIXED)
    without = {name: values for name, values in release.items() if not factors.is_fixed(name)}
    model.load(without)
    alone, kept = losses(model), model.embed(["where is my card"])  # and what is kept of the texts is there
    model.load(release)
    wide.load(widened(release, RANK + FIXED))
    np.testing.assert_allclose(losses(model), losses(wide), rtol=1e-4)
    assert not np.allclose(losses(model), alone, rtol=1e-3)
    assert model.generate(ASKED).text == wide.generate(ASKED).text
    assert model.generate(ASKED).confidence == pytest.approx(wide.generate(ASKED).confidence, rel=1e-4)
    np.testing.assert_array_equal(model.embed(["where is my card"]), kept)
    pairs = [Pair(ASKED, "we have sent it", "no", learn=False)]
    assert model.preferences(pairs) == pytest.approx(wide.preferences(pairs), abs=1e-3)
    model.load(without)
    assert losses(model) == alone, "a release without fixed factors takes the place of one with them"


def test_a_release_is_given_back_as_it_was_loaded_and_one_that_is_wrong_changes_nothing(folder: Path) -> None:
    model = made(folder)
    release = drawn(model, fixed=FIXED)
    model.load(release)
    name = next(each for each in release if factors.is_fixed(each))
    wrong: list[Arrays] = [
        {each: values for each, values in release.items() if each != name},
        dict(reversed(release.items())),
        release | {name: release[name][:, 1:]},
        release | {name: release[name] * np.float32(np.nan)},
        release | {name: release[name].astype(np.float64)},
        release | {name: release[name][:0]},
        release | {name: release[name][0]},
        release | {"lora.0.other.fixed.A": release[name], "lora.0.other.fixed.B": release[name]},
        release | {f"{name[:-1]}{factor}": np.tile(release[f"{name[:-1]}{factor}"], size) for factor, size in LARGER.items()},
    ]  # fmt: skip
    for each in wrong:
        with pytest.raises(TensorError):
            model.load(each)
        found = model.arrays()
        assert list(found) == list(release)
        assert all(found[key].tobytes() == release[key].tobytes() for key in release)


def test_a_device_that_trains_a_part_leaves_the_rest_as_it_is_and_trains_from_the_whole_release(
    folder: Path, activated: bool
) -> None:
    """The clip bounds the part alone: one example's gradient, clipped, moves it by exactly the learning rate times the bound."""
    model = made(folder, activated=activated)
    release = drawn(model, fixed=FIXED)
    model.load(release)
    before, program = losses(model), program_of("svd")
    upload = program.upload(list(release))
    assert not any(factors.is_fixed(name) for name in upload)
    terms = opened(upload, Mechanism(sampling_rate=1.0, noise_multiplier=1e-6, clip_norm=0.01, steps=1, divisor=1.0))
    with model.at_rank(2):
        np.testing.assert_allclose(losses(model), before, rtol=1e-4)
        update = program.compute(model, EXAMPLES[:1], terms)
    assert tensors.specs(update) in program.smaller(terms, release)
    moved = np.sqrt(sum(np.sum((values - release[name][tensors.first(values)]) ** 2) for name, values in update.items()))
    assert moved == pytest.approx(2.0 * 0.01, rel=1e-2)
    after = model.arrays()
    assert list(after) == list(release)
    for name, values in (release | tensors.completed(update, release)).items():
        assert after[name].tobytes() == values.tobytes()


def test_a_part_is_trained_without_privacy_too_and_learns(folder: Path) -> None:
    model = made(folder)
    model.load(drawn(model))
    before, program = losses(model), program_of("svd")
    terms = opened(program.upload(list(model.shapes)), None)
    with model.at_rank(1):
        program.compute(model, EXAMPLES, replace(terms, hyperparameters={"lora_lr": 0.003, "local_epochs": 20, "batch": 2}))
    assert np.mean(losses(model)) < np.mean(before)


def test_a_classifier_has_fixed_factors_and_smaller_ranks_as_well() -> None:
    model = EmbeddingClassifier(describe_classifier(["card", "loan"], rank=RANK), device="cpu")
    wide = EmbeddingClassifier(describe_classifier(["card", "loan"], rank=7, alpha=4.0 * 7 / RANK), device="cpu")
    release, texts = drawn(model, fixed=FIXED), ["where is my card", "what does a loan cost"]
    model.load(release)
    wide.load(widened(release, 7))
    np.testing.assert_allclose(model.predict(texts)[1], wide.predict(texts)[1], rtol=1e-4)
    program = program_of("svd")
    mechanism = Mechanism(sampling_rate=1.0, noise_multiplier=0.1, clip_norm=1.0, steps=1, divisor=1.0)
    terms = opened(program.upload(list(release)), mechanism)
    with model.at_rank(1):
        update = program.compute(model, [Labelled(texts[0], "card")], terms)
    assert tensors.specs(update) == program.smaller(terms, release)[-1]
    name = "lora.5.attention.self.value.fixed.A"
    assert model.arrays()[name].tobytes() == release[name].tobytes()


def test_the_rank_that_fits_is_the_largest_for_which_there_is_memory(folder: Path) -> None:
    base, left = memory.sizes(folder), 10**15
    model = CausalModel(
        describe(folder.name, model_dir=folder, rank=16, layers=2),
        model_dir=folder,
        device="cpu",
        cache_bytes=0,
        free=lambda: left,
    )
    needed = {rank: memory.training_bytes(base, model.spec, 0, memory.Trained(rank)) for rank in range(1, 17)}
    assert list(needed.values()) == sorted(set(needed.values()))
    left = needed[1] - 1
    with pytest.raises(TooLittleMemoryError):
        model.fitting_rank(16)
    left = needed[5]
    assert model.fitting_rank(3) == 3
    assert model.fitting_rank(16) == 5
    left = 0
    assert model.fitting_rank(16) == 5, "what fitted once is not asked for again"
    with pytest.raises(TooLittleMemoryError):
        model.check_memory()
    with model.at_rank(5):
        model.check_memory()


def test_a_release_with_fixed_factors_needs_memory_for_them(folder: Path) -> None:
    base, left = memory.sizes(folder), 10**15
    model = CausalModel(
        describe(folder.name, model_dir=folder, rank=4, layers=2),
        model_dir=folder,
        device="cpu",
        cache_bytes=0,
        free=lambda: left,
    )
    release = drawn(model, fixed=8)
    left = memory.training_bytes(base, model.spec, 0)
    with pytest.raises(TooLittleMemoryError):
        model.check_memory(sum(values.nbytes for values in release.values()))
    with pytest.raises(TooLittleMemoryError):
        model.fitting_rank(4, 10**9)
    model.check_memory()
    model.load(release)
    left = 0
    with pytest.raises(TooLittleMemoryError):
        model.check_memory()


def test_the_reference_of_losses_from_preferences_is_the_base_without_fixed_factors_too(folder: Path) -> None:
    model = made(folder)
    encoded = model.encoded(EXAMPLES)
    found = model._reference.log_probabilities(encoded)
    other = made(folder)
    other.load(drawn(other, fixed=FIXED))
    assert other._reference.log_probabilities(encoded) == found
    with torch.no_grad():
        assert not np.allclose(losses(other), losses(model), rtol=1e-3)
