"""Merges of adapters of mixed ranks, against rank 8 everywhere: loss per token of SmolLM2-135M on banking77's intents as words.

Six devices with an equal number of questions each, shares drawn at random, train without privacy: a third of them rank 4, a third
rank 8, a third rank 16, which is the adapter's. The peer is the same program over the same shares and seeds with rank 8 on
all devices. Rounds run in one process, without the log: each device's program, and the server's merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np
from fedloop_events.blobs.store import BlobStore
from fedloop_events.types import RoundOpened
from fedloop_tasks.causal.examples import Example
from fedloop_tasks.causal.model import CausalModel, describe
from fedloop_tasks.models import registry
from fedloop_tasks.table import program_of
from fedloop_tasks.task import Arrays, Terms

from benchmarks.chat_rounds import PACKAGE, loss_per_token
from benchmarks.chat_utility import examples
from benchmarks.federation import Federation
from benchmarks.harness import Row, costs, scratch
from benchmarks.utility import banking77

MIXED: Final = (4, 4, 8, 8, 16, 16)
EVEN: Final = (8,) * len(MIXED)
PROGRAMS: Final = ("svd", "stack")
SCALE: Final = 2.0
"""Alpha by rank: the same whatever the adapter's rank."""
LAYERS: Final = 4
SETTINGS: Final = {"lora_lr": 0.002, "local_epochs": 3.0, "batch": 10.0}
CACHE_BYTES: Final = 1 << 30


def rows(quick: bool) -> list[Row]:
    questions, asked, rounds, seeds = (48, 24, 1, [0]) if quick else (180, 120, 2, [0, 1, 2])
    with scratch() as place:
        folder = registry.add(PACKAGE, model_dir=place).folder
        even, mixed = (_model(folder, max(ranks)) for ranks in (EVEN, MIXED))
    pairs: dict[str, list[tuple[float, float]]] = {program: [] for program in PROGRAMS}
    for seed in seeds:
        learnt, held_out = _questions("train", questions, seed), _questions("test", asked, 0)
        for program, found in pairs.items():
            ours = _loss(mixed, program, MIXED, learnt, held_out, rounds, seed)
            found.append((ours, _loss(even, program, EVEN, learnt, held_out, rounds, seed)))
    what = f"loss per token, ranks 4, 8 and 16, {rounds} rounds"
    return [costs(f"{what}, {program}", "rank 8 everywhere", found, "", 1.0) for program, found in pairs.items()]


def _model(folder: Path, rank: int) -> CausalModel:
    spec = describe(folder.name, model_dir=folder, rank=rank, alpha=SCALE * rank, layers=LAYERS)
    return CausalModel(spec, model_dir=folder, device="cpu", cache_bytes=CACHE_BYTES)


def _questions(part: str, n: int, seed: int) -> list[Example]:
    """`n` questions drawn at random, each with its intent as words."""
    known = banking77(part)
    return examples(known.take(np.random.default_rng(seed).choice(len(known.texts), n, replace=False).tolist()))


class Ranked(Federation[CausalModel]):
    """Devices of these ranks, with equal parts of the questions."""

    def __init__(
        self, model: CausalModel, ranks: Sequence[int], learnt: Sequence[Example], held_out: Sequence[Example], blobs: BlobStore
    ) -> None:
        super().__init__(model, [learnt[device :: len(ranks)] for device in range(len(ranks))], blobs)
        self._ranks, self._held_out = ranks, held_out

    def update(self, client: int, release: Arrays, opened: RoundOpened) -> Arrays:
        self.model.load(release)
        with self.model.at_rank(self._ranks[client]):
            return program_of(opened.strategy).compute(self.model, self.shares[client], opened)

    def measured(self, release: Arrays) -> dict[str, float]:
        self.model.load(release)
        return {"loss per token": loss_per_token(self.model, self._held_out)}


def _loss(
    model: CausalModel,
    program: str,
    ranks: Sequence[int],
    learnt: Sequence[Example],
    held_out: Sequence[Example],
    rounds: int,
    seed: int,
) -> float:
    with scratch() as folder:
        ranked = Ranked(model, ranks, learnt, held_out, BlobStore(folder))
        release = ranked.rounds(1, rounds, model.initial_arrays(seed), Terms(program, None, SETTINGS))
        return ranked.measured(release)["loss per token"]
