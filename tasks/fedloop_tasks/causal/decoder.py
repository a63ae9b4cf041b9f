"""The frozen decoder below a model, split for LoRA: what lies below the adapted layers, and those with the head.

Here stands how Transformers (5.23) lays a decoder out, and what PEFT (0.21) makes of it. Rows are padded on the right: under a
causal mask no token sees what stands after it. A mask is built only for tokens whose forerunners' keys and values are kept.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from fedloop_events.types import CausalSpec
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Cache, DynamicCache
from transformers.pytorch_utils import Conv1D

from fedloop_tasks.models import folder as folders
from fedloop_tasks.models.lora import turned_off
from fedloop_tasks.precision import Held
from fedloop_tasks.task import ModelError

_NO_DROPOUT: Final = {"attention_dropout": 0.0, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
"""Attention keeps its dropout as a number, not as a module that is turned off for DP-SGD."""


_NF4: Final[dict[str, Any]] = {
    "load_in_4bit": True,
    "bnb_4bit_quant_type": "nf4",
    "bnb_4bit_compute_dtype": torch.float32,
    "bnb_4bit_use_double_quant": False,
}
_PACKS: Final = "support_avx512bf16_for_cpu"
"""bitsandbytes (0.50) packs a layer's weights anew at its first pass without gradients, and gradients through them are wrong or
fail from then on."""


class _Family(NamedTuple):
    """Where the parts of a decoder stand, and what is adapted unless a spec says otherwise."""

    layers: str
    norm: str
    targets: tuple[str, ...]


_LLAMA: Final = _Family(
    "model.layers", "model.norm", ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
)
_GPT2: Final = _Family("transformer.h", "transformer.ln_f", ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"))
FAMILIES: Final = {"llama": _LLAMA, "mistral": _LLAMA, "qwen2": _LLAMA, "gpt2": _GPT2}
"""By `model_type` of the configuration."""


class Prompts(NamedTuple):
    """What adapted layers have of the tokens on which no adapter acts, in the type of the base's states."""

    kept: Tensor
    """Keys and values of the frozen model, [layers, 2, B, heads, P, size], padded on the right."""
    lengths: Tensor
    """How many of the P are each row's: [B], the longest one P."""


class Layers(nn.Module):
    """Layers of a decoder from its layer `first` on; `rotary` is its position embedding where that acts in the layers."""

    def __init__(self, layers: nn.ModuleList, rotary: nn.Module | None, first: int) -> None:
        super().__init__()
        self.layers, self.rotary, self.first = layers, rotary, first

    def run(self, states: Tensor, cache: Cache | None = None, before: Tensor | None = None) -> Tensor:
        """States [B, T, d] of tokens, those padded among them worth nothing; `cache` gets their keys and values.

        It has those of each row's `before` [B] (without it, no) tokens before them, padded on the right to the longest.
        """
        new = torch.arange(states.shape[1], device=states.device)
        positions = new[None] if before is None else before[:, None] + new
        rotated = {} if self.rotary is None else {"position_embeddings": self.rotary(states, position_ids=positions)}
        mask = None if before is None else _mask(states, before)
        for layer in self.layers:
            output = layer(states, attention_mask=mask, past_key_values=cache, use_cache=cache is not None, **rotated)
            states = output[0] if isinstance(output, tuple) else output
        return states


def _mask(states: Tensor, before: Tensor) -> Tensor | None:
    """What is added to attention, [B, 1, T, P + T]: a token sees its row's `before` tokens, those before it, and itself."""
    (rows, size, _), width = states.shape, int(before.max())
    if rows == size == 1 or width == 0:
        return None
    new = torch.arange(size, device=states.device)
    old = torch.arange(width, device=states.device) < before[:, None]
    seen = torch.cat([old[:, None].expand(rows, size, width), (new[:, None] >= new).expand(rows, size, size)], dim=2)
    return torch.zeros_like(seen, dtype=states.dtype).masked_fill_(~seen, -torch.inf)[:, None]


