"""A release as a LoRA adapter for llama.cpp, read by the package `gguf`, beside base models as llama.cpp has them."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
import tiny_models as tiny
import torch
from exported_models import FAMILIES, GGUF_FAMILIES, Pair, divergence, exported, logits, made, read
from fedloop_events.errors import UsageError
from transformers import AutoModelForCausalLM


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module", params=GGUF_FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp("pairs"))


def test_a_lora_gguf_changes_a_gguf_base_as_the_release_changes_the_model(pair: Pair, tmp_path: Path) -> None:
    """W of the base's GGUF file and `alpha / r` B A of the adapter's are the merged weights as llama.cpp has them."""
    out = exported(pair.model, pair.base, "gguf", tmp_path / "out")
    merged: Any = AutoModelForCausalLM.from_pretrained(exported(pair.model, pair.base, "merged", tmp_path / "merged"))
    wanted = dict(gguf_files.tensors(merged))
    (_, base), (fields, factors) = read(pair.path), read(out / "adapter.gguf")
    scale = fields["adapter.lora.alpha"] / pair.model.spec.rank
    names = {name.rpartition(".lora_")[0] for name in factors}
    assert factors.keys() == {f"{name}.lora_{factor}" for name in names for factor in "ab"}
    assert names == {name for name in wanted if not np.array_equal(wanted[name], base[name])}
    for name in names:
        found = base[name] + scale * factors[f"{name}.lora_b"] @ factors[f"{name}.lora_a"]
        assert np.allclose(found, wanted[name], atol=1e-5), name


def test_a_lora_gguf_says_what_llama_cpp_asks_for(pair: Pair, tmp_path: Path) -> None:
    fields, factors = read(exported(pair.model, pair.base, "gguf", tmp_path / "out") / "adapter.gguf")
    (of_base, base) = read(pair.path)
    assert fields["general.architecture"] == of_base["general.architecture"]
    assert {name: fields[name] for name in ("general.type", "adapter.type", "adapter.lora.alpha")} == {
        "general.type": "adapter",
        "adapter.type": "lora",
        "adapter.lora.alpha": 6.0,
    }
    assert "adapter.alora.invocation_tokens" not in fields
    for name, values in factors.items():
        weight = base[name.rpartition(".lora_")[0]]
        assert values.dtype == np.float32
        assert values.shape == ((4, weight.shape[1]) if name.endswith("_a") else (weight.shape[0], 4))


@pytest.mark.llama_cpp
def test_llama_cpp_gives_the_logits_of_the_model(pair: Pair, tmp_path: Path) -> None:
    from llama_cpp import Llama

    ids = [5, 17, 40, 3, 99, 120, 7, 7, 200, 31]
    adapter = exported(pair.model, pair.base, "gguf", tmp_path / "out") / "adapter.gguf"

    def of(**settings: Any) -> torch.Tensor:
        engine = Llama(str(pair.path), n_ctx=128, n_threads=1, logits_all=True, verbose=False, **settings)
        engine.eval(ids)
        return torch.from_numpy(np.array(engine.scores[: len(ids)]))

    plain, adapted = of(), of(lora_path=str(adapter))
    assert divergence(logits(pair.model, ids), adapted) < 1e-5
    assert divergence(logits(pair.model, ids), plain) > 5e-3


def test_names_in_a_lora_gguf_are_those_of_the_package_gguf(folder: Path, tmp_path: Path) -> None:
    model = made(folder)
    out = exported(model, folder, "gguf", tmp_path / "out")
    arch = (
        gguf.MODEL_ARCH.GPT2
        if folder.name == "gpt2"
        else gguf.MODEL_ARCH.QWEN2
        if folder.name == "qwen2"
        else gguf.MODEL_ARCH.LLAMA
    )
    names = gguf.get_tensor_name_map(arch, 4)
    inside = "transformer.h" if folder.name == "gpt2" else "model.layers"
    wanted = {
        f"{names.get_name(f'{inside}.{name[5:-2]}.weight', try_suffixes=('.weight',))}.lora_{name[-1].lower()}"
        for name in model.shapes
    }
    fields, found = read(out / "adapter.gguf")
    assert found.keys() == wanted
    assert fields["general.architecture"] == gguf.MODEL_ARCH_NAMES[arch]


def test_rows_of_queries_and_keys_alone_are_in_another_order_and_of_llama_alone(folder: Path, tmp_path: Path) -> None:
    model = made(folder)
    _, found = read(exported(model, folder, "gguf", tmp_path / "out") / "adapter.gguf")
    ours = {value.tobytes() for value in model.arrays().values()}
    moved = {name.split(".", 2)[2] for name, value in found.items() if value.tobytes() not in ours}
    turned = {"attn_q.weight.lora_b", "attn_k.weight.lora_b"}
    assert moved == (turned if folder.name in ("llama", "mistral") else set())


def test_without_the_package_for_gguf_it_is_named(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made(folder)
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UsageError, match="the package that writes GGUF files is not installed") as raised:
        exported(model, folder, "gguf", tmp_path / "out")
    assert raised.value.hint == "install fedloop[models]"
