"""The whole model with a release multiplied in as one GGUF file, as llama.cpp's `convert_hf_to_gguf.py` lays one out.

Matrices are in float16, in which llama.cpp keeps a model that is not quantised, all else in float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any, Final

import msgspec
import numpy as np
from fedloop_events.blobs.tensors import Array
from fedloop_events.errors import UsageError

from fedloop_tasks.causal.adapted import Pair
from fedloop_tasks.causal.decoder import context
from fedloop_tasks.causal.lora_gguf import ARCHITECTURES
from fedloop_tasks.causal.merging import reading
from fedloop_tasks.models.families import Part
from fedloop_tasks.models.gguf_written import Laid, streamed, writer
from fedloop_tasks.models.sources import HuggingFace
from fedloop_tasks.models.tokenizer import TOKENIZER, TOKENIZER_CONFIG
from fedloop_tasks.models.vocabulary import vocabulary
from fedloop_tasks.models.weights import Read
from fedloop_tasks.task import Streamed

_F16: Final = 1
"""llama.cpp's name for files whose matrices are mostly in float16."""
_VALUES: Final[Mapping[str, tuple[Any, ...]]] = {
    "hidden_act": ("silu",),
    "activation_function": ("gelu_new",),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
}
"""Settings that llama.cpp takes for granted, where a configuration has them."""


def merged(
    source: HuggingFace, config: Any, pairs: Sequence[Pair], scale: float, *, ends: Sequence[int], about: Mapping[str, str]
) -> Streamed:
    """The file of W + `scale` B A with tokenizer and chat template. `config` is Transformers' own, `ends` are the tokens that end
    an answer, `about` its general metadata.

    Raises UsageError for a model or tokenizer that llama.cpp would read otherwise.
    """
    _check(config)
    header = writer(ARCHITECTURES[config.model_type])
    import gguf

    header.add_type(gguf.GGUFType.MODEL)
    header.add_file_type(_F16)
    header.add_quantization_version(gguf.GGML_QUANT_VERSION)
    for key, value in about.items():
        header.add_string(f"general.{key}", value)
    _add_sizes(header, config)
    document, settings = (msgspec.json.decode(source.files[name]) for name in (TOKENIZER, TOKENIZER_CONFIG))
    keys = vocabulary(document, settings, config.vocab_size)
    for key, value in (keys | _ends(keys.get("tokenizer.ggml.eos_token_id"), ends)).items():
        _add(header, key, value)
    read = reading(source, pairs, scale)
    return streamed(header, [_laid(part, read) for part in source.parts])


def _check(config: Any) -> None:
    rotary = getattr(config, "rope_parameters", None) or {}
    kind = rotary.get("rope_type", "default")
    found = [f"rope_type = {kind!r}"] if kind != "default" or rotary.get("partial_rotary_factor", 1) != 1 else []
    found += [
        f"{key} = {getattr(config, key)!r}" for key, known in _VALUES.items() if getattr(config, key, known[0]) not in known
    ]
    if config.model_type not in ARCHITECTURES or found:
        raise UsageError(
            f"a {config.model_type} model{' with ' + found[0] if found else ''} cannot be written as a whole GGUF file",
            hint="export it as merged, and convert that folder with llama.cpp's convert_hf_to_gguf.py",
        )


def _add_sizes(header: Any, config: Any) -> None:
    """`context` is the least of what a model looks back over, so that llama.cpp never needs the window."""
    wide, heads = config.hidden_size, config.num_attention_heads
    header.add_context_length(context(config))
    header.add_embedding_length(wide)
    header.add_block_count(config.num_hidden_layers)
    header.add_head_count(heads)
    if config.model_type == "gpt2":
        header.add_feed_forward_length(config.n_inner or 4 * wide)
        header.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    head = getattr(config, "head_dim", None) or wide // heads
    header.add_feed_forward_length(config.intermediate_size)
    header.add_head_count_kv(getattr(config, "num_key_value_heads", None) or heads)
    header.add_layer_norm_rms_eps(config.rms_norm_eps)
    header.add_rope_freq_base(config.rope_parameters["rope_theta"])
    header.add_rope_dimension_count(head)
    header.add_key_length(head)
    header.add_value_length(head)
    header.add_vocab_size(config.vocab_size)


def _ends(eos: int | None, ends: Sequence[int]) -> dict[str, int]:
    """An answer may end with the text's end or the turn's: llama.cpp has a key for each."""
    other = [each for each in ends if each != eos]
    if eos is None:
        return {"tokenizer.ggml.eos_token_id": other[0]}
    return {"tokenizer.ggml.eot_token_id": other[0]} if other else {}


def _add(header: Any, key: str, value: Any) -> None:
    match value:
        case bool():
            header.add_bool(key, value)
        case int():
            header.add_uint32(key, value)
        case str():
            header.add_string(key, value)
        case _:
            header.add_array(key, value)


def _laid(part: Part, read: Read) -> Laid:
    return Laid(part.gguf, part.gguf_shape, "F16" if len(part.shape) == 2 else "F32", partial(_values, part, read))


def _values(part: Part, read: Read) -> Iterable[Array]:
    """As they lie in a GGUF file: some rows at a time, but of a matrix that is laid out otherwise all."""
    if part.laid == "alike":
        return read(part)
    whole = np.concatenate([*read(part)])
    return [whole.T if part.laid == "transposed" else part.outputs_laid(whole)]