class Trunk(Layers):
    """What never changes: the embedding, and the layers below the adapted ones."""

    def __init__(self, layers: nn.ModuleList, rotary: nn.Module | None, tokens: nn.Module, positions: nn.Module | None) -> None:
        super().__init__(layers, rotary, 0)
        self.tokens, self.positions = tokens, positions

    def forward(self, ids: Tensor, cache: Cache | None = None, start: int = 0) -> Tensor:
        """States [B, T, d] of the tokens `ids` [B, T] at `start` and after; keys and values of those before are in `cache`."""
        states: Tensor = self.tokens(ids)
        if self.positions is not None:
            states = states + self.positions(torch.arange(start, start + ids.shape[1], device=ids.device))[None]
        return self.run(states, cache, torch.full((len(ids),), start, device=ids.device) if start else None)


class Tail(Layers):
    """What can be trained, and what lies above: the adapted layers, the norm and the head."""

    def __init__(self, layers: nn.ModuleList, rotary: nn.Module | None, first: int, norm: nn.Module, head: nn.Module) -> None:
        super().__init__(layers, rotary, first)
        self.norm, self.head = norm, head

    def forward(self, states: Tensor, rows: Tensor, columns: Tensor, prompts: Prompts | None = None) -> Tensor:
        """Logits [n, V] of the token that follows the one at each of `rows` and `columns` [n]: see `read`."""
        logits: Tensor = self.head(self.read(states, rows, columns, prompts))
        return logits

    def read(self, states: Tensor, rows: Tensor, columns: Tensor, prompts: Prompts | None = None) -> Tensor:
        """What the head gets at each of `rows` and `columns` [n]: [n, d].

        States [B, T, d] are of the tokens on which the adapters act; those before them are `prompts`.
        """
        cache, before = None, None
        if prompts is not None:
            cache, before = DynamicCache(), prompts.lengths
            for layer, (keys, values) in enumerate(prompts.kept, start=self.first):
                cache.update(keys, values, layer)
        found: Tensor = self.norm(self.run(states, cache, before)[rows, columns])
        return found

    def keys_and_values(self, states: Tensor) -> Tensor:
        """[layers, 2, B, heads, T, size] of tokens on which no adapter acts."""
        cache = DynamicCache()
        with self.frozen():
            self.run(states, cache)
        layers: list[Any] = cache.layers[self.first :]
        return torch.stack([torch.stack((each.keys, each.values)) for each in layers])

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No adapter acts, and no gradient is recorded."""
        with turned_off(self), torch.no_grad():
            yield


def load(folder: Path, held: Held = "f32", device: torch.device | None = None) -> tuple[Any, Any]:
    """Tokenizer and decoder, see `models.folder.load`; in 4 bits its layers come to the `device`, else it is on the CPU. Raises
    ModelError also for a family that cannot be adapted."""
    dtype = torch.bfloat16 if held == "bf16" else torch.float32
    quantised = None if held != "nf4" else {"quantization_config": _four_bits(), "device_map": {"": device or "cpu"}}
    tokenizer, base = folders.load(folder, AutoModelForCausalLM, settings=_NO_DROPOUT, dtype=dtype, quantised=quantised)
    family_of(base.config)
    if held == "nf4":
        _settle(base)
    return tokenizer, base


def _four_bits() -> Any:
    return BitsAndBytesConfig(**_NF4)  # type: ignore[no-untyped-call]


def _settle(base: Any) -> None:
    """Let go of the mapped file, which what is not in 4 bits is still a view of, and leave packed weights as they are."""
    for module in base.modules():
        if hasattr(module, _PACKS):
            setattr(module, _PACKS, False)
    for p in base.parameters():
        if p.is_floating_point():
            p.data = p.data.clone()


def family_of(config: Any) -> _Family:
    """Raises ModelError for a configuration that is of no known family, or has what is not known of it."""
    family = FAMILIES.get(str(config.model_type))
    if family is None:
        raise ModelError(
            f"a language model of the architecture {config.model_type!r} cannot be adapted",
            hint=f"use one of {', '.join(FAMILIES)}",
        )
    if getattr(config, "add_cross_attention", False):
        raise ModelError("a decoder with cross-attention cannot be adapted", hint="use one that needs nothing but text")
    return family


def adapt(base: Any, spec: CausalSpec) -> tuple[Trunk, Tail, dict[str, nn.Parameter]]:
    """Split `base` below its last `spec.layers` layers and put LoRA on those: trunk, tail, and the release's tensors.

    Everything is frozen. Raises ModelError if the base has too few layers, no module of that name, or looks back over fewer
    tokens than a text of the spec has.
    """
    family = family_of(base.config)
    layers: nn.ModuleList = base.get_submodule(family.layers)
    if len(layers) < spec.layers:
        raise ModelError(f"{spec.base_model!r} must have at least {spec.layers} layers to adapt, and has {len(layers)}")
    _check_length(base.config, spec)
    first = len(layers) - spec.layers
    paths = [(first + n, path) for n, layer in enumerate(layers[first:]) for path in _targets(layer, spec.targets)]
    if not paths:
        raise ModelError(f"no linear module of {spec.base_model!r} is called {', '.join(spec.targets) or 'nothing'}")
    tensors = _inject(base, spec, family, paths)
    core, norm = base.get_submodule(family.layers.split(".")[0]), base.get_submodule(family.norm)
    rotary = getattr(core, "rotary_emb", None)
    trunk = Trunk(layers[:first], rotary, base.get_input_embeddings(), getattr(core, "wpe", None))
    tail = Tail(layers[first:], rotary, first, norm, base.get_output_embeddings())
    for module in (trunk, tail):
        module.requires_grad_(requires_grad=False)
    return trunk, tail, tensors


def context(config: Any) -> int:
    """The tokens that a text may have, the answer included."""
    window = getattr(config, "sliding_window", None)
    return min(int(config.max_position_embeddings), int(window or config.max_position_embeddings))


def _check_length(config: Any, spec: CausalSpec) -> None:
    if not spec.max_answer_tokens < spec.max_tokens <= context(config):
        raise ModelError(
            f"max_tokens must be {spec.max_answer_tokens + 1} (more than an answer) to {context(config)} (what the model looks "
            f"back over) for {spec.base_model!r}, not {spec.max_tokens}"
        )


def _targets(layer: nn.Module, targets: Sequence[str]) -> list[str]:
    """The paths within a layer of the linear modules that `targets` name by their ends, in alphabetical order."""
    return sorted(
        path
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and any(path == target or path.endswith(f".{target}") for target in targets)
    )


def _inject(base: Any, spec: CausalSpec, family: _Family, paths: Sequence[tuple[int, str]]) -> dict[str, nn.Parameter]:
    """PEFT's LoRA on the modules `paths` (layer, path within it); its factors by their names in a release."""
    config = LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # PEFT divides by the rank: any number does
        lora_dropout=0.0,
        bias="none",
        target_modules=[f"{family.layers}.{layer}.{path}" for layer, path in paths],
        fan_in_fan_out=family is _GPT2 and not getattr(base, "is_loaded_in_4bit", False),  # its Conv1D holds [in, out]
    )
    inject_adapter_in_model(config, base)
    tensors: dict[str, nn.Parameter] = {}
    for layer, path in paths:
        module = base.get_submodule(f"{family.layers}.{layer}.{path}")
        for factor, part in (("A", module.lora_A), ("B", module.lora_B)):
            part.float()  # PEFT makes them of the base's type
            tensors[f"lora.{layer}.{path}.{factor}"] = part["default"].weight
    return tensors
