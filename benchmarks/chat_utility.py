"""What private federated learning is worth to a language model: banking77's intents, written as words by SmolLM2-135M-Instruct.

`python -m benchmarks.chat_utility [--epsilon 8 | --no-dp] [--rounds N] [--clients 10] [--alpha .5] [--seed 0] [--base-dtype f32]`

Devices hold Dirichlet(alpha) shares of the training questions, and train with the defaults of a chat's plan. Without privacy
they begin with the base model. Under it they begin with what the model has learnt of a few public questions of each intent, which
are on no device; that first release alone is what the private rounds have to beat. Each device adds its own noise. A last figure
is of a simulation: together the devices add as much noise as each of them does otherwise, as under secure aggregation, which is
not there. An answer is an exact match if the model would write just the intent, its end included.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
from fedloop_events.blobs.store import BlobStore
from fedloop_events.errors import FedloopError
from fedloop_privacy.dp.accounting import epsilon
from fedloop_tasks.causal.examples import Example
from fedloop_tasks.causal.model import CausalModel
from fedloop_tasks.causal.plan import ChatPlan
from fedloop_tasks.causal.task import Chat
from fedloop_tasks.models import registry
from fedloop_tasks.precision import BaseDtype
from fedloop_tasks.task import Arrays, Material, Message, Terms
from fedloop_tasks.turns import Turn
from msgspec.structs import replace

from benchmarks.federation import Federation, dirichlet, model_of
from benchmarks.harness import MIN_RUNS, Row, costs, rates, scratch
from benchmarks.utility import DELTA, Questions, banking77

CACHE_BYTES: Final = 6 << 30  # what is kept of every question stays in memory
PLAIN_ROUNDS: Final = 5
AT_LEAST: Final = {"plain": 0.60, "private": 0.52, "shared": 0.58}
AT_MOST: Final = 0.40


class Size(NamedTuple):
    """How many questions of each intent there are of each kind (None: all that are left), and of how many intents."""

    public: int = 3
    held_out: int = 10
    private: int | None = None
    intents: int | None = None


WHOLE, QUICK = Size(), Size(public=1, held_out=1, private=4, intents=6)


class Chats(Federation[CausalModel]):
    """Devices with their questions, whose intents a language model learns to write."""

    def __init__(
        self, model: CausalModel, first: Arrays, shares: Sequence[Sequence[Example]], test: Sequence[Example], blobs: BlobStore
    ) -> None:
        super().__init__(model, shares, blobs)
        self.first, self._test = first, model.encoded(test)

    def measured(self, release: Arrays) -> dict[str, float]:
        self.model.load(model_of(release))
        found = self.model.scores(self._test)
        return {
            "exact match": sum(each.exact for each in found) / len(found),
            "loss per token": sum(each.loss for each in found) / sum(each.tokens for each in found),
        }


def private(federation: Chats, plan: ChatPlan) -> dict[str, float]:
    """Exact matches at the budget of `plan`: of the first release, of rounds where each device adds its own noise, and where all
    together add the noise of one."""
    assert plan.epsilon is not None
    terms = plan.terms(plan.merge, plan.mechanisms()[plan.merge])
    assert terms.mechanism is not None
    spent = epsilon([terms.mechanism] * plan.planned_rounds, plan.delta)
    print(f"epsilon {spent:.3f} of {plan.epsilon:g} a client, delta {plan.delta:g}", file=sys.stderr)

    def exact(release: Arrays) -> float:
        return federation.measured(release)["exact match"]

    first, last = federation.first, plan.planned_rounds
    return {
        "public examples alone: exact match": exact(first),
        "each device its own noise: exact match": exact(federation.rounds(1, last, first, terms)),
        "simulated, noise shared: exact match": exact(
            federation.rounds(1, last, first, noise_shared(terms, len(federation.shares)))
        ),
    }


def noise_shared(terms: Terms, clients: int) -> Terms:
    """The terms under which the sum of all clients' noise is as large as one client's was. No client is protected by its own."""
    assert terms.mechanism is not None
    less = terms.mechanism.noise_multiplier / math.sqrt(clients)
    return replace(terms, mechanism=replace(terms.mechanism, noise_multiplier=less))


def plain(federation: Chats, plan: ChatPlan, seed: int) -> dict[str, float]:
    """Without differential privacy and without public examples, from the base model."""
    base = dict(federation.model.initial_arrays(seed))
    release = federation.rounds(1, plan.planned_rounds, base, plan.terms(plan.merge, None))
    return {f"no privacy: {name}": value for name, value in federation.measured(release).items()}


def federate(
    folder: Path,
    clients: int,
    alpha: float,
    size: Size,
    *,
    base_model: str = Chat.base_model,
    model_dir: Path | None = None,
    base_dtype: BaseDtype = "f32",
) -> Callable[[int], Chats]:
    """Makes the federation of a seed, which decides what is public, who holds what, and the first release. What the frozen part
    of the model gives of a question is kept from one to the next."""
    training, test = banking77("train"), banking77("test")
    model: CausalModel | None = None
    if model_dir is None:
        model_dir = folder / "models"
        registry.add(base_model, model_dir=model_dir)

    def made(seed: int) -> Chats:
        nonlocal model
        public, kept = split(training, size, seed)
        shares = [examples(kept.take(share)) for share in dirichlet(kept.labels, clients, alpha, seed)]
        held_out = test.take(spread(test.labels, size.held_out, size.intents, 0))
        known = [Message(text, words(label)) for text, label in zip(public.texts, public.labels, strict=True)]
        spec, first = Chat.make(Material([], [], {}, public=known), base_model, model_dir, seed)
        model = model or CausalModel(spec, model_dir=model_dir, cache_bytes=CACHE_BYTES, base_dtype=base_dtype)
        return Chats(model, first, shares, examples(held_out), BlobStore(folder))

    return made


def split(questions: Questions, size: Size, seed: int) -> tuple[Questions, Questions]:
    """Those that are public, and those that devices hold: none is both."""
    public = spread(questions.labels, size.public, size.intents, seed)
    held = None if size.private is None else size.public + size.private
    rest = set(spread(questions.labels, held, size.intents, seed)) - set(public)
    return questions.take(public), questions.take(sorted(rest))


def spread(labels: Sequence[str], each: int | None, intents: int | None, seed: int) -> list[int]:
    """Indices of `each` questions of every label (None: all), drawn from the seed; fewer are the first of more."""
    random = np.random.default_rng(seed)
    found: list[int] = []
    for label in sorted(set(labels))[:intents]:
        found += random.permutation(np.flatnonzero([other == label for other in labels]))[:each].tolist()
    return found


def examples(questions: Questions) -> list[Example]:
    return [Example((Turn("user", text),), words(label)) for text, label in zip(questions.texts, questions.labels, strict=True)]


def words(label: str) -> str:
    """The intent as it is to be written."""
    return label.replace("_", " ")


def private_plan(budget: float, rounds: int | None) -> ChatPlan:
    """The server's defaults: learning rates were chosen with other test questions of this set, which public data allows."""
    plan = ChatPlan(epsilon=budget, delta=DELTA)
    return plan if rounds is None else replace(plan, planned_rounds=rounds)


