"""Exported language models against `CausalModel`: loaded by PEFT, Transformers and `gguf`, which know nothing of it."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from exported_models import (
    ASKED,
    FAMILIES,
    PROVENANCE,
    Pair,
    answers,
    asked,
    chunks,
    exported,
    in_peft,
    logits,
    made,
    program,
    theirs,
)
from fedloop_events import files as durable
from fedloop_events.errors import TensorError
from fedloop_events.types import CausalSpec
from fedloop_tasks.models import registry
from fedloop_tasks.models.tensors import Arrays
from fedloop_tasks.table import task_of
from fedloop_tasks.task import ModelError
from msgspec.structs import replace
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

# PEFT 0.21 asks the base for an attribute that Transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "llama")


@pytest.mark.parametrize("targets", [None, "some"])
def test_peft_gives_the_logits_of_the_model(folder: Path, tmp_path: Path, targets: str | None) -> None:
    some = ["attn.c_proj", "c_fc"] if folder.name == "gpt2" else ["q_proj", "mlp.up_proj"]
    model = made(folder, targets=None if targets is None else some)
    out = exported(model, folder, "peft", tmp_path / "out")
    found = theirs(in_peft(folder, out))
    assert torch.allclose(found, logits(model), atol=1e-6 * float(found.abs().max()))
    assert not torch.allclose(found, theirs(AutoModelForCausalLM.from_pretrained(folder)), atol=0.1)


def test_peft_takes_every_tensor_and_adapts_nothing_else(folder: Path, tmp_path: Path) -> None:
    from peft.utils import get_peft_model_state_dict

    model = made(folder)
    out = exported(model, folder, "peft", tmp_path / "out")
    loaded = get_peft_model_state_dict(in_peft(folder, out), save_embedding_layers=False)
    written = load_file(out / "adapter_model.safetensors")
    assert loaded.keys() == written.keys()
    assert all(torch.equal(loaded[name], written[name]) for name in written)
    assert sorted(value.numpy().tobytes() for value in written.values()) == sorted(
        value.tobytes() for value in model.arrays().values()
    )
    config = json.loads((out / "adapter_config.json").read_text())
    assert (config["peft_type"], config["task_type"], config["r"], config["lora_alpha"]) == ("LORA", "CAUSAL_LM", 4, 6.0)
    assert config["target_modules"] == sorted(model.spec.targets)
    assert (config["layers_to_transform"], config["fan_in_fan_out"]) == ([2, 3], folder.name == "gpt2")


@pytest.mark.parametrize("form", ["peft", "merged"])
def test_the_program_on_the_card_answers_as_the_model_does(folder: Path, tmp_path: Path, form: str) -> None:
    model = made(folder)
    out = exported(model, folder, form, tmp_path / "out")
    base = [folder] if form == "peft" else []
    assert [program(out)(asked(text), out, *base) for text in ASKED] == answers(model)


def test_the_program_on_the_card_of_a_model_without_a_chat_template_answers_as_the_model_does(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "plain", template=None)
    model = made(folder)
    for form, base in (("peft", [folder]), ("merged", [])):
        out = exported(model, folder, form, tmp_path / form)
        assert [program(out)(asked(text), out, *base) for text in ASKED] == answers(model)


def test_a_merged_model_gives_the_logits_of_the_model_without_peft(folder: Path, tmp_path: Path) -> None:
    model = made(folder)
    out = exported(model, folder, "merged", tmp_path / "out")
    loaded: Any = AutoModelForCausalLM.from_pretrained(out)
    assert next(loaded.parameters()).dtype == torch.float32
    found = theirs(loaded)
    assert torch.allclose(found, logits(model), atol=5e-5 * max(1.0, float(found.abs().max())))
    tokenizers = [AutoTokenizer.from_pretrained(each) for each in (folder, out)]
    given = [each.apply_chat_template(asked("hello <|im_end|>"), add_generation_prompt=True) for each in tokenizers]
    assert given[0] == given[1]
    assert loaded.generation_config.eos_token_id == sorted(model.chat.ends)


def test_a_merged_model_changes_the_adapted_weights_and_no_others(folder: Path, tmp_path: Path) -> None:
    model = made(folder)
    out = exported(model, folder, "merged", tmp_path / "out")
    before, after = load_file(folder / "model.safetensors"), load_file(out / "model.safetensors")
    before.pop("lm_head.weight", None) if folder.name == "gpt2" else None
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    inside = "transformer.h" if folder.name == "gpt2" else "model.layers"
    adapted = {name.removeprefix("lora.")[:-2] for name in model.shapes}
    assert changed == {f"{inside}.{path}.weight" for path in adapted}


def test_tied_embeddings_stay_tied(llama: Path, tmp_path: Path) -> None:
    out = exported(made(llama), llama, "merged", tmp_path / "out")
    loaded: Any = AutoModelForCausalLM.from_pretrained(out)
    assert loaded.get_output_embeddings().weight.data_ptr() == loaded.get_input_embeddings().weight.data_ptr()
    assert "lm_head.weight" not in load_file(out / "model.safetensors")


def test_a_base_in_half_precision_is_merged_into_what_devices_compute(llama: Path, tmp_path: Path) -> None:
    base = registry.add(str(llama), name="half", model_dir=tmp_path, dtype="bf16").folder
    model = made(base)
    out = exported(model, base, "merged", tmp_path / "out")
    found = theirs(AutoModelForCausalLM.from_pretrained(out))
    assert torch.allclose(found, logits(model), atol=5e-5 * max(1.0, float(found.abs().max())))


def test_a_model_is_merged_with_a_small_part_of_it_in_memory(tmp_path: Path) -> None:
    folder = tiny.save(tmp_path / "large", hidden_size=128, intermediate_size=32_768, num_hidden_layers=3)
    model = made(folder)
    arrays, task = model.arrays(), task_of(model.spec)
    del model
    tracemalloc.start()
    export = task.export(arrays, PROVENANCE, "merged", folder)
    durable.write_folder(tmp_path / "out", {name: chunks(each) for name, each in export.files.items()})
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "out" / "model.safetensors").stat().st_size > 150e6
    assert peak_bytes < 30e6


# --- what is said of it, and refused ---


@pytest.mark.parametrize("form", ["peft", "merged", "gguf", "merged-gguf"])
def test_the_card_names_release_rounds_updates_base_and_metrics(llama: Path, tmp_path: Path, form: str) -> None:
    model = made(llama)
    card = (exported(model, llama, form, tmp_path / "out") / "README.md").read_text("utf-8")
    for part in ("# Release 0002-abc of default", "r0001", "b" * 64, "c" * 64, "a" * 64, "loss_per_token: 0.5000", "No bound"):
        assert part in card
    for name, digest in model.spec.files.items():
        assert f"`{name}`: `{digest}`" in card
    assert "licence: not known here" in card
    assert "license:" not in card


def test_the_card_names_the_licence_that_the_base_was_added_with(tmp_path: Path) -> None:
    pair = Pair("llama", tmp_path)
    card = (exported(pair.model, pair.base, "peft", tmp_path / "out") / "README.md").read_text("utf-8")
    assert 'license: "apache-2.0"' in card
    assert "licence: apache-2.0" in card


@pytest.mark.parametrize("form", ["peft", "merged", "gguf", "merged-gguf"])
def test_tensors_that_are_no_release_of_the_model_are_refused(llama: Path, form: str) -> None:
    model = made(llama)
    arrays, task = model.arrays(), task_of(model.spec)
    first = next(iter(arrays))
    wrong: list[Arrays] = [
        {name: value for name, value in arrays.items() if name != first},
        arrays | {"other": arrays[first]},
        arrays | {first: arrays[first][:2]},
        arrays | {first: arrays[first].astype(np.float64)},
    ]
    for each in wrong:
        with pytest.raises(TensorError):
            task.export(each, PROVENANCE, form, llama)


@pytest.mark.parametrize("form", ["peft", "merged", "gguf", "merged-gguf"])
def test_another_base_is_refused(llama: Path, tmp_path: Path, form: str) -> None:
    model = made(llama)
    other: CausalSpec = replace(model.spec, files=model.spec.files | {"tokenizer.json": "0" * 64})
    with pytest.raises(ModelError, match=r"tokenizer.json of the base model 'llama' has SHA-256"):
        task_of(other).export(model.arrays(), PROVENANCE, form, llama)
    with pytest.raises(ModelError, match="no base model"):
        task_of(model.spec).export(model.arrays(), PROVENANCE, form, tmp_path)
