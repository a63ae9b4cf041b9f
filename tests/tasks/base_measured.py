"""What a language model whose base is held in one type takes of memory once it is loaded (Linux), and the gradients of some
examples: run with its folder, the type, and the file for the gradients. Prints bytes, those of the mapped file among them."""

from __future__ import annotations

import gc
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models as tiny
import torch
from fedloop_privacy.dp.dpsgd import example_gradients
from fedloop_tasks.causal.examples import Example
from fedloop_tasks.causal.model import CausalModel, describe
from fedloop_tasks.turns import Turn
from safetensors.numpy import save_file

EXAMPLES = [
    Example((Turn("user", "My card has not arrived yet, what shall I do?"),), "We are sorry. We have sent you a new one today."),
    Example((Turn("user", "Can I have a loan for a house?"),), "Yes, please come to one of our branches."),
    Example((Turn("user", "What is the capital of France?"),), "Paris."),
]


def resident_bytes() -> int:
    gc.collect()
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmRSS"))


def loaded(folder: Path, base_dtype: Any) -> CausalModel:
    spec = describe(folder.name, model_dir=folder, max_tokens=128, max_answer_tokens=32)
    return CausalModel(spec, model_dir=folder, device="cpu", base_dtype=base_dtype)


def gradients(model: CausalModel) -> dict[str, np.ndarray[Any, Any]]:
    """Of each example; at values of the adapters at which no gradient is zero."""
    random = np.random.default_rng(0)
    model.load({name: random.normal(0, 0.02, shape).astype(np.float32) for name, shape in model.shapes.items()})
    with model.training(EXAMPLES, list(model.shapes), {"lora_lr": 1.0}) as ready:
        assert ready is not None
        parameters = list(ready.groups[0].parameters)
        found = example_gradients(model.tail, parameters, ready.examples, ready.losses, range(len(EXAMPLES)))
    return {name: each.numpy() for name, each in zip(model.shapes, found, strict=True)}


def main(folder: Path, base_dtype: str, to: Path) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:  # what is imported and made once is no part of it
        gradients(loaded(tiny.save(Path(place) / "tiny"), base_dtype))
    before = resident_bytes()
    model = loaded(folder, base_dtype)
    print(resident_bytes() - before)
    save_file(gradients(model), to)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
