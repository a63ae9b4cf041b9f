"""What an evaluation is made of, in a blob: the same bytes each time, and nothing that could be guessed from its name."""

from __future__ import annotations

import hashlib
from itertools import product
from pathlib import Path

import pytest
import samples
from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_events.folds.releases import Evaluation
from fedloop_events.signatures import SigningKey
from fedloop_events.types import BlobRef
from fedloop_server.rounds import scores
from fedloop_tasks.evaluation import Scores
from msgspec.structs import replace

VALUES = [1.0, 0.0, 1.0, 1.0]
DATASET = "e" * 64


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


def put(blobs: BlobStore, *, key: SigningKey | None = None, release: str = "0001-x", dataset: str = DATASET) -> BlobRef:
    return scores.put(blobs, Scores.of(VALUES), key=key or samples.key("server"), release=release, dataset_sha256=dataset)


def evaluation(ref: BlobRef | None) -> Evaluation:
    return Evaluation({"accuracy": 0.75}, "accuracy", 4, DATASET, scores=ref)


def test_scores_come_back_as_they_were(blobs: BlobStore) -> None:
    found = scores.measured(blobs, evaluation(put(blobs)))
    assert found.scores is not None
    assert (found.scores.values.tolist(), found.scores.weights.tolist()) == (VALUES, [1.0] * 4)
    assert (found.metrics, found.leading, found.examples, found.dataset_sha256) == ({"accuracy": 0.75}, "accuracy", 4, DATASET)


def test_the_same_server_stores_the_same_bytes_again(blobs: BlobStore) -> None:
    assert put(blobs) == put(blobs)
    assert len(list(blobs.all())) == 1
    others = [put(blobs, key=SigningKey.generate()), put(blobs, release="0002-x"), put(blobs, dataset="f" * 64)]
    assert len({put(blobs), *others}) == 4


def test_what_is_right_cannot_be_guessed_from_the_name(blobs: BlobStore) -> None:
    """Whoever sees the event knows how many examples there are; so few zeros and ones are tried in no time."""
    name = put(blobs).sha256
    for guess in product([0.0, 1.0], repeat=4):
        for salt in ({}, {"salt": ""}, {"salt": hashlib.sha256(DATASET.encode()).hexdigest()}):
            data = b"".join(tensors.encode(Scores.of(guess).arrays(), salt))
            assert hashlib.sha256(data).hexdigest() != name


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no tensors",
        b"".join(tensors.encode({"values": Scores.of(VALUES).values})),
        b"".join(tensors.encode(Scores.of([1.0, 1.0, 1.0, 1.0]).arrays())),
        b"".join(tensors.encode(Scores.of([1.0, 0.5]).arrays())),
    ],
    ids=["empty", "junk", "no weights", "of another metric", "of other examples"],
)
def test_a_file_that_is_none_leaves_an_evaluation_without_scores(blobs: BlobStore, data: bytes) -> None:
    assert scores.measured(blobs, evaluation(blobs.put([data]))).scores is None


def test_a_file_that_is_gone_or_was_never_there_leaves_an_evaluation_without_scores(blobs: BlobStore) -> None:
    assert scores.measured(blobs, evaluation(BlobRef("0" * 64, 10))).scores is None
    assert scores.measured(blobs, evaluation(None)).scores is None
    broken = replace(evaluation(None), metrics={"accuracy": None})
    assert scores.measured(blobs, broken).metrics["accuracy"] != scores.measured(blobs, broken).metrics["accuracy"], "NaN"