def plain_plan(rounds: int | None) -> ChatPlan:
    return ChatPlan(epsilon=None, planned_rounds=rounds or PLAIN_ROUNDS)


def rows(quick: bool) -> Iterator[Row]:
    """Against the public examples alone, and against the bounds; each run has its own shares, first release and noise."""
    rounds, clients, size, runs = (1, 2, QUICK, 1) if quick else (None, 10, WHOLE, MIN_RUNS)
    with scratch() as folder:
        made = federate(folder, clients, 0.5, size)
        found = [
            private(each, private_plan(8.0, rounds)) | plain(each, plain_plan(rounds), run)
            for run, each in ((run, made(run)) for run in range(runs))
        ]
    public, own, shared, exact, loss = zip(*(each.values() for each in found), strict=True)
    what = "banking77 as words at epsilon 8, each device its own noise: exact match"
    yield rates(what, "public examples alone", zip(own, (max(each, 1e-9) for each in public), strict=True), "of all")
    yield rates(what, "the bound", [(each, AT_LEAST["private"]) for each in own], "of all", 1.0)
    what = "the same, simulated: noise shared as by secure aggregation"
    yield rates(what, "the bound", [(each, AT_LEAST["shared"]) for each in shared], "of all", 1.0)
    what = f"without privacy, {PLAIN_ROUNDS} rounds"
    yield rates(f"{what}: exact match", "the bound", [(each, AT_LEAST["plain"]) for each in exact], "of all", 1.0)
    yield costs(f"{what}: loss per token", "the bound", [(each, AT_MOST) for each in loss], "nats", 1.0)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chat_utility", description=__doc__.splitlines()[0])
    budget = parser.add_mutually_exclusive_group()
    budget.add_argument("--epsilon", type=float, help="with this budget alone (default: 8, and without privacy)")
    budget.add_argument("--no-dp", action="store_true", help="without differential privacy alone")
    parser.add_argument("--rounds", type=int, help=f"default: those of the plan, and {PLAIN_ROUNDS} without privacy")
    parser.add_argument("--clients", type=int, default=10)
    parser.add_argument("--alpha", type=float, default=0.5, help="of the Dirichlet distribution: smaller is less even")
    parser.add_argument("--seed", type=int, default=0, help="of the shares and the first release; noise has none")
    parser.add_argument("--base-dtype", choices=["f32", "bf16", "nf4"], default="f32", help="of the frozen base on the devices")
    parser.add_argument("--quick", action="store_true", help="few questions, to see that it runs")
    given = parser.parse_args(arguments)
    measured: dict[str, float] = {}
    try:
        with scratch() as folder:
            size = QUICK if given.quick else WHOLE
            federation = federate(folder, given.clients, given.alpha, size, base_dtype=given.base_dtype)(given.seed)
            if not given.no_dp:
                measured |= private(federation, private_plan(given.epsilon or 8.0, given.rounds))
            if given.no_dp or given.epsilon is None:
                measured |= plain(federation, plain_plan(given.rounds), given.seed)
    except FedloopError as error:
        print(f"error: {error.message}" + (f" ({error.hint})" if error.hint else ""), file=sys.stderr)
        return error.exit_status
    print(f"| banking77 as words, {given.clients} clients | held-out questions |")
    print("| --- | --- |")
    for name, value in measured.items():
        print(f"| {name} | {value:.4f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
