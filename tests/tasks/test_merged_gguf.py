"""The whole model with a release merged in as one GGUF file: read by Transformers, by the package `gguf`, and by llama.cpp."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf_files
import numpy as np
import pytest
import tiny_models as tiny
import torch
from exported_models import GGUF_FAMILIES, IDS, PROVENANCE, Pair, divergence, exported, logits, made, read, theirs
from fedloop_events.errors import UsageError
from fedloop_tasks.models import registry
from fedloop_tasks.models.vocabulary import vocabulary
from fedloop_tasks.table import task_of
from transformers import AutoModelForCausalLM, AutoTokenizer

WRITTEN = "model.gguf"
MESSAGES = [{"role": "user", "content": "hello  world, 12 üs it's\n\n<tool> <|im_end|>"}]


@pytest.fixture(scope="module", params=GGUF_FAMILIES)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return Pair(request.param, tmp_path_factory.mktemp("pairs"))


def in_half(model: Any) -> Any:
    """Its matrices rounded to float16, as they are in the file."""
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(p.half().float() if p.dim() == 2 else p)
    return model


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2"])
def test_transformers_reads_the_file_and_gives_the_logits_of_the_model(tmp_path: Path, family: str) -> None:
    base = tiny.save(tmp_path / family, family)
    model = made(base)
    out = exported(model, base, "merged-gguf", tmp_path / "out")
    loaded: Any = AutoModelForCausalLM.from_pretrained(out, gguf_file=WRITTEN, dtype=torch.float32)
    merged = in_half(AutoModelForCausalLM.from_pretrained(exported(model, base, "merged", tmp_path / "merged")))
    found = theirs(loaded)
    assert torch.allclose(found, theirs(merged), atol=1e-5 * float(found.abs().max()))
    assert divergence(logits(model), found) < 1e-4
    assert divergence(logits(model), theirs(AutoModelForCausalLM.from_pretrained(base))) > 0.01
    assert loaded.config.eos_token_id == AutoTokenizer.from_pretrained(base).eos_token_id


def test_its_tensors_are_those_of_the_merged_model_as_llama_cpp_has_them(pair: Pair, tmp_path: Path) -> None:
    merged: Any = AutoModelForCausalLM.from_pretrained(exported(pair.model, pair.base, "merged", tmp_path / "merged"))
    wanted = dict(gguf_files.tensors(merged))
    _, found = read(exported(pair.model, pair.base, "merged-gguf", tmp_path / "out") / WRITTEN)
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        assert found[name].dtype == (np.float16 if values.ndim == 2 else np.float32)
        assert np.array_equal(found[name], values.astype(found[name].dtype)), name


def test_what_the_base_said_of_itself_in_a_gguf_file_is_said_again(pair: Pair, tmp_path: Path) -> None:
    """Sizes, vocabulary, special tokens and template, key by key: the base's file was written by the package alone."""
    (before, _), (after, _) = read(pair.path), read(exported(pair.model, pair.base, "merged-gguf", tmp_path / "out") / WRITTEN)
    for name, value in before.items():
        assert after[name] == (pytest.approx(value) if isinstance(value, float) else value), name
    assert after["general.name"] == "default 0002-abc"
    assert (after["general.type"], after["general.file_type"]) == ("model", 1)


@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2"])
def test_added_as_a_base_model_it_is_the_merged_model_again(tmp_path: Path, family: str) -> None:
    base = tiny.save(tmp_path / family, family)
    model = made(base)
    path = exported(model, base, "merged-gguf", tmp_path / "out") / WRITTEN
    again = registry.add(str(path), name="again", model_dir=tmp_path / "models").folder
    assert divergence(logits(model), theirs(AutoModelForCausalLM.from_pretrained(again))) < 1e-4
    tokenizers = [AutoTokenizer.from_pretrained(each) for each in (base, again)]
    given = [each.apply_chat_template(MESSAGES, add_generation_prompt=True) for each in tokenizers]
    assert given[0] == given[1]
    fields, _ = read(path)
    assert {fields[f"tokenizer.ggml.{key}_token_id"] for key in ("eos", "eot")} == model.chat.ends


@pytest.mark.llama_cpp
def test_llama_cpp_gives_the_logits_of_the_model_from_the_one_file(pair: Pair, tmp_path: Path) -> None:
    from llama_cpp import Llama

    out = exported(pair.model, pair.base, "merged-gguf", tmp_path / "out")
    engine = Llama(str(out / WRITTEN), n_ctx=128, n_threads=1, logits_all=True, verbose=False)
    engine.eval(IDS)
    assert divergence(logits(pair.model), torch.from_numpy(np.array(engine.scores[: len(IDS)]))) < 1e-3


