"""The frozen encoder below a model, split for LoRA.

The adapter's configuration is rebuilt from the spec; no file of a model or a release can name a module to import or a pattern to
match. Here stands how Transformers (5.23) lays an encoder out, and what PEFT (0.21) makes of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import torch
import torch.nn.functional as F
from fedloop_events.types import ClassificationSpec
from peft import LoraConfig, TaskType, inject_adapter_in_model
from torch import Tensor, nn
from transformers import AutoModel

from fedloop_tasks.models import peft_config
from fedloop_tasks.models.folder import load as load_folder
from fedloop_tasks.task import ModelError

_PROBE: Final = ("one", "a longer text, so that the first is padded")
_PROBE_TOLERANCE: Final = 1e-5  # the same operations on the same values; only the mask is written otherwise


class Tail(nn.Module):
    """What can be trained, and what lies between: the adapted layers and the head."""

    def __init__(self, layers: nn.ModuleList, head: nn.Linear) -> None:
        super().__init__()
        self.layers, self.head = layers, head

    def embed(self, states: Tensor, mask: Tensor) -> Tensor:
        """Unit vectors [B, d] of the trunk's states [B, T, d] where `mask` [B, T] is true."""
        hidden = torch.zeros_like(mask, dtype=states.dtype).masked_fill(~mask, torch.finfo(states.dtype).min)[:, None, None, :]
        for layer in self.layers:  # whichever attention the encoder uses, a mask that is added does
            output = layer(states, hidden)
            states = output[0] if isinstance(output, tuple) else output
        return pool(states, mask)

    def forward(self, states: Tensor, mask: Tensor) -> Tensor:
        """Logits [B, classes]."""
        logits: Tensor = self.head(self.embed(states, mask))
        return logits


def pool(states: Tensor, mask: Tensor) -> Tensor:
    """The mean of the states [B, T, d] where `mask` [B, T] is true, scaled to a unit vector: [B, d]."""
    weight = mask[..., None].to(states.dtype)
    return F.normalize((states * weight).sum(1) / weight.sum(1), dim=1)


def load(folder: Path) -> tuple[Any, Any]:
    """See `models.folder.load`; the pooler is not used."""
    return load_folder(folder, AutoModel, unused=("pooler.",))


def adapt(base: Any, tokenizer: Any, spec: ClassificationSpec) -> tuple[nn.Module, Tail, dict[str, nn.Parameter]]:
    """Split `base` below its last `spec.layers` layers and put LoRA on those: trunk, tail, and the release's tensors.

    Everything is frozen. Raises ModelError if the base has too few layers, no module of that name, or does another thing once it
    is split.
    """
    layers = getattr(getattr(base, "encoder", None), "layer", None)
    if not isinstance(layers, nn.ModuleList) or len(layers) < spec.layers:
        found = len(layers) if isinstance(layers, nn.ModuleList) else "none under encoder.layer"
        raise ModelError(f"{spec.base_model!r} must have at least {spec.layers} encoder layers to adapt, and has {found}")
    first = len(layers) - spec.layers
    paths = [(first + n, path) for n, layer in enumerate(layers[first:]) for path in _targets(layer, spec.targets)]
    if not paths:
        raise ModelError(f"no linear module of {spec.base_model!r} is called {', '.join(spec.targets) or 'nothing'}")
    _check_max_tokens(base, tokenizer, spec)
    batch = tokenizer(list(_PROBE), padding=True, truncation=True, max_length=spec.max_tokens, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    with torch.no_grad():
        whole = pool(base(input_ids=ids, attention_mask=mask).last_hidden_state, mask)
    tensors = _inject(base, spec, paths)
    head = nn.Linear(base.config.hidden_size, len(spec.labels))
    tensors |= {f"head.{name}": p for name, p in head.named_parameters()}
    base.encoder.layer, tail = layers[:first], Tail(layers[first:], head)
    for module in (base, tail):
        module.requires_grad_(requires_grad=False)
    with torch.no_grad():  # B is zero: the split model must be the whole one
        split = tail.embed(base(input_ids=ids, attention_mask=mask).last_hidden_state, mask.bool())
    if not torch.allclose(split, whole, atol=_PROBE_TOLERANCE):
        raise ModelError(
            f"the layers of {spec.base_model!r} need more than states and mask", hint="use an encoder laid out as BERT or RoBERTa"
        )
    return base, tail, tensors


def _inject(base: Any, spec: ClassificationSpec, paths: Sequence[tuple[int, str]]) -> dict[str, nn.Parameter]:
    """PEFT's LoRA on the modules `paths` (layer, path within it); its factors by their names in a release."""
    config = _lora(spec, [f"encoder.layer.{layer}.{path}" for layer, path in paths])
    inject_adapter_in_model(config, base)
    tensors: dict[str, nn.Parameter] = {}
    for layer, path in paths:
        module = base.get_submodule(f"encoder.layer.{layer}.{path}")
        for factor, part in (("A", module.lora_A), ("B", module.lora_B)):
            tensors[f"lora.{layer}.{path}.{factor}"] = part["default"].weight
    return tensors


def exported_config(spec: ClassificationSpec, ranks: Mapping[str, int]) -> dict[str, Any]:
    """`adapter_config.json` of an adapter on modules (by their paths in the base) of these `ranks`, as PEFT writes it."""
    patterns = peft_config.patterns(ranks, spec.rank, spec.alpha)
    return peft_config.written(_lora(spec, list(ranks), **patterns), spec.base_model, TaskType.FEATURE_EXTRACTION)


def _lora(spec: ClassificationSpec, modules: Sequence[str], **patterns: Any) -> LoraConfig:
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # PEFT divides by the rank: any number does
        lora_dropout=0.0,
        bias="none",
        target_modules=list(modules),
        layers_to_transform=sorted({int(module.split(".")[2]) for module in modules}),
        layers_pattern="layer",
        **patterns,
    )


def _check_max_tokens(base: Any, tokenizer: Any, spec: ClassificationSpec) -> None:
    least = int(tokenizer.num_special_tokens_to_add()) + 1
    most = min(int(getattr(base.config, "max_position_embeddings", 10**6)), int(tokenizer.model_max_length))
    if not least <= spec.max_tokens <= most:
        raise ModelError(f"max_tokens must be {least} to {most} for {spec.base_model!r}, not {spec.max_tokens}")


def _targets(layer: nn.Module, targets: Sequence[str]) -> list[str]:
    """Paths of the linear modules of a layer that a target names, in alphabetical order."""
    return sorted(
        path
        for path, module in layer.named_modules()
        if isinstance(module, nn.Linear) and any(path == target or path.endswith(f".{target}") for target in targets)
    )
