"""The agent with its default app: a real encoder, a real masker, predictions and rounds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from clients.conftest import ORIGIN, Deployment
from fedloop_clients import Agent
from fedloop_events import types
from fedloop_events.blobs import tensors
from fedloop_events.types import BlobRef, Mechanism
from fedloop_tasks.classification.model import Arrays, EmbeddingClassifier, describe
from msgspec.structs import replace

pytestmark = pytest.mark.slow

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


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Classified]:
    made = Classified(tmp_path_factory.mktemp("classified"))
    made.register()
    made.arrays = made.model.initial_arrays(0)
    made.arrays["head.weight"] = made.model.embed(list(TEXTS.values()))
    made.release()
    yield made
    made.log.close()


def test_a_device_predicts_learns_and_contributes(classified: Classified, tmp_path: Path) -> None:
    with Agent.enrol(classified.folder, tmp_path / "store", key_from="file", epsilon=8.0) as agent:
        for label, text in TEXTS.items():
            response = agent.predict(f"Hello, this is John Smith. {text}")
            assert response.label == label
            assert 0 < response.confidence <= 1
            agent.feedback(response.response_id, thumb="up")
        agent.run(until=lambda status: status.settled)
        recorded = classified.said(types.FeedbackRecorded)
        assert len(recorded) == 3
        assert all("John" not in each.text.text and "<PERSON_1>" in each.text.text for each in recorded)
        head = ["head.weight", "head.bias"]
        for program, upload, mechanism in (
            ("sums", ["sums"], Mechanism(1.0, 2.0, 1.0, 1, 1.0)),
            ("ffa", [name for name in classified.arrays if name.endswith(".B")] + head, Mechanism(0.5, 2.0, 1.0, 2, 2.0)),
        ):
            opened = replace(
                classified.opened(agent.identity.client_id, mechanism=mechanism),
                strategy=program,
                upload=upload,
                max_upload_bytes=10**7,
            )
            classified.server.append(opened)
            instruction = classified.instruct(agent.identity.client_id, opened)
            agent.run(until=lambda status: sum(status.answers.values()) == classified.rounds and status.settled)
            update = classified.said(types.UpdateSubmitted)[-1]
            assert update.instruction_id == instruction
            arrays = tensors.decode(classified.blobs.get(update.content.arrays["arrays"]))
            assert list(arrays) == upload
            assert all(np.isfinite(array).all() for array in arrays.values())
        before = agent.predict(TEXTS["loan"])
        classified.arrays["head.weight"] = np.roll(classified.arrays["head.weight"], 1, axis=0)
        release = classified.release()
        after = agent.predict(TEXTS["loan"])
        assert (before.label, after.label, after.release) == ("loan", "transfer", release)
