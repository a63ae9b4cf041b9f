"""Models made of GGUF files and of Hugging Face folders answer as what they were made from, and are the same bytes everywhere."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
import torch
from fedloop_tasks.models import registry
from fedloop_tasks.models.weights import bfloat16
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

Type = gguf.GGMLQuantizationType
FAMILIES = ("llama", "qwen2", "gpt2")


def loaded(folder: Path, **options: Any) -> Any:
    models: Any = AutoModelForCausalLM
    model, report = models.from_pretrained(folder, local_files_only=True, output_loading_info=True, **options)
    assert not [name for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in report[kind]]
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(60).reshape(2, 30) * 4
    with torch.no_grad():
        found: torch.Tensor = model(input_ids=ids).logits
    return found


@pytest.fixture(autouse=True)
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "fedloop" / "models"


def saved(folder: Path, model: Any) -> Path:
    """A Hugging Face folder, with the tokenizer that the GGUF files have."""
    made = registry.add(str(gguf_files.write(folder.with_suffix(".gguf"), model)), name="tokenizer-alone")
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((made.folder / name).read_bytes())
    return folder


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_of_a_gguf_file_has_the_logits_of_the_model_that_was_written_into_it(
    tmp_path: Path, family: str, tied: bool
) -> None:
    model = gguf_files.small(family, tied=tied)
    made = registry.add(str(gguf_files.write(tmp_path / f"{family}.gguf", model)))
    assert torch.equal(logits(loaded(made.folder)), logits(model))
    assert made.manifest.parameters == sum(each.numel() for each in model.parameters())


def test_so_has_one_of_gpt2_and_one_with_biases(tmp_path: Path) -> None:
    for name, model in (
        ("gpt2", gguf_files.small("gpt2")),
        ("biased", gguf_files.small("llama", attention_bias=True, mlp_bias=True)),
    ):
        made = registry.add(str(gguf_files.write(tmp_path / f"{name}.gguf", model)))
        assert torch.equal(logits(loaded(made.folder)), logits(model))


@pytest.mark.parametrize("quantisation", [Type.F16, Type.Q8_0, Type.Q4_0, Type.BF16], ids=lambda each: each.name)
def test_quantised_weights_are_those_that_the_file_holds(tmp_path: Path, quantisation: Type) -> None:
    model = gguf_files.small("llama")
    path = gguf_files.write(tmp_path / "small.gguf", model, quantisation=quantisation)
    weights = load_file(registry.add(str(path)).folder / "model.safetensors")
    stored = gguf.quants.quantize(model.state_dict()["model.layers.1.mlp.up_proj.weight"].numpy(), quantisation)
    expected = gguf.quants.dequantize(stored, quantisation)
    assert np.array_equal(weights["model.layers.1.mlp.up_proj.weight"].numpy(), expected)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_model_is_what_transformers_makes_of_the_same_file(tmp_path: Path, family: str) -> None:
    path = gguf_files.write(tmp_path / "small.gguf", gguf_files.small(family), quantisation=Type.Q8_0)
    models: Any = AutoModelForCausalLM
    theirs = models.from_pretrained(tmp_path, gguf_file=path.name, local_files_only=True)
    assert torch.equal(logits(loaded(registry.add(str(path)).folder)), logits(theirs.eval()))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_of_a_hugging_face_folder_has_its_logits_also_where_it_is_in_parts(tmp_path: Path, family: str) -> None:
    model = gguf_files.small(family)
    folder = saved(tmp_path / "whole", model)
    model.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert len([*(tmp_path / "parts").glob("*.safetensors")]) > 2
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "parts" / name).write_bytes((folder / name).read_bytes())
    whole, parts = registry.add(str(folder)), registry.add(str(tmp_path / "parts"))
    assert torch.equal(logits(loaded(whole.folder)), logits(model))
    assert parts.manifest.files == whole.manifest.files
    assert AutoTokenizer.from_pretrained(whole.folder)("hello world")["input_ids"]


def test_what_older_files_hold_beside_the_weights_changes_nothing(tmp_path: Path) -> None:
    """GPT-2's are without a prefix, and hold the output's matrix and constants as well."""
    model = gguf_files.small("gpt2")
    folder = saved(tmp_path / "one", model)
    new = registry.add(str(folder), name="new")
    state = {name.removeprefix("transformer."): value.clone() for name, value in load_file(folder / "model.safetensors").items()}
    state |= {"h.0.attn.bias": torch.ones(1, 1, 4, 4), "lm_head.weight": state["wte.weight"].clone()}
    save_file(state, folder / "model.safetensors")
    old = registry.add(str(folder), name="old")
    assert old.manifest.files == new.manifest.files


def test_a_tied_matrix_may_be_stored_in_another_type(tmp_path: Path) -> None:
    model = gguf_files.small("llama")
    with torch.no_grad():
        model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight.to(torch.bfloat16))
    folder = saved(tmp_path / "one", model)
    state = load_file(folder / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].to(torch.bfloat16)
    save_file(state, folder / "model.safetensors")
    assert torch.equal(logits(loaded(registry.add(str(folder)).folder)), logits(model))


def test_a_model_in_bfloat16_is_rounded_as_torch_rounds_it(tmp_path: Path) -> None:
    model = gguf_files.small("llama")
    made = registry.add(str(gguf_files.write(tmp_path / "small.gguf", model)), dtype="bf16")
    for name, value in load_file(made.folder / "model.safetensors").items():
        assert torch.equal(value, model.state_dict()[name].to(torch.bfloat16))
    assert loaded(made.folder, dtype="auto").dtype == torch.bfloat16
    whole = registry.add(str(tmp_path / "small.gguf"), name="whole")
    weights = [(each.folder / "model.safetensors").stat().st_size for each in (whole, made)]
    assert weights[1] < 0.55 * weights[0]
    again = registry.add(str(made.folder), name="again", dtype="bf16")
    assert again.manifest.files["model.safetensors"] == made.manifest.files["model.safetensors"]


def test_ties_are_rounded_to_even_and_the_largest_values_to_infinity() -> None:
    bits = np.array([0x3F808000, 0x3F818000, 0x3F808001, 0x00000001, 0x80000000, 0x7F7FFFFF], "<u4")
    assert list(bfloat16(bits.view("<f4"))) == [0x3F80, 0x3F82, 0x3F81, 0, 0x8000, 0x7F80]


def test_the_same_source_makes_the_same_bytes_wherever_and_whenever(tmp_path: Path) -> None:
    """The digests stand here, so that another machine or version that makes others is noticed."""
    model = gguf_files.small("llama")
    with torch.no_grad():
        for number, parameter in enumerate(model.parameters()):
            steps = (torch.arange(parameter.numel()) * 7 + number) % 64 - 32
            parameter.copy_(steps.reshape(parameter.shape).to(torch.float32) / 64)
    path = gguf_files.write(tmp_path / "one.gguf", model)
    other = tmp_path / "elsewhere" / "two.gguf"
    other.parent.mkdir()
    other.write_bytes(path.read_bytes())
    one, two = registry.add(str(path)), registry.add(str(other), model_dir=tmp_path / "models")
    assert {each.name: each.read_bytes() for each in one.folder.iterdir()} == {
        each.name: each.read_bytes() for each in two.folder.iterdir()
    }
    assert one.manifest.sha256 == registry.sha256(one.folder)
    lines = "".join(
        f"{hashlib.sha256((one.folder / name).read_bytes()).hexdigest()}  {name}\n" for name in sorted(one.manifest.files)
    )
    assert one.manifest.sha256 == hashlib.sha256(lines.encode()).hexdigest()
    assert one.manifest.files["model.safetensors"][:16] == "f812a3b727a20c47"
    assert one.manifest.sha256[:16] == "7fc2e2565bf66aee"


def test_a_configuration_is_what_the_file_says_and_names_no_code(tmp_path: Path) -> None:
    folder = saved(tmp_path / "one", gguf_files.small("llama"))
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoModel": "evil.Model"}, "_name_or_path": "/somewhere", "torch_dtype": "float16"}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 0], "temperature": 0.2}))
    made = registry.add(str(folder))
    written = json.loads((made.folder / "config.json").read_text())
    assert not {"auto_map", "_name_or_path", "torch_dtype"} & written.keys()
    assert written["dtype"] == "float32"
    assert json.loads((made.folder / "generation_config.json").read_text()) == {"eos_token_id": [2, 0]}
    from_gguf = AutoConfig.from_pretrained(registry.add(str(folder.with_suffix(".gguf")), name="two").folder)
    own = gguf_files.small("llama").config
    for name in ("rope_parameters", "rms_norm_eps", "num_key_value_heads", "max_position_embeddings", "hidden_act"):
        expected = getattr(own, name)
        found = getattr(from_gguf, name)
        assert found == (pytest.approx(expected) if isinstance(expected, float) else expected)
    assert (from_gguf.bos_token_id, from_gguf.eos_token_id, from_gguf.pad_token_id) == (1, 2, 2)
    silent = {f"tokenizer.ggml.{name}_token_id": None for name in ("bos", "eos", "padding")}
    path = gguf_files.write(tmp_path / "silent.gguf", gguf_files.small("llama"), metadata=silent)
    none = AutoConfig.from_pretrained(registry.add(str(path)).folder)
    assert (none.bos_token_id, none.eos_token_id, none.pad_token_id) == (None, None, None)
