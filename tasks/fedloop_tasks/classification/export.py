"""A release as files that PEFT loads: the adapter, the head beside it, and a model card that says where both come from.

The base is a sentence encoder without a head of its own, so the head is no module that `modules_to_save` could name: it is a
linear layer over the encoder's pooled states, in a file of its own. The card's program applies both.
"""

from __future__ import annotations

from typing import Final

from fedloop_events.blobs import tensors
from fedloop_events.blobs.tensors import Array
from fedloop_events.errors import TensorError
from fedloop_events.types import ClassificationSpec

from fedloop_tasks import card
from fedloop_tasks.classification import encoder
from fedloop_tasks.models import folder
from fedloop_tasks.programs import factors
from fedloop_tasks.programs.class_sums import BIAS, HEAD
from fedloop_tasks.programs.factors import FIXED
from fedloop_tasks.task import Arrays, Export, Provenance

_PROGRAM: Final = """\
import json, torch
from pathlib import Path
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModel, AutoTokenizer


def classify(texts, folder, base):
    about, head = json.loads(Path(folder, "head.json").read_text("utf-8")), load_file(Path(folder, "head.safetensors"))
    cut = {"padding": True, "truncation": True, "max_length": about["max_tokens"], "return_tensors": "pt"}
    tokens = AutoTokenizer.from_pretrained(base)(texts, **cut)
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(base, dtype=torch.float32), folder).eval()
    with torch.no_grad():
        states, mask = model(**tokens).last_hidden_state, tokens["attention_mask"][..., None]
    embedded = torch.nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=1)
    confidence, best = (embedded @ head["weight"].T + head["bias"]).softmax(1).max(1)
    return [about["labels"][i] for i in best.tolist()], confidence.tolist()
"""


def files(spec: ClassificationSpec, arrays: Arrays, provenance: Provenance) -> Export:
    """Raises `TensorError` for tensors that are no release of the model."""
    head = {"weight": arrays.get(HEAD), "bias": arrays.get(BIAS)}
    pairs, fixed = factors.pairs(list(arrays)), [name for name in arrays if factors.is_fixed(name)]
    if fixed != [f"{name}{FIXED}.{factor}" for name in pairs for factor in "AB" if f"{name}{FIXED}.A" in arrays]:
        raise TensorError("the release's fixed factors are not in pairs, each of an adapter")
    adapter: dict[str, Array] = {}
    ranks: dict[str, int] = {}
    for name in pairs:
        _, layer, path = name.split(".", 2)
        module = f"encoder.layer.{layer}.{path}"
        for factor, values in zip("AB", factors.whole(arrays, name), strict=True):
            adapter[f"base_model.model.{module}.lora_{factor}.weight"] = values
        ranks[module] = len(adapter[f"base_model.model.{module}.lora_A.weight"])
    given = {name: value for name, value in head.items() if value is not None}
    if len(given) != len(head) or len(adapter) + len(fixed) + len(head) != len(arrays):
        raise TensorError(f"the release's {len(arrays)} tensors are not an adapter and a head of this model")
    about = {"labels": list(spec.labels), "max_tokens": spec.max_tokens, "pooling": "mean, unit length"}
    return Export(
        {
            "adapter_config.json": card.as_json(encoder.exported_config(spec, ranks)),
            "adapter_model.safetensors": b"".join(map(bytes, tensors.encode(adapter))),
            "head.safetensors": b"".join(map(bytes, tensors.encode(given))),
            "head.json": card.as_json(about),
            card.NAME: _card(spec, provenance).encode(),
        }
    )


def _card(spec: ClassificationSpec, provenance: Provenance) -> str:
    return card.written(
        card.front("peft", "text-classification", spec.base_model),
        provenance,
        [
            f"A classifier into {len(spec.labels)} labels: a LoRA adapter on the last layers ({spec.layers}) of",
            f"`{spec.base_model}`, whose `{folder.WEIGHTS}` has SHA-256 `{spec.base_sha256}`,",
            "and a linear head over the mean of its states.",
            "It was trained on its users' devices from their feedback, on masked text: mask in the same way what you classify.",
            "",
            "`classify(texts, folder, base)` gives labels and confidences; `folder` is this one, `base` the base model's.",
            "",
            "```python",
            f"{_PROGRAM}```",
        ],
    )
