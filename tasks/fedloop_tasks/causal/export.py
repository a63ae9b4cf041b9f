"""A release as files that other programs load: an adapter for PEFT or llama.cpp, or the whole model with it multiplied in.

Each way there is a model card, with a program or command that answers as a device does.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fedloop_events.blobs import tensors
from fedloop_events.types import CausalSpec
from peft import LoraConfig, TaskType

from fedloop_tasks import card
from fedloop_tasks.causal import adapted, chat_card, lora_gguf, merged_gguf, merging
from fedloop_tasks.causal.chat import Chat
from fedloop_tasks.causal.chat_card import Base
from fedloop_tasks.causal.model import FILES, check_files
from fedloop_tasks.models import folder as folders
from fedloop_tasks.models import peft_config, registry
from fedloop_tasks.models.sources import CONFIG, GENERATION, HuggingFace
from fedloop_tasks.task import Arrays, Export, Provenance, Streamed

_MERGED: Final = (
    "on a device the adapter acts only from the assistant's turn on, in a merged model on the prompt too: it answers otherwise; "
    "exported as peft it does not"
)
_NOTES: Final = {
    "merged": _MERGED,
    "merged-gguf": _MERGED,
    "gguf": "on a device the adapter acts only from the assistant's turn on; llama.cpp's server lets it act from one token "
    "earlier on, and a program that does not read adapter.alora.invocation_tokens on the whole prompt, so it answers otherwise",
}
"""What becomes of an activated adapter."""
_PATTERNS: Final = {"gpt2": "h"}
"""What PEFT finds a layer's number by, where it is not `layers`."""


def _base(spec: CausalSpec, model_dir: Path | None) -> Base:
    """Raises `ModelError` for one that is not there, or is another one."""
    folder = folders.locate(spec.base_model, model_dir)
    check_files(folder, spec)
    _, tokenizer = folders.described(folder)
    chat = Chat(tokenizer)
    return Base(
        folder,
        adapted.config_of(folder),
        registry.read(folder).manifest.licence if (folder / registry.MANIFEST).is_file() else "",
        sorted(chat.ends),
        tokenizer.chat_template is not None,
        list(chat.invocation) if spec.activated else [],
    )


def files(spec: CausalSpec, arrays: Arrays, provenance: Provenance, form: str, model_dir: Path | None) -> Export:
    """The release in the format `form`.

    Raises `TensorError` for tensors that are no release of the model, `ModelError` for a base that is not there or another one,
    `UsageError` for one that cannot be written so.
    """
    base = _base(spec, model_dir)
    pairs = adapted.pairs(spec, base.config, arrays)
    made: dict[str, bytes | Streamed]
    match form:
        case "peft":
            made = _peft(spec, base, pairs)
        case "merged":
            made = _merged(spec, base, pairs)
        case "merged-gguf":
            made = _merged_gguf(spec, base, pairs, f"{provenance.model} {provenance.release}")
        case _:
            made = _gguf(spec, base, pairs, f"{provenance.model} {provenance.release}")
    notes = [_NOTES[form]] if base.invocation and form in _NOTES else []
    text = chat_card.written(form, spec, base, provenance, notes)
    return Export({**made, card.NAME: text.encode()}, notes)


def _peft(spec: CausalSpec, base: Base, pairs: list[adapted.Pair]) -> dict[str, bytes | Streamed]:
    model_type = base.config["model_type"]
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # PEFT divides by the rank: any number does
        lora_dropout=0.0,
        bias="none",
        target_modules=list(spec.targets),
        layers_to_transform=sorted({each.layer for each in pairs}),
        layers_pattern=_PATTERNS.get(model_type, "layers"),
        fan_in_fan_out=model_type == "gpt2",  # its Conv1D holds [in, out]
        **peft_config.patterns({each.module: each.rank for each in pairs}, spec.rank, spec.alpha),
        alora_invocation_tokens=base.invocation or None,
        task_type=TaskType.CAUSAL_LM,
    )
    factors = {
        f"base_model.model.{each.module}.lora_{factor}.weight": values
        for each in pairs
        for factor, values in (("A", each.a), ("B", each.b))
    }
    return {
        "adapter_config.json": card.as_json(peft_config.written(config, spec.base_model, TaskType.CAUSAL_LM)),
        peft_config.ADAPTER: b"".join(map(bytes, tensors.encode(factors, {"format": "pt"}))),
    }


def _merged(spec: CausalSpec, base: Base, pairs: list[adapted.Pair]) -> dict[str, bytes | Streamed]:
    """Tokenizer and template are the base's own files, byte for byte."""
    source = HuggingFace(base.folder)
    return {
        CONFIG: card.as_json(source.config | {"dtype": "float32"}),
        GENERATION: card.as_json(source.generation | {"eos_token_id": base.ends[0] if len(base.ends) == 1 else base.ends}),
        **{name: (base.folder / name).read_bytes() for name in spec.files if name not in FILES[:2]},
        folders.WEIGHTS: merging.merged(source, pairs, spec.alpha / spec.rank),
    }


def _merged_gguf(spec: CausalSpec, base: Base, pairs: list[adapted.Pair], name: str) -> dict[str, bytes | Streamed]:
    about = {"name": name} | ({"license": base.licence} if base.licence else {})
    file = merged_gguf.merged(
        HuggingFace(base.folder), folders.config(base.folder), pairs, spec.alpha / spec.rank, ends=base.ends, about=about
    )
    return {chat_card.MERGED_GGUF: file}


def _gguf(spec: CausalSpec, base: Base, pairs: list[adapted.Pair], name: str) -> dict[str, bytes | Streamed]:
    return {
        chat_card.GGUF: lora_gguf.adapter(
            pairs,
            model_type=base.config["model_type"],
            alpha=spec.alpha,
            rank=spec.rank,
            name=name,
            base_model=spec.base_model,
            invocation=base.invocation,
        )
    }
