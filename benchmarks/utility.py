"""What private federated learning is worth: accuracy on banking77's test questions, with the parts that ship.

`python -m benchmarks.utility [--epsilon 8 | --no-dp] [--rounds 8] [--clients 10] [--alpha 0.5] [--masked] [--seed 0]`

Devices hold Dirichlet(alpha) shares of the training questions. Each round runs the plan's terms, its program on each device and
the server's merge, in one process and without the log. The classifier head alone, trained from the same first release under the
same terms, is the baseline that an adapter has to beat.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from fedloop_events.blobs.store import BlobStore
from fedloop_events.errors import FedloopError
from fedloop_privacy.dp.accounting import epsilon, noise_multiplier_for
from fedloop_tasks.classification.examples import Example
from fedloop_tasks.classification.model import EmbeddingClassifier, describe
from fedloop_tasks.classification.plan import ClassificationPlan
from fedloop_tasks.task import Arrays
from msgspec.structs import replace

from benchmarks.federation import Federation, dirichlet
from benchmarks.harness import MIN_RUNS, Row, data_set, rates, scratch

DELTA = 1e-5
CACHE_BYTES = 1 << 30  # every question's state stays in memory
AT_LEAST = {"private": 0.835, "plain": 0.87}


@dataclass(frozen=True)
class Questions:
    """Texts and their labels."""

    texts: Sequence[str]
    labels: Sequence[str]

    def take(self, indices: Sequence[int]) -> Questions:
        return Questions([self.texts[i] for i in indices], [self.labels[i] for i in indices])

    @property
    def examples(self) -> list[Example]:
        return [Example(text, label) for text, label in zip(self.texts, self.labels, strict=True)]


def banking77(part: str) -> Questions:
    """The questions of `train` or `test`. Raises UsageError that names the file if it is not there."""
    with data_set(f"banking77/{part}.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return Questions([row["text"] for row in rows], [row["category"] for row in rows])


class Classifiers(Federation[EmbeddingClassifier]):
    """Devices with their questions, which a classifier learns."""

    def __init__(self, model: EmbeddingClassifier, shares: Sequence[Questions], test: Questions, blobs: BlobStore) -> None:
        super().__init__(model, [share.examples for share in shares], blobs)
        self.test = test

    def measured(self, release: Arrays) -> dict[str, float]:
        return {"accuracy": self.accuracy(release)}

    def accuracy(self, release: Arrays) -> float:
        self.model.load(release)
        return self.model.accuracy(self.test.texts, self.test.labels)


def private(federation: Classifiers, plan: ClassificationPlan, seed: int) -> dict[str, float]:
    """Accuracies at the budget of `plan`: class sums alone, head alone, head and adapter."""
    assert plan.epsilon is not None
    mechanisms = plan.mechanisms()
    sums, training = (plan.terms(program, mechanisms[program]) for program in ("sums", plan.merge))
    assert sums.mechanism is not None
    assert training.mechanism is not None
    initial = federation.model.initial_arrays(seed)
    spent = epsilon([sums.mechanism] + [training.mechanism] * (plan.planned_rounds - 1), plan.delta)
    print(f"epsilon {spent:.3f} of {plan.epsilon:g} a client, delta {plan.delta:g}", file=sys.stderr)
    whole = replace(sums.mechanism, noise_multiplier=noise_multiplier_for(plan.epsilon, plan.delta, 1.0, 1))
    first = federation.rounds(1, 1, initial, sums)
    head = ["head.weight", "head.bias"]
    return {
        "class sums alone, the whole budget": federation.accuracy(federation.round(1, initial, replace(sums, mechanism=whole))),
        "sums, then the head alone": federation.accuracy(federation.rounds(2, plan.planned_rounds, first, training, head)),
        f"sums, then head and LoRA ({plan.merge})": federation.accuracy(
            federation.rounds(2, plan.planned_rounds, first, training)
        ),
    }


def plain(federation: Classifiers, plan: ClassificationPlan, seed: int) -> dict[str, float]:
    """Accuracy without differential privacy."""
    terms = plan.terms(plan.merge, None)
    release = federation.rounds(1, plan.planned_rounds, federation.model.initial_arrays(seed), terms)
    return {f"head and LoRA ({plan.merge}), no privacy": federation.accuracy(release)}


def federate(folder: Path, clients: int, alpha: float, seed: int, *, part: float = 1.0, mask: bool = False) -> Classifiers:
    """Banking77 (or a `part` of it) on `clients` devices, with the base model from its package."""
    training, test = (_masked(banking77(name)) if mask else banking77(name) for name in ("train", "test"))
    if part < 1:
        random = np.random.default_rng(seed)
        training, test = (q.take(random.permutation(len(q.texts))[: int(part * len(q.texts))].tolist()) for q in (training, test))
    model = EmbeddingClassifier(describe(sorted(set(training.labels))), cache_bytes=CACHE_BYTES)
    shares = [training.take(share) for share in dirichlet(training.labels, clients, alpha, seed)]
    return Classifiers(model, shares, test, BlobStore(folder))


def _plan(budget: float | None, rounds: int) -> ClassificationPlan:
    """The server's defaults: learning rates, scale and share were chosen with these very questions, which public data allows
    and private data does not."""
    return ClassificationPlan(planned_rounds=rounds, epsilon=budget, delta=DELTA)


def _masked(questions: Questions) -> Questions:
    from fedloop_privacy.masking import Masker

    return Questions([masked.text for masked in Masker().mask_many(questions.texts)], questions.labels)


def rows(quick: bool) -> list[Row]:
    """Head and adapter against class sums and the head alone at epsilon 8, and against the bounds; a run each first release."""
    rounds, clients, part, runs = (2, 2, 0.02, 1) if quick else (8, 10, 1.0, MIN_RUNS)
    with scratch() as folder:
        federation = federate(folder, clients, 0.5, 0, part=part)
        accuracies = [
            [
                *private(federation, _plan(8.0, rounds), run).values(),
                *plain(federation, _plan(None, rounds), run).values(),
            ]
            for run in range(runs)
        ]
    sums, head, lora, without = zip(*accuracies, strict=True)
    what, bound = "banking77 at epsilon 8: sums, then head and LoRA", (AT_LEAST["private"], AT_LEAST["plain"])
    return [
        rates(what, "class sums alone, the whole budget", zip(lora, sums, strict=True), "accuracy"),
        rates(what, "sums, then the head alone", zip(lora, head, strict=True), "accuracy", 1.0),
        rates(what, "the bound", [(each, bound[0]) for each in lora], "accuracy", 1.0),
        rates("without privacy: head and LoRA", "the bound", [(each, bound[1]) for each in without], "accuracy", 1.0),
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.utility", description=__doc__.splitlines()[0])
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--epsilon", type=float, help="with this budget alone (default: 8, and without privacy)")
    budget.add_argument("--no-dp", action="store_true", help="without differential privacy alone")
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--alpha", type=float, default=0.5, help="of the Dirichlet distribution: smaller is less even")
    parser.add_argument("--masked", action="store_true", help="mask the questions first, as a device does")
    parser.add_argument("--seed", type=int, default=0, help="of the shares and the first release; noise has none")
    given = parser.parse_args(arguments)
    measured: dict[str, float] = {}
    try:
        with scratch() as folder:
            federation = federate(folder, given.clients, given.alpha, given.seed, mask=given.masked)
            if not given.no_dp:
                measured |= private(federation, _plan(given.epsilon or 8.0, given.rounds), given.seed)
            if given.no_dp or given.epsilon is None:
                measured |= plain(federation, _plan(None, given.rounds), given.seed)
    except FedloopError as error:
        print(f"error: {error.message}" + (f" ({error.hint})" if error.hint else ""), file=sys.stderr)
        return error.exit_status
    print(f"| banking77, {given.clients} clients, {given.rounds} rounds | accuracy on {len(federation.test.texts):,} questions |")
    print("| --- | --- |")
    for name, accuracy in measured.items():
        print(f"| {name} | {accuracy:.4f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
