"""Folders of language models, small and random, as `save_pretrained` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

TEMPLATE: Final = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_INST: Final = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'user' %}[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
_SPECIAL: Final = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
_WORDS: Final = [
    "where is my card",
    "the card is lost",
    "a loan for a house",
    "user",
    "assistant",
    "system",
    "yes, we have sent it",
]
_SIZES: Final[dict[str, Any]] = {
    "vocab_size": 320,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
}
_LLAMA: Final = _SIZES | {"intermediate_size": 48, "num_key_value_heads": 2}
CONFIGS: Final[dict[str, Any]] = {
    "llama": lambda: LlamaConfig(**_LLAMA, tie_word_embeddings=True),
    "mistral": lambda: MistralConfig(**_LLAMA, sliding_window=None),
    "qwen2": lambda: Qwen2Config(**_LLAMA),
    "gpt2": lambda: GPT2Config(vocab_size=320, n_embd=32, n_layer=4, n_head=4, n_positions=128),
}


def tokenizer(template: str | None = TEMPLATE, *, marked: bool = True) -> PreTrainedTokenizerFast:
    """Bytes, and some of their pairs; the template's own tokens are `marked` as special, or are words like others."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=_SPECIAL if marked else _SPECIAL[:1], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_WORDS, trainer)
    if not marked:
        backend.add_tokens(_SPECIAL[1:])
    made = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend,
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=_SPECIAL[1:] if marked else [],
    )
    made.chat_template = template
    return made


def spaces() -> PreTrainedTokenizerFast:
    """As LLaMA 2 and Mistral have one: spaces are letters, and the first text gets one; turns stand in [INST]."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Metaspace(prepend_scheme="first")
    alphabet = list("abcdefghijklmnopqrstuvwxyz[]/<>|?,.INST")
    trainer = trainers.BpeTrainer(
        vocab_size=100, special_tokens=["<unk>", "<s>", "</s>"], initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator(_WORDS, trainer)
    made = PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )
    made.chat_template = _INST
    return made


def save(folder: Path, family: str = "llama", *, template: str | None = TEMPLATE, **changes: Any) -> Path:
    """The folder of a random model of that family; `changes` are its configuration's."""
    config = CONFIGS[family]()
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_config(config)  # type: ignore[no-untyped-call]
    with torch.no_grad():  # as unlike a fresh model as a trained one is: logits that tell tokens apart
        for p in model.parameters():
            p.mul_(4) if p.dim() == 2 else p.add_(torch.randn_like(p) * 0.1)
    model.save_pretrained(folder)
    tokenizer(template).save_pretrained(folder)
    return folder
