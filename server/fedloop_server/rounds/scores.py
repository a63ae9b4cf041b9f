"""What an evaluation is made of, example by example, in a blob that the server alone reads.

Whether a release gets an example of the held-out set right is nobody else's to know, but the blob's name stands in an event that
everyone sees. A few zeros and ones could be guessed from their hash; so there is a salt in the file, made with the server's key.
"""

from __future__ import annotations

import hashlib
import math
from typing import Final

from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_events.errors import BlobError, TensorError
from fedloop_events.folds.releases import Evaluation
from fedloop_events.signatures import SigningKey
from fedloop_events.types import BlobRef
from fedloop_tasks.evaluation import Measured, Scores
from msgspec.structs import replace

_PURPOSE: Final = b"fedloop scores by example\0"
_SALT: Final = "salt"


def put(blobs: BlobStore, scores: Scores, *, key: SigningKey, release: str, dataset_sha256: str) -> BlobRef:
    """Store the scores of a release: the same bytes whenever the same server does it again."""
    salt = hashlib.sha256(key.sign_bytes(_PURPOSE + f"{release}\0{dataset_sha256}".encode())).hexdigest()
    return blobs.put(tensors.encode(scores.arrays(), {_SALT: salt}))


def measured(blobs: BlobStore, evaluation: Evaluation) -> Measured:
    """An evaluation as the log has it, with its scores; without, if there never were any, or their blob is gone or broken: a
    server goes on. Raises UnreachableError, for then they may be there."""
    metrics = {name: math.nan if value is None else value for name, value in evaluation.metrics.items()}
    bare = Measured(metrics, evaluation.leading, evaluation.examples, evaluation.dataset_sha256, evaluation.higher_is_better)
    if evaluation.scores is None:
        return bare
    try:
        found = tensors.decode(blobs.get(evaluation.scores))
        return replace(bare, scores=Scores.of(found["values"], found["weights"]))
    except (BlobError, TensorError, KeyError, ValueError):
        return bare