def test_the_card_says_how_it_is_run_and_that_an_activated_adapter_acts_everywhere(pair: Pair, tmp_path: Path) -> None:
    model = made(pair.base, activated=False)
    card = (exported(model, pair.base, "merged-gguf", tmp_path / "out") / "README.md").read_text("utf-8")
    assert "llama-server --model model.gguf --jinja" in card
    base = tiny.save(tmp_path / "llama")
    export = task_of(made(base, activated=True).spec).export(made(base).arrays(), PROVENANCE, "merged-gguf", base)
    assert "in a merged model on the prompt too" in export.notes[0]


@pytest.mark.parametrize(
    ("family", "changes", "what"),
    [
        ("llama", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "rope_type = 'linear'"),
        ("llama", {"hidden_act": "gelu"}, "hidden_act = 'gelu'"),
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx = True"),
    ],
)
def test_what_llama_cpp_would_compute_otherwise_is_refused(
    tmp_path: Path, family: str, changes: dict[str, Any], what: str
) -> None:
    base = tiny.save(tmp_path / family, family, **changes)
    model = made(base)
    with pytest.raises(UsageError, match=f"a {family} model with {what} cannot be written"):
        exported(model, base, "merged-gguf", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_that_is_too_large_for_float16_is_refused(tmp_path: Path) -> None:
    base = tiny.save(tmp_path / "llama")
    model = made(base)
    arrays = {name: value * np.float32(1e6 if name.endswith(".B") else 1) for name, value in model.arrays().items()}
    export = task_of(model.spec).export(arrays, PROVENANCE, "merged-gguf", base)
    with pytest.raises(UsageError, match=r"blk\.2\.attn_q\.weight holds values that are not finite in F16"):
        list(export.files[WRITTEN].chunks)  # type: ignore[union-attr]


# --- tokenizers ---


def documents(**changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    made = tiny.tokenizer()
    document: dict[str, Any] = json.loads(made.backend_tokenizer.to_str())
    return document | changes, {"eos_token": {"content": "<|endoftext|>"}, "chat_template": "x"}


def template(*pieces: dict[str, Any]) -> dict[str, Any]:
    return {"type": "TemplateProcessing", "single": list(pieces), "pair": [], "special_tokens": {}}


TEXT = {"Sequence": {"id": "A", "type_id": 0}}


def token(content: str) -> dict[str, Any]:
    return {"SpecialToken": {"id": content, "type_id": 0}}


def test_rows_of_the_embedding_without_a_token_get_one_that_nobody_uses() -> None:
    found = vocabulary(*documents(), 320)
    tokens, kinds = found["tokenizer.ggml.tokens"], found["tokenizer.ggml.token_type"]
    assert len(tokens) == len(kinds) == len(set(tokens)) == 320
    assert {kind for token, kind in zip(tokens, kinds, strict=True) if token.startswith("[PAD")} == {5}
    assert kinds[:4] == [3, 3, 3, 1]
    assert found["tokenizer.ggml.eos_token_id"] == 0


@pytest.mark.parametrize(
    ("processor", "begins"),
    [
        (None, False),
        ({"type": "ByteLevel"}, False),
        (template(TEXT), False),
        (template(token("<s>"), TEXT), True),
        ({"type": "Sequence", "processors": [{"type": "ByteLevel"}, template(token("<s>"), TEXT)]}, True),
    ],
)
def test_whether_a_text_gets_a_beginning_is_said(processor: Any, begins: bool) -> None:
    document, config = documents(post_processor=processor)
    assert vocabulary(document, config | {"bos_token": "<s>"}, 320)["tokenizer.ggml.add_bos_token"] is begins


@pytest.mark.parametrize(
    ("changes", "cause"),
    [
        ({"pre_tokenizer": {"type": "Whitespace"}}, "a way of its own"),
        ({"normalizer": {"type": "Lowercase"}}, "changes texts first"),
        ({"decoder": {"type": "Metaspace"}}, "no byte-level BPE"),
        ({"post_processor": template(token("<|im_start|>"), TEXT)}, "other tokens around a text"),
        ({"post_processor": template(TEXT, token("<|endoftext|>"))}, "other tokens around a text"),
    ],
)
def test_a_tokenizer_that_llama_cpp_would_read_otherwise_is_refused(changes: dict[str, Any], cause: str) -> None:
    with pytest.raises(UsageError, match="cannot be written into a GGUF file") as raised:
        vocabulary(*documents(**changes), 320)
    assert cause in (raised.value.cause or "")


def test_more_tokens_than_the_model_knows_are_refused() -> None:
    with pytest.raises(UsageError, match="cannot be written"):
        vocabulary(*documents(), 100)
