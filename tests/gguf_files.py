"""Small language models as GGUF files, written from Hugging Face's own models as llama.cpp's converter lays them out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import gguf
import numpy as np
import torch
from fedloop_tasks.models.tokenizer import byte_alphabet
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

ALPHABET: Final = byte_alphabet()
SPECIAL: Final = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
MERGES: Final = ("h e", "l l", "he ll", "hell o", "Ġ w", "o r", "Ġw or", "1 2", "Ġ Ġ", "ĠĠ Ġ", "Ã ¼", "Ċ Ċ", "' s")
TOKENS: Final = (*SPECIAL, *ALPHABET.values(), *(merge.replace(" ", "") for merge in MERGES), "<tool>", "spare")
CONTROL, USER_DEFINED, NORMAL = 3, 4, 1
TEMPLATE: Final = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
_LLAMA: Final = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    **{f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"},
    "self_attn.o_proj": "attn_output",
    **{f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")},
}
_GPT2: Final = {
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}
WIDE, INNER, HEADS, KEYS, LAYERS, CONTEXT = 64, 96, 4, 2, 2, 128


def small(family: str, *, tied: bool = True, seed: int = 3, **changes: Any) -> Any:
    """A small model of that family with random weights, biases and norms included."""
    torch.manual_seed(seed)
    rotary: dict[str, Any] = {
        "hidden_size": WIDE,
        "intermediate_size": INNER,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEYS,
        "max_position_embeddings": CONTEXT,
        "vocab_size": len(TOKENS),
        "rope_theta": 5_000.0,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": tied,
        **changes,
    }
    if family == "gpt2":
        model: Any = GPT2LMHeadModel(
            GPT2Config(n_embd=WIDE, n_layer=LAYERS, n_head=HEADS, n_positions=CONTEXT, vocab_size=len(TOKENS), n_inner=INNER)
        )
    elif family == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**rotary))
    else:
        model = LlamaForCausalLM(LlamaConfig(**rotary))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2 + (parameter.ndim == 1) * 0.5)
    return model.eval()


def tensors(model: Any) -> Iterator[tuple[str, np.ndarray[Any, Any]]]:
    """The model's tensors by their names in a GGUF file, as they lie there."""
    config = model.config
    for name, value in model.state_dict().items():
        array = value.detach().numpy()
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        yield _gguf_name(name), _laid(name, array, config)


def _gguf_name(name: str) -> str:
    stem, _, suffix = name.rpartition(".")
    if stem.startswith("model.layers."):
        _, _, number, inside = stem.split(".", 3)
        return f"blk.{number}.{_LLAMA[inside]}.{suffix}"
    if stem.startswith("transformer.h."):
        _, _, number, inside = stem.split(".", 3)
        return f"blk.{number}.{_GPT2[inside]}.{suffix}"
    return f"{(_LLAMA | _GPT2)[stem]}.{suffix}"


def _laid(name: str, array: np.ndarray[Any, Any], config: Any) -> np.ndarray[Any, Any]:
    if config.model_type == "gpt2":
        return np.ascontiguousarray(array.T) if ".c_" in name and array.ndim == 2 else array
    if config.model_type == "llama" and (".q_proj." in name or ".k_proj." in name):  # as convert_hf_to_gguf.py permutes
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        halves = array.reshape(heads, 2, array.shape[0] // heads // 2, *array.shape[1:])
        return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(array.shape))
    return array


def write(
    path: Path,
    model: Any,
    *,
    quantisation: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
    metadata: Mapping[str, Any] = {},
    extra: Mapping[str, np.ndarray[Any, Any]] = {},
    without: Sequence[str] = (),
    tokens: Sequence[str] = TOKENS,
    pre: str = "gpt-2",
) -> Path:
    """Write the model as a GGUF file, its matrices quantised so. `metadata` replaces a key; None leaves it out."""
    config = model.config
    family = config.model_type
    writer = gguf.GGUFWriter(path, family)
    size = {"block_count": LAYERS, "context_length": CONTEXT, "embedding_length": WIDE, "feed_forward_length": INNER}
    values: dict[str, Any] = {f"{family}.{key}": value for key, value in size.items()}
    values[f"{family}.attention.head_count"] = HEADS
    if family == "gpt2":
        values["gpt2.attention.layer_norm_epsilon"] = 1e-5
    else:
        values |= {
            f"{family}.attention.head_count_kv": KEYS,
            f"{family}.attention.layer_norm_rms_epsilon": 1e-5,
            f"{family}.rope.freq_base": 5_000.0,
            f"{family}.rope.dimension_count": WIDE // HEADS,
        }
    values |= {
        "general.license": "apache-2.0",
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": list(tokens),
        "tokenizer.ggml.token_type": [kind(token) for token in tokens],
        "tokenizer.ggml.merges": list(MERGES),
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": TEMPLATE,
        **metadata,
    }
    for key, value in values.items():
        if value is not None:
            _put(writer, key, value)
    for name, array in {**dict(tensors(model)), **extra}.items():
        if name in without:
            continue
        kind_of = quantisation if array.ndim == 2 else gguf.GGMLQuantizationType.F32
        writer.add_tensor(name, gguf.quants.quantize(array, kind_of), raw_dtype=kind_of)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def kind(token: str) -> int:
    return CONTROL if token in SPECIAL else USER_DEFINED if token == "<tool>" else NORMAL


def _put(writer: gguf.GGUFWriter, key: str, value: Any) -> None:
    match value:
        case bool():
            writer.add_bool(key, value)
        case int():
            writer.add_uint32(key, value)
        case float():
            writer.add_float32(key, value)
        case str():
            writer.add_string(key, value)
        case _:
            writer.add_array(key, value)
