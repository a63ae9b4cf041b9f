"""Small language models with a release, exported, and what other programs make of the files."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import torch
from fedloop_events import files as durable
from fedloop_events.blobs.tensors import Array
from fedloop_tasks.causal.model import CausalModel, describe
from fedloop_tasks.models import registry
from fedloop_tasks.table import task_of
from fedloop_tasks.task import Provenance, Step, Streamed
from fedloop_tasks.turns import Turn
from transformers import AutoModelForCausalLM

FAMILIES = ["llama", "mistral", "qwen2", "gpt2"]
GGUF_FAMILIES = ["llama", "qwen2", "gpt2"]
IDS = [5, 17, 40, 3, 99, 120, 7, 7, 250, 31]
ASKED = ["where is my card", "a loan", "the card is lost, what now?"]
PROVENANCE = Provenance(
    release="0002-abc",
    model="default",
    sha256="a" * 64,
    metrics={"loss_per_token": 0.5},
    steps=[
        Step("0002-abc", "0001-abc", "r0001", "ffa", ["b" * 64, "c" * 64], None),
        Step("0001-abc", None, None, None, [], None),
    ],
    unprotected=["r0001"],
    epsilon=0.0,
    delta=0.0,
)


def made(folder: Path, **settings: Any) -> CausalModel:
    """A model with a release that says something else than the base."""
    spec = describe(
        folder.name,
        model_dir=folder,
        **{"rank": 4, "alpha": 6.0, "layers": 2, "max_answer_tokens": 12, "activated": False} | settings,
    )
    model = CausalModel(spec, model_dir=folder, device="cpu")
    random = np.random.default_rng(0)
    model.load({name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in model.shapes.items()})
    return model


def exported(model: CausalModel, folder: Path, form: str, out: Path) -> Path:
    export = task_of(model.spec).export(model.arrays(), PROVENANCE, form, folder)
    sizes = {name: each.size_bytes if isinstance(each, Streamed) else len(each) for name, each in export.files.items()}
    durable.write_folder(out, {name: chunks(each) for name, each in export.files.items()})
    assert {each.name: each.stat().st_size for each in out.iterdir()} == sizes
    return out


def chunks(data: bytes | Streamed) -> Any:
    return data.chunks if isinstance(data, Streamed) else data


def logits(model: CausalModel, ids: list[int] = IDS) -> torch.Tensor:
    """Of every token, by the model on the device."""
    columns = torch.arange(len(ids))
    with torch.no_grad():
        found: torch.Tensor = model.tail(model._trunk(torch.tensor([ids])), torch.zeros_like(columns), columns)
    return found


def theirs(model: Any, ids: list[int] = IDS) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(input_ids=torch.tensor([ids])).logits[0]
    return found


def divergence(one: torch.Tensor, other: torch.Tensor) -> float:
    """The mean over the tokens of the Kullback-Leibler divergence of `other` from `one`, in nats."""
    logs, theirs = one.double().log_softmax(1), other.double().log_softmax(1)
    return float((logs.exp() * (logs - theirs)).sum(1).mean())


def in_peft(base: Path, folder: Path) -> Any:
    from peft import PeftModel

    whole: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return PeftModel.from_pretrained(whole, folder)


def program(folder: Path) -> Callable[..., str]:
    """`answer` of the model card in `folder`."""
    found = re.search(r"```python\n(.*?)```", (folder / "README.md").read_text("utf-8"), re.DOTALL)
    assert found is not None
    names: dict[str, Any] = {}
    exec(found[1], names)
    answer: Callable[..., str] = names["answer"]
    return answer


def asked(text: str) -> list[dict[str, str]]:
    return [{"role": "system", "content": "be short"}, {"role": "user", "content": text}]


def answers(model: CausalModel) -> list[str]:
    return [model.generate([Turn("system", "be short"), Turn("user", text)]).text for text in ASKED]


class Pair:
    """A base model as a GGUF file and as a folder, and a release of it."""

    def __init__(self, family: str, folder: Path) -> None:
        self.whole = gguf_files.small(family)
        self.path = gguf_files.write(folder / f"{family}.gguf", self.whole)
        self.base = registry.add(str(self.path), model_dir=folder / "models").folder
        self.model = made(self.base)


def read(path: Path) -> tuple[dict[str, Any], dict[str, Array]]:
    """Metadata and tensors, by the package's own reader."""
    reader = gguf.GGUFReader(path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    return fields, {each.name: np.array(each.data) for each in reader.tensors}
