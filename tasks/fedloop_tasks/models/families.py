"""The families of models: which tensors a configuration needs, in which shapes, and what they are called in a GGUF file."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Annotated, Any, Final, Literal, Protocol

import msgspec
from fedloop_events.blobs.tensors import Array
from fedloop_events.errors import UsageError
from msgspec import Meta, Struct

from fedloop_tasks.models.gguf_file import GgufFile

_Size = Annotated[int, Meta(ge=1, le=2**24)]
_Layers = Annotated[int, Meta(ge=1, le=1_024)]


class Part(Struct, frozen=True):
    """A tensor of a model: its name and shape in Hugging Face's layout, and its name in a GGUF file.

    There it is `laid` out otherwise in two cases: GPT-2's matrices are transposed, and LLaMA's queries and keys have the two
    halves of each of `heads` interleaved (llama.cpp's rotary embedding turns neighbours, Hugging Face's turns halves).
    """

    name: str
    shape: tuple[int, ...]
    gguf: str
    laid: Literal["alike", "transposed", "interleaved"] = "alike"
    heads: int = 1

    @property
    def gguf_shape(self) -> tuple[int, ...]:
        return self.shape[::-1] if self.laid == "transposed" else self.shape

    def restored(self, values: Array) -> Array:
        """The values as Hugging Face lays them out, of those in a GGUF file."""
        match self.laid:
            case "transposed":
                return values.T
            case "interleaved":
                pairs = values.reshape(self.heads, -1, 2, *values.shape[1:])
                return pairs.swapaxes(1, 2).reshape(values.shape)
            case _:
                return values

    def outputs_laid(self, values: Array) -> Array:
        """Rows, one for each output of the matrix, in the order in which a GGUF file has its outputs."""
        if self.laid != "interleaved":
            return values
        halves = values.reshape(self.heads, 2, -1, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)


class Family(Protocol):
    """A configuration of one family. `parts` are all tensors of the model, in the order in which they are written."""

    def parts(self) -> Iterator[Part]: ...


class Llama(Struct, frozen=True):
    """LLaMA, Mistral and Qwen 2: pre-norm, rotary positions, grouped queries, a gated feed-forward layer."""

    model_type: Literal["llama", "mistral", "qwen2"]
    hidden_size: _Size
    intermediate_size: _Size
    num_hidden_layers: _Layers
    num_attention_heads: _Size
    vocab_size: _Size
    num_key_value_heads: _Size | None = None
    head_dim: _Size | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False

    def parts(self) -> Iterator[Part]:
        keys = self.num_key_value_heads or self.num_attention_heads
        head = self.head_dim or self.hidden_size // self.num_attention_heads
        if self.num_attention_heads % keys or head < 2 or head % 2:
            raise UsageError(f"a model with {self.num_attention_heads} heads of width {head} over {keys} cannot be")
        wide = self.hidden_size
        yield Part("model.embed_tokens.weight", (self.vocab_size, wide), "token_embd.weight")
        for n in range(self.num_hidden_layers):
            layer, block = f"model.layers.{n}", f"blk.{n}"
            yield Part(f"{layer}.input_layernorm.weight", (wide,), f"{block}.attn_norm.weight")
            for name, heads, turned in (("q", self.num_attention_heads, True), ("k", keys, True), ("v", keys, False)):
                laid: Literal["alike", "interleaved"] = "interleaved" if turned and self.model_type != "qwen2" else "alike"
                at, gguf = f"{layer}.self_attn.{name}_proj", f"{block}.attn_{name}"
                yield Part(f"{at}.weight", (heads * head, wide), f"{gguf}.weight", laid, heads)
                if self.attention_bias or self.model_type == "qwen2":
                    yield Part(f"{at}.bias", (heads * head,), f"{gguf}.bias", laid, heads)
            yield Part(f"{layer}.self_attn.o_proj.weight", (wide, self.num_attention_heads * head), f"{block}.attn_output.weight")
            if self.attention_bias and self.model_type != "qwen2":
                yield Part(f"{layer}.self_attn.o_proj.bias", (wide,), f"{block}.attn_output.bias")
            yield Part(f"{layer}.post_attention_layernorm.weight", (wide,), f"{block}.ffn_norm.weight")
            for name in ("gate", "up", "down"):
                out, into = (wide, self.intermediate_size) if name == "down" else (self.intermediate_size, wide)
                yield Part(f"{layer}.mlp.{name}_proj.weight", (out, into), f"{block}.ffn_{name}.weight")
                if self.mlp_bias:
                    yield Part(f"{layer}.mlp.{name}_proj.bias", (out,), f"{block}.ffn_{name}.bias")
        yield Part("model.norm.weight", (wide,), "output_norm.weight")
        if not self.tie_word_embeddings:
            yield Part("lm_head.weight", (self.vocab_size, wide), "output.weight")


class Gpt2(Struct, frozen=True):
    """GPT-2: learned positions, biases everywhere, and matrices that are stored transposed."""

    model_type: Literal["gpt2"]
    n_embd: _Size
    n_layer: _Layers
    n_head: _Size
    n_positions: _Size
    vocab_size: _Size
    n_inner: _Size | None = None
    tie_word_embeddings: bool = True

    def parts(self) -> Iterator[Part]:
        wide, inner = self.n_embd, self.n_inner or 4 * self.n_embd
        if wide % self.n_head:
            raise UsageError(f"a model of width {wide} cannot have {self.n_head} heads")
        yield Part("transformer.wte.weight", (self.vocab_size, wide), "token_embd.weight")
        yield Part("transformer.wpe.weight", (self.n_positions, wide), "position_embd.weight")
        for n in range(self.n_layer):
            layer, block = f"transformer.h.{n}", f"blk.{n}"
            for norm, inside in (("ln_1", ("attn.c_attn", "attn.c_proj")), ("ln_2", ("mlp.c_fc", "mlp.c_proj"))):
                gguf = _GPT2[norm]
                yield from _with_bias(f"{layer}.{norm}", (wide,), f"{block}.{gguf}")
                for name in inside:
                    shape = {"attn.c_attn": (wide, 3 * wide), "mlp.c_fc": (wide, inner), "mlp.c_proj": (inner, wide)}
                    yield from _with_bias(f"{layer}.{name}", shape.get(name, (wide, wide)), f"{block}.{_GPT2[name]}")
        yield from _with_bias("transformer.ln_f", (wide,), "output_norm")
        if not self.tie_word_embeddings:
            yield Part("lm_head.weight", (self.vocab_size, wide), "output.weight")


_GPT2: Final = {
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
}


def _with_bias(name: str, shape: tuple[int, ...], gguf: str) -> Iterator[Part]:
    yield Part(f"{name}.weight", shape, f"{gguf}.weight", "transposed" if len(shape) == 2 else "alike")
    yield Part(f"{name}.bias", shape[-1:], f"{gguf}.bias")


FAMILIES: Final[Mapping[str, tuple[type[Family], str]]] = {
    "gpt2": (Gpt2, "GPT2LMHeadModel"),
    "llama": (Llama, "LlamaForCausalLM"),
    "mistral": (Llama, "MistralForCausalLM"),
    "qwen2": (Llama, "Qwen2ForCausalLM"),
}
"""By `model_type`: what checks a configuration, and the class that Hugging Face loads it into."""


def family_of(config: Mapping[str, Any]) -> Family:
    """Raises UsageError for a family that cannot be trained, or a configuration that is not of its family."""
    found = FAMILIES.get(str(config.get("model_type")))
    if found is None:
        raise UsageError(
            f"a model of the family {config.get('model_type')!r} cannot be used", hint=f"take one of {', '.join(FAMILIES)}"
        )
    try:
        return msgspec.convert(config, found[0])
    except msgspec.ValidationError as error:
        raise UsageError("the model's configuration cannot be used", cause=str(error)) from None


def config_of(file: GgufFile) -> dict[str, Any]:
    """`config.json` of a GGUF file. Raises UsageError for a family, or a variant of one, that is not known."""
    family = file.get("general.architecture", str)
    if family not in ("llama", "qwen2", "gpt2"):
        raise UsageError(
            f"{file.path} is of the architecture {family[:40]!r}, which cannot be used", hint="take one of llama, qwen2 and gpt2"
        )
    if file.metadata.get("split.count", 1) not in (0, 1):
        raise UsageError(
            f"{file.path} is one of {file.metadata['split.count']!r:.20} parts", hint="put them together into one file"
        )
    for key, plain in ((f"{family}.expert_count", 0), (f"{family}.rope.scaling.type", "none")):
        if file.metadata.get(key, plain) != plain:
            raise UsageError(f"{file.path} has {key} = {file.metadata[key]!r:.40}, which cannot be used")

    def size(key: str, default: int | None = None) -> int:
        return int(file.get(f"{family}.{key}", int, default))

    embedding = file.tensors.get("token_embd.weight")
    if embedding is None:
        raise UsageError(f"{file.path} cannot be read as a model", cause="it has no token_embd.weight")
    shared = {
        "architectures": [FAMILIES[family][1]],
        "model_type": family,
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "vocab_size": embedding.shape[0],
    }
    if family == "gpt2":
        return shared | {
            "activation_function": "gelu_new",
            "layer_norm_epsilon": file.get("gpt2.attention.layer_norm_epsilon", float),
            "n_embd": size("embedding_length"),
            "n_head": size("attention.head_count"),
            "n_inner": size("feed_forward_length", 4 * size("embedding_length")),
            "n_layer": size("block_count"),
            "n_positions": size("context_length"),
        }
    heads, wide = size("attention.head_count"), size("embedding_length")
    head = size("attention.key_length", wide // max(heads, 1))
    if size("rope.dimension_count", head) != head or size("attention.value_length", head) != head:
        raise UsageError(f"{file.path} cannot be used", cause="its positions turn a part of each head alone")
    bias = {"attention_bias": "blk.0.attn_q.bias" in file.tensors, "mlp_bias": "blk.0.ffn_up.bias" in file.tensors}
    return shared | {
        **(bias if family == "llama" else {}),
        "head_dim": head,
        "hidden_act": "silu",
        "hidden_size": wide,
        "intermediate_size": size("feed_forward_length"),
        "max_position_embeddings": size("context_length"),
        "num_attention_heads": heads,
        "num_hidden_layers": size("block_count"),
        "num_key_value_heads": size("attention.head_count_kv", heads),
        "rms_norm_eps": file.get(f"{family}.attention.layer_norm_rms_epsilon", float),
        "rope_theta": file.get(f"{family}.rope.freq_base", float, 10_000.0),
    }
