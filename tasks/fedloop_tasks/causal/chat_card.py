"""The model card of a language model's release, with a program or a command that answers as a device does."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

from fedloop_events.types import CausalSpec

from fedloop_tasks import card
from fedloop_tasks.models import folder as folders
from fedloop_tasks.task import Provenance

GGUF: Final = "adapter.gguf"
"""The adapter's file in the format gguf."""
MERGED_GGUF: Final = "model.gguf"
"""The whole model's file in the format merged-gguf."""
_LIBRARIES: Final = {"peft": "peft", "merged": "transformers", "merged-gguf": "llama.cpp", "gguf": "llama.cpp"}
_LOADED: Final = {
    "peft": "PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), folder)",
    "merged": "AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)",
}
_WHAT: Final = {
    "peft": "A LoRA adapter for PEFT on the last layers ({layers}) of `{base}`.",
    "merged": "The whole language model `{base}`, a LoRA adapter on its last layers ({layers}) multiplied into its weights; "
    "float32, in which devices compute.",
    "merged-gguf": "The whole language model `{base}`, a LoRA adapter on its last layers ({layers}) multiplied into its weights, "
    "for llama.cpp; matrices in float16.",
    "gguf": "A LoRA adapter for llama.cpp on the last layers ({layers}) of `{base}`.",
}
_PROGRAM: Final = """\
import torch
{peft}from transformers import AutoModelForCausalLM, AutoTokenizer


def answer(messages, folder{argument}):
    tokenizer = AutoTokenizer.from_pretrained({tokenizer})
    model = {loaded}.eval()
    prompt = {prompt}
    written = model.generate(**prompt, max_new_tokens={most}, do_sample=False, eos_token_id={ends})
    return tokenizer.decode(written[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
"""
_TEMPLATE: Final = 'tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)'
_LINES: Final = (
    'tokenizer((tokenizer.bos_token or "") + "".join(message["content"] + "\\n" for message in messages), '
    'add_special_tokens=False, return_tensors="pt")'
)


class Base(NamedTuple):
    """The base model on this machine, and what exported files repeat of it."""

    folder: Path
    config: dict[str, Any]
    licence: str
    """As the model's source named it; "" if that is not known."""
    ends: list[int]
    """The tokens that end an answer."""
    templated: bool
    """Whether it has a chat template."""
    invocation: list[int]
    """The tokens from which on the adapter acts; none if it acts everywhere."""


def written(form: str, spec: CausalSpec, base: Base, provenance: Provenance, notes: Sequence[str]) -> str:
    """The card of a release in the format `form`."""
    about = [
        _WHAT[form].format(layers=spec.layers, base=spec.base_model),
        "It was trained on its users' devices from their feedback, on masked text: mask in the same way what you ask it.",
        *(f"Note: {each}." for each in notes),
        "",
        *(_command(form, spec) if form.endswith("gguf") else _program(form, spec, base)),
        "",
        "## Base model",
        "",
        f"`{spec.base_model}`, licence: {base.licence or 'not known here'}. Its files by SHA-256:",
        "",
        *(f"- `{name}`: `{each}`" for name, each in spec.files.items()),
    ]
    return card.written(card.front(_LIBRARIES[form], "text-generation", spec.base_model, base.licence), provenance, about)


def _program(form: str, spec: CausalSpec, base: Base) -> list[str]:
    beside = form == "peft"
    program = _PROGRAM.format(
        peft="from peft import PeftModel\n" if beside else "",
        argument=", base" if beside else "",
        tokenizer="base" if beside else "folder",
        loaded=_LOADED[form],
        prompt=_TEMPLATE if base.templated else _LINES,
        most=spec.max_answer_tokens,
        ends=base.ends,
    )
    where = "`folder` is this one, `base` the base model's" if beside else "`folder` is this one"
    return [
        f"`answer(messages, folder{', base' if beside else ''})` gives the answer to messages as "
        f'`[{{"role": "user", "content": "..."}}]`; {where}.',
        "",
        "```python",
        f"{program}```",
    ]


def _command(form: str, spec: CausalSpec) -> list[str]:
    limits = f"--predict {spec.max_answer_tokens} --temp 0"
    if form == "gguf":
        same = f"converted from the same `{folders.WEIGHTS}` in any quantisation"
        about = f"`{GGUF}` belongs to a GGUF file of that base model, {same}:"
        command = f"llama-server --model BASE.gguf --lora {GGUF} {limits}"
    else:
        about = f"`{MERGED_GGUF}` needs nothing beside it; in Ollama it is what `FROM` names in a Modelfile:"
        command = f"llama-server --model {MERGED_GGUF} --jinja {limits}"
    return [about, "", "```sh", command, "```"]
