"""A deployment whose releases are those of a real encoder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from clients.conftest import ORIGIN, Deployment, DigitMasker
from fedloop_clients import Agent
from fedloop_clients.models import Held
from fedloop_events import types
from fedloop_events.blobs import tensors
from fedloop_events.types import BlobRef
from fedloop_tasks.classification.model import EmbeddingClassifier, describe
from fedloop_tasks.models.tensors import Arrays

TEXTS = {"card-lost": "my card is lost", "loan": "can I have a loan, please", "transfer": "where is the money that I sent"}


class Classified(Deployment):
    """A deployment whose releases are real."""

    arrays: Arrays

    def register(self) -> None:
        self.model = EmbeddingClassifier(describe(list(TEXTS)), device="cpu")
        self.server.append(types.ModelRegistered(origin=ORIGIN, model="default", spec=self.model.spec))
        self.server.append(types.EpochStarted(origin=ORIGIN, epoch=1, run_id="main", server_id="s1"))

    def put(self) -> BlobRef:
        return self.blobs.put(tensors.encode(self.arrays))


def classified_in(folder: Path) -> Classified:
    """One whose first release knows what each of the `TEXTS` is about."""
    made = Classified(folder)
    made.register()
    made.arrays = made.model.initial_arrays(0)
    made.arrays["head.weight"] = made.model.embed(list(TEXTS.values()))
    made.release()
    return made


def enrol(classified: Classified, store_dir: Path, **terms: Any) -> Agent:
    """A device that has loaded its model already."""
    agent = Agent.enrol(classified.folder, store_dir, key_from="file", masker=DigitMasker(), **terms)
    agent._device.models._idle.append(Held(classified.model))
    return agent
