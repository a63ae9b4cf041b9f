"""Releases with fixed factors, as other programs load them: the rank of a module is then its own."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import tiny_models as tiny
import torch
from exported_models import PROVENANCE, Pair, chunks, exported, in_peft, logits, made, read, theirs
from fedloop_events import files as durable
from fedloop_events.errors import TensorError
from fedloop_tasks.causal.examples import Example
from fedloop_tasks.classification.model import EmbeddingClassifier
from fedloop_tasks.classification.model import describe as describe_classifier
from fedloop_tasks.models import folder as folders
from fedloop_tasks.models.tensors import Adapted, Arrays
from fedloop_tasks.programs import factors
from fedloop_tasks.table import task_of
from fedloop_tasks.turns import Turn
from transformers import AutoModelForCausalLM

# PEFT 0.21 asks the base for an attribute that Transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / request.param, request.param)


def with_fixed(model: Adapted) -> Arrays:
    """The release, with fixed factors of a rank of its own for every adapter but the first; the model holds it."""
    random, release = np.random.default_rng(1), model.arrays()
    for number, name in enumerate(factors.pairs(list(release))):
        for factor, shape in (("A", (number, release[name + ".A"].shape[1])), ("B", (len(release[name + ".B"]), number))):
            if number:
                release[f"{name}.fixed.{factor}"] = random.normal(0, 0.1, shape).astype(np.float32)
    model.load(release)
    return release


def test_peft_gives_the_logits_of_the_model(folder: Path, tmp_path: Path) -> None:
    model = made(folder, targets=["attn.c_proj", "c_fc"] if folder.name == "gpt2" else ["q_proj", "mlp.up_proj"])
    before = logits(model)
    with_fixed(model)
    found = theirs(in_peft(folder, exported(model, folder, "peft", tmp_path / "out")))
    assert torch.allclose(found, logits(model), atol=1e-6 * float(found.abs().max()))
    assert not torch.allclose(found, before, atol=0.1)


def test_peft_gives_the_losses_of_a_model_whose_adapters_act_from_the_assistants_turn_on(folder: Path, tmp_path: Path) -> None:
    model = made(folder, activated=True)
    with_fixed(model)
    whole = in_peft(folder, exported(model, folder, "peft", tmp_path / "out"))
    (each,) = model.encoded([Example((Turn("user", "where is my card"),), "we have sent it")])
    logs = theirs(whole, each.ids).log_softmax(1)
    found = float(-sum(logs[n - 1, each.ids[n]] for n in range(each.start, len(each.ids))))
    assert found == pytest.approx(model.scores([each])[0].loss, rel=1e-5)


def test_a_merged_model_gives_the_logits_of_the_model(folder: Path, tmp_path: Path) -> None:
    model = made(folder)
    with_fixed(model)
    found = theirs(AutoModelForCausalLM.from_pretrained(exported(model, folder, "merged", tmp_path / "out")))
    assert torch.allclose(found, logits(model), atol=5e-5 * max(1.0, float(found.abs().max())))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_lora_gguf_changes_a_gguf_base_as_the_release_changes_the_model(tmp_path: Path, family: str) -> None:
    """llama.cpp divides alpha by the rank that a pair of factors has."""
    pair = Pair(family, tmp_path)
    with_fixed(pair.model)
    out = exported(pair.model, pair.base, "gguf", tmp_path / "out")
    merged: Any = AutoModelForCausalLM.from_pretrained(exported(pair.model, pair.base, "merged", tmp_path / "merged"))
    wanted = dict(gguf_files.tensors(merged))
    (_, base), (fields, found) = read(pair.path), read(out / "adapter.gguf")
    names = {name.rpartition(".lora_")[0] for name in found}
    assert len({len(found[f"{name}.lora_a"]) for name in names}) == len(names)
    for name in names:
        a, b = found[f"{name}.lora_a"], found[f"{name}.lora_b"]
        assert np.allclose(base[name] + fields["adapter.lora.alpha"] / len(a) * b @ a, wanted[name], atol=1e-5), name


def test_fixed_factors_that_are_not_the_models_are_refused(folder: Path) -> None:
    model = made(folder)
    release = with_fixed(model)
    name = next(each for each in release if factors.is_fixed(each))
    for wrong in (
        {each: values for each, values in release.items() if each != name},
        release | {name: release[name][:, 1:]},
        release | {"lora.0.x.fixed.A": release[name]},
    ):
        with pytest.raises(TensorError):
            task_of(model.spec).export(wrong, PROVENANCE, "peft", folder)


def test_the_program_on_a_classifiers_card_answers_as_the_model_does(tmp_path: Path) -> None:
    model = EmbeddingClassifier(describe_classifier(["card", "loan", "transfer"], rank=4), device="cpu")
    random = np.random.default_rng(0)
    model.load({name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in model.shapes.items()})
    texts = ["where is my card", "what does a loan cost", "send money abroad"]
    before = model.predict(texts)[1]
    release = with_fixed(model)
    export = task_of(model.spec).export(release, PROVENANCE, "peft", None)
    durable.write_folder(tmp_path / "out", {name: chunks(each) for name, each in export.files.items()})
    program = re.search(r"```python\n(.*?)```", (tmp_path / "out" / "README.md").read_text("utf-8"), re.DOTALL)
    assert program is not None
    names: dict[str, Any] = {}
    exec(program[1], names)
    labels, confidences = names["classify"](texts, tmp_path / "out", folders.locate(model.spec.base_model, None))
    assert (labels, confidences) == (model.predict(texts)[0], pytest.approx(model.predict(texts)[1], rel=1e-4))
    assert confidences != pytest.approx(before, rel=1e-3)
    with pytest.raises(TensorError):
        task_of(model.spec).export({name: release[name] for name in list(release)[:-3]}, PROVENANCE, "peft", None)
