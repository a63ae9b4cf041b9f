"""Devices in one process, without the log: the plan's terms, their program on each device, and the server's merge."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, Generic, Protocol, TypeVar

import numpy as np
from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_events.types import AcceptedUpdate, RoundOpened
from fedloop_server.aggregation.merging import merge
from fedloop_tasks.planning import TrainingPlan
from fedloop_tasks.programs.adapter import Trains
from fedloop_tasks.table import program_of
from fedloop_tasks.task import STATE, Arrays, Terms


class Learner(Trains, Protocol):
    """A model that holds one release at a time."""

    def load(self, arrays: Arrays) -> None: ...


M = TypeVar("M", bound=Learner)


class Federation(Generic[M]):
    """Devices with their examples, and one release after the other; `measured` may say how good one is."""

    def __init__(self, model: M, shares: Sequence[Sequence[Any]], blobs: BlobStore) -> None:
        self.model, self.shares, self._blobs = model, shares, blobs

    def measured(self, release: Arrays) -> Mapping[str, float]:
        """How good a release is, by name; it is shown after each round."""
        return {}

    def round(self, number: int, release: Arrays, terms: Terms, upload: Sequence[str] | None = None) -> Arrays:
        """The release that all devices make of `release` under `terms`."""
        fetched = model_of(release)
        opened = self._opened(number, release, terms, upload or program_of(terms.program).upload(list(fetched)))
        accepted = []
        for client, share in enumerate(self.shares):
            blob = self._blobs.put(tensors.encode(self.update(client, fetched, opened)))
            weight = 1.0 if terms.mechanism else float(len(share))
            accepted.append(AcceptedUpdate(f"c{client}", f"{client:032x}", f"{client:032x}", blob, weight))
        return merge(self._blobs, opened, release, accepted)

    def update(self, client: int, release: Arrays, opened: RoundOpened) -> Arrays:
        """What one device makes of `release`, the round's base."""
        self.model.load(release)
        return program_of(opened.strategy).compute(self.model, self.shares[client], opened)

    def rounds(self, first: int, last: int, release: Arrays, terms: Terms, upload: Sequence[str] | None = None) -> Arrays:
        for number in range(first, last + 1):
            start = time.perf_counter()
            release = self.round(number, release, terms, upload)
            took_s = time.perf_counter() - start
            found = [f"{name} {value:.4f}" for name, value in self.measured(release).items()]
            print(f"  round {number}: {', '.join([*found, f'{took_s:.0f} s'])}", file=sys.stderr, flush=True)
        return release

    def planned(self, plan: TrainingPlan, release: Arrays) -> Arrays:
        """What all rounds of a plan make of a first release."""
        terms = plan.terms(plan.merge, plan.mechanisms().get(plan.merge))
        return self.rounds(1, plan.planned_rounds, release, terms)

    def _opened(self, number: int, release: Arrays, terms: Terms, upload: Sequence[str]) -> RoundOpened:
        return RoundOpened(
            origin="benchmark",
            epoch=0,
            run_id="main",
            round_id=f"r{number:04d}",
            request_id="benchmark",
            number=number,
            model="default",
            base_release="base",
            base=self._blobs.put(tensors.encode(release)),
            strategy=terms.program,
            cohort=[f"c{client}" for client in range(len(self.shares))],
            quorum=len(self.shares),
            deadline_s=60.0,
            upload=list(upload),
            max_upload_bytes=1 << 30,
            max_update_norm=1e12,
            mechanism=terms.mechanism,
            hyperparameters=terms.hyperparameters,
        )


def model_of(release: Arrays) -> Arrays:
    """What devices fetch of a release: all but what the server's optimiser remembers."""
    return {name: values for name, values in release.items() if not name.startswith(STATE)}


def dirichlet(labels: Sequence[str], clients: int, alpha: float, seed: int) -> list[list[int]]:
    """Indices of each client's share: of every label, proportions drawn from Dirichlet(alpha) (Hsu et al. 2019)."""
    random = np.random.default_rng(seed)
    shares: list[list[int]] = [[] for _ in range(clients)]
    for label in sorted(set(labels)):
        indices = random.permutation(np.flatnonzero([each == label for each in labels]))
        cuts = (np.cumsum(random.dirichlet([alpha] * clients)) * len(indices)).astype(int)[:-1]
        for share, part in zip(shares, np.split(indices, cuts), strict=True):
            share += part.tolist()
    return shares
