"""A deployment whose model is a tiny language model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import tiny_models as tiny
from clients.conftest import ORIGIN, Deployment, DigitMasker
from fedloop_clients import Agent
from fedloop_clients.device import Settings
from fedloop_events import types
from fedloop_events.blobs import tensors
from fedloop_events.types import BlobRef
from fedloop_tasks.causal.model import CausalModel, describe
from fedloop_tasks.models.tensors import Arrays
from fedloop_tasks.turns import Turn


class Chatted(Deployment):
    """A deployment whose releases are of a language model that says what nobody understands."""

    arrays: Arrays
    talkative: int
    """The seed of a release that answers at length."""

    def register(self) -> None:
        self.base_folder = tiny.save(self.folder / "base")
        spec = describe("base", rank=4, layers=2, max_answer_tokens=24, model_dir=self.base_folder)
        self.model = CausalModel(spec, model_dir=self.base_folder, device="cpu")
        self.server.append(types.ModelRegistered(origin=ORIGIN, model="default", spec=spec))
        self.server.append(types.EpochStarted(origin=ORIGIN, epoch=1, run_id="main", server_id="s1"))

    def train(self, seed: int) -> str:
        """A new release, unlike those before it."""
        random = np.random.default_rng(seed)
        self.arrays = {name: random.normal(0, 0.1, shape).astype(np.float32) for name, shape in self.model.shapes.items()}
        return self.release()

    def find_words(self, *conversations: list[dict[str, str]]) -> None:
        """Find a release whose answers to all of these come in many pieces."""
        for self.talkative in range(100):
            self.train(self.talkative)
            self.model.load(self.arrays)
            turns = ([Turn(**each) for each in conversation] for conversation in conversations)  # type: ignore[arg-type]
            if all(len({each.text for each in self.model.writing(one, most=24)}) > 12 for one in turns):
                return
        raise AssertionError("every release is of few words")

    def put(self) -> BlobRef:
        return self.blobs.put(tensors.encode(self.arrays))

    def enrol(self, store_dir: Path, **terms: Any) -> Agent:
        terms.setdefault("masker", DigitMasker())
        terms.setdefault("settings", Settings(model_dir=self.base_folder))
        return Agent.enrol(self.folder, store_dir, key_from="file", **terms)


class Smollm2(Chatted):
    """A deployment of the real model; its first release answers as its base does, which lies in the folder `base`."""

    def __init__(self, folder: Path, base: Path, **spec: Any) -> None:
        self.base_folder, self._base, self._spec = base.parent, base.name, spec
        super().__init__(folder)

    def register(self) -> None:
        spec = describe(self._base, model_dir=self.base_folder, **self._spec)
        self.model = CausalModel(spec, model_dir=self.base_folder, device="cpu")
        self.server.append(types.ModelRegistered(origin=ORIGIN, model="default", spec=spec))
        self.server.append(types.EpochStarted(origin=ORIGIN, epoch=1, run_id="main", server_id="s1"))
        self.arrays = {name: np.zeros(shape, np.float32) for name, shape in self.model.shapes.items()}
        self.release()


def chatted_in(folder: Path) -> Chatted:
    made = Chatted(folder)
    made.register()
    made.train(0)
    return made
