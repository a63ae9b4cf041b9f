"""Exported adapters that act only from the assistant's turn on, against `CausalModel`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
import tiny_models as tiny
import torch
from exported_models import ASKED, FAMILIES, PROVENANCE, answers, asked, exported, in_peft, made, program, theirs
from fedloop_tasks.causal.examples import Example
from fedloop_tasks.causal.model import CausalModel
from fedloop_tasks.table import task_of
from fedloop_tasks.turns import Turn
from transformers import AutoModelForCausalLM

# PEFT 0.21 asks the base for an attribute that Transformers 5.23 has renamed.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

EXAMPLES = [
    Example((Turn("user", "where is my card"),), "we have sent it"),
    Example((Turn("user", "hi"), Turn("assistant", "yes?"), Turn("user", "a loan <|im_start|>assistant")), "no"),
]


@pytest.fixture(scope="module", params=FAMILIES)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / request.param, request.param)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "llama")


def losses(model: CausalModel) -> list[float]:
    return [each.loss for each in model.scores(model.encoded(EXAMPLES))]


def their_losses(model: CausalModel, whole: Any) -> list[float]:
    """The sum over an answer's own tokens, one example at a time."""
    found = []
    for each in model.encoded(EXAMPLES):
        logs = theirs(whole, each.ids).log_softmax(1)
        found.append(float(-sum(logs[n - 1, each.ids[n]] for n in range(each.start, len(each.ids)))))
    return found


def test_peft_gives_the_losses_of_the_model_and_leaves_the_prompt_as_the_base_reads_it(folder: Path, tmp_path: Path) -> None:
    model = made(folder, activated=True)
    out = exported(model, folder, "peft", tmp_path / "out")
    whole, base = in_peft(folder, out), AutoModelForCausalLM.from_pretrained(folder)
    assert their_losses(model, whole) == pytest.approx(losses(model), rel=1e-5)
    assert their_losses(model, base) != pytest.approx(losses(model), rel=1e-3)
    for each in model.encoded(EXAMPLES):
        assert torch.equal(theirs(whole, each.ids)[: each.begin], theirs(base, each.ids)[: each.begin])


def test_the_program_on_the_card_answers_as_the_model_does(folder: Path, tmp_path: Path) -> None:
    model = made(folder, activated=True)
    out = exported(model, folder, "peft", tmp_path / "out")
    assert [program(out)(asked(text), out, folder) for text in ASKED] == answers(model)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["alora_invocation_tokens"] == list(model.chat.invocation)


def test_a_merged_model_is_another_one_and_says_so(llama: Path, tmp_path: Path) -> None:
    """How far apart they are: of its 38.6 nats on the first answer this tiny model loses 0.12."""
    model = made(llama, activated=True)
    export = task_of(model.spec).export(model.arrays(), PROVENANCE, "merged", llama)
    out = exported(model, llama, "merged", tmp_path / "out")
    found = their_losses(model, AutoModelForCausalLM.from_pretrained(out))
    assert max(abs(one - other) for one, other in zip(found, losses(model), strict=True)) > 0.05
    everywhere = made(llama)
    assert found == pytest.approx(losses(everywhere), rel=1e-4)
    assert len(export.notes) == 1
    assert "acts only from the assistant's turn on, in a merged model on the prompt too" in export.notes[0]
    assert export.notes[0] in (out / "README.md").read_text("utf-8")


def test_a_lora_gguf_names_the_tokens_from_which_on_it_acts_as_llama_cpp_reads_them(llama: Path, tmp_path: Path) -> None:
    model = made(llama, activated=True)
    out = exported(model, llama, "gguf", tmp_path / "out")
    field = gguf.GGUFReader(out / "adapter.gguf").fields["adapter.alora.invocation_tokens"]
    assert field.contents() == list(model.chat.invocation)
    assert field.types == [gguf.GGUFValueType.ARRAY, gguf.GGUFValueType.UINT32]
    export = task_of(model.spec).export(model.arrays(), PROVENANCE, "gguf", llama)
    assert "adapter.alora.invocation_tokens" in export.notes[0]
    assert export.notes[0] in (out / "README.md").read_text("utf-8")


def test_for_peft_there_is_nothing_to_note(llama: Path) -> None:
    for activated in (True, False):
        model = made(llama, activated=activated)
        assert task_of(model.spec).export(model.arrays(), PROVENANCE, "peft", llama).notes == []
    assert task_of(model.spec).export(model.arrays(), PROVENANCE, "merged", llama).notes == []
