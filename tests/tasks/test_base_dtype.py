"""A frozen base in bfloat16 or in 4 bits: how far off gradients are, what it takes of memory, and where it is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from fedloop_clients.device import Settings
from fedloop_events.errors import UsageError
from fedloop_events.types import ClassificationSpec, Mechanism
from fedloop_privacy.dp.dpsgd import example_gradients
from fedloop_tasks import precision
from fedloop_tasks.causal import memory
from fedloop_tasks.causal.model import CausalModel
from fedloop_tasks.precision import Held
from fedloop_tasks.table import program_of, task_of
from fedloop_tasks.task import ModelError, TooLittleMemoryError
from tasks.test_causal_model import EXAMPLES, gradients_by_hand, losses_of, made, opened, some_arrays, whole

Gradients = dict[str, torch.Tensor]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(params=[True, False], ids=["activated", "everywhere"])
def activated(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def held(folder: Path, base_dtype: Held, **settings: Any) -> CausalModel:
    model = CausalModel(made(folder, **settings).spec, model_dir=folder, device="cpu", base_dtype=base_dtype)
    model.load(some_arrays(model))
    return model


def in_a_batch_and_alone(model: CausalModel) -> tuple[list[Gradients], list[Gradients]]:
    """The gradients of each example, in one batch and by a backward pass of its own."""
    with model.training(EXAMPLES, list(model.shapes), {"lora_lr": 1.0}) as ready:
        assert ready is not None
        parameters = list(ready.groups[0].parameters)
        found = example_gradients(model.tail, parameters, ready.examples, ready.losses, range(len(EXAMPLES)))
        together = [{name: each[row] for name, each in zip(model.shapes, found, strict=True)} for row in range(len(EXAMPLES))]
        alone = []
        for row in range(len(EXAMPLES)):
            each = torch.autograd.grad(ready.losses(model.tail, ready.examples.collate([row]))[0], parameters)
            alone.append(dict(zip(model.shapes, each, strict=True)))
    return together, alone


def off(found: list[Gradients], wanted: list[Gradients]) -> float:
    """The norm of all differences, of that of all that is wanted."""
    both = [(each[name].double(), other[name].double()) for each, other in zip(found, wanted, strict=True) for name in other]
    differences, norms = (
        sum(float(each.square().sum()) for each in some) for some in ([a - b for a, b in both], [b for _, b in both])
    )
    return float(np.sqrt(differences / norms))


def test_over_bfloat16_gradients_are_off_by_at_most_4_percent_of_those_in_float64(folder: Path, activated: bool) -> None:
    model = held(folder, "bf16", activated=activated)
    reference = made(folder, activated=activated)
    base = whole(folder, reference)
    exact = [
        {name: each.clone() for name, each in gradients_by_hand(base, folder, reference, given).items()} for given in EXAMPLES
    ]
    together, alone = in_a_batch_and_alone(model)
    assert 1e-4 < off(together, exact) <= 0.04
    assert off(together, alone) <= 0.04
    assert {p.dtype for p in model._tensors.values()} == {torch.float32}
    frozen = {
        p.dtype
        for module in (model._trunk, model.tail)
        for p in module.parameters()
        if not any(p is each for each in model._tensors.values())
    }
    assert frozen == {torch.bfloat16}


def test_over_4_bits_gradients_in_a_batch_are_those_of_each_example_by_itself(folder: Path, activated: bool) -> None:
    model = held(folder, "nf4", activated=activated)
    together, alone = in_a_batch_and_alone(model)
    assert off(together, alone) <= 0.003
    assert {p.dtype for p in model._tensors.values()} == {torch.float32}
    assert {p.dtype for p in model.tail.layers.parameters() if p.dtype != torch.float32} == {torch.uint8}


@pytest.mark.parametrize("base_dtype", ["bf16", "nf4"])
def test_an_example_is_clipped_exactly_whatever_the_base_is_held_in(folder: Path, base_dtype: Held) -> None:
    model = held(folder, base_dtype)
    before = model.arrays()
    upload = [name for name in before if name.endswith(".B")]
    clip = 0.05
    terms = Mechanism(sampling_rate=1.0, noise_multiplier=1e-9, clip_norm=clip, steps=1, divisor=1.0)
    update = program_of("ffa").compute(model, EXAMPLES[:1], opened(upload, terms, {"lora_lr": 1.0}))
    moved = np.sqrt(sum(float(((update[name].astype(np.float64) - before[name]) ** 2).sum()) for name in upload))
    assert moved == pytest.approx(clip, rel=1e-3)


@pytest.mark.parametrize("base_dtype", ["bf16", "nf4"])
def test_a_model_learns_and_answers_whatever_the_base_is_held_in(folder: Path, base_dtype: Held) -> None:
    model = held(folder, base_dtype)
    before, arrays = losses_of(model, EXAMPLES), model.arrays()
    assert {each.dtype for each in arrays.values()} == {np.dtype(np.float32)}
    terms = opened(list(arrays), None, {"lora_lr": 0.003, "local_epochs": 20, "batch": 2}, strategy="fedavg")
    model.load(program_of("fedavg").apply(terms, arrays, program_of("fedavg").compute(model, EXAMPLES, terms)))
    assert (losses_of(model, EXAMPLES) < before).all()
    assert model.generate(EXAMPLES[0].turns, most=8).tokens > 0
    assert np.linalg.norm(model.embed(["where is my card"])) == pytest.approx(1.0, rel=1e-3)


def test_what_is_kept_of_texts_is_half_as_large_in_bfloat16(folder: Path) -> None:
    sizes = {}
    for each in ("f32", "bf16"):
        model = held(folder, each)
        losses_of(model, EXAMPLES)
        sizes[each] = model._kept.size_bytes
    assert sizes["bf16"] * 2 == sizes["f32"]


def test_the_memory_that_is_asked_for_is_that_of_the_type_and_a_smaller_one_is_proposed(folder: Path) -> None:
    base = memory.sizes(folder)
    sizes = [memory.weights_bytes(base, each) for each in ("f32", "bf16", "nf4")]
    assert sizes[1] * 2 == sizes[0] == base.weights_bytes
    spec, left = made(folder).spec, sizes[1]
    with pytest.raises(TooLittleMemoryError) as refused:
        CausalModel(spec, model_dir=folder, device="cpu", free=lambda: left)
    assert "--base-dtype bf16" in refused.value.hint
    CausalModel(spec, model_dir=folder, device="cpu", free=lambda: left, base_dtype="bf16")
    with pytest.raises(TooLittleMemoryError) as refused:
        CausalModel(spec, model_dir=folder, device="cpu", free=lambda: left // 2, base_dtype="bf16")
    assert "f32" not in refused.value.hint


def test_training_that_would_fit_beside_a_smaller_base_says_so(folder: Path) -> None:
    spec, base = made(folder, rank=1, layers=1).spec, memory.sizes(folder)
    needed = memory.training_bytes(base, spec, 0)
    with pytest.raises(TooLittleMemoryError, match="try --base-dtype bf16"):
        memory.check_training(base, spec, 0, 0, lambda: needed - base.weights_bytes // 2)
    with pytest.raises(TooLittleMemoryError, match="no smaller rank and no fewer layers would fit"):
        memory.check_training(base, spec, 0, 0, lambda: needed - base.weights_bytes, held="nf4")


def test_what_is_best_is_float32_for_a_small_model_and_where_there_is_no_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    able: dict[str, bool] = {}
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    assert precision.chosen("auto", precision.LARGE_BYTES, "cpu") == "f32"
    able["avx512_bf16"] = True
    assert precision.chosen("auto", precision.LARGE_BYTES, "cpu") == "bf16"
    assert precision.chosen("auto", precision.LARGE_BYTES - 1, "cpu") == "f32"
    assert precision.chosen("bf16", 1, "cpu") == "bf16"
    assert precision.chosen("auto", precision.LARGE_BYTES, "mps") == "f32"


def test_4_bits_without_their_package_are_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(precision, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match="bitsandbytes, which is not installed") as refused:
        Settings(base_dtype="nf4")
    assert "fedloop[4bit]" in refused.value.hint
    Settings(base_dtype="bf16")


def test_a_classifier_takes_no_other_type() -> None:
    spec = ClassificationSpec(base_model="m", base_sha256="0" * 64, labels=["a"], rank=1, alpha=1.0, targets=["query"], layers=1)
    with pytest.raises(ModelError, match="float32 alone"):
        task_of(spec).model(None, base_dtype="bf16")
