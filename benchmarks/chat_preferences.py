"""What a chat learns without answers that are written for it: which of two replies is better, and which reply was good.

hh's pairs (Bai et al. 2022, arXiv 2204.05862) on devices. A held-out pair is ranked right if training has made the chosen reply
more probable, against the base model, than the rejected one (`preference_accuracy`). The peer is the base itself, which ranks by
how probable it finds a token of each. An adapter that learns one narrow thing may harm all else, so the loss on answers to school
mathematics stands beside.

`python -m benchmarks.chat_preferences [--only DPO] [--pairs 1200] [--tokens 256] [--seed 0]` makes one run of one way to learn.
"""

from __future__ import annotations

import argparse
import gzip
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from fedloop_events.blobs.store import BlobStore
from fedloop_events.errors import FedloopError, UsageError
from fedloop_tasks.causal import corpus
from fedloop_tasks.causal.examples import Example, Judged, Pair
from fedloop_tasks.causal.model import CausalModel
from fedloop_tasks.causal.plan import ChatPlan
from fedloop_tasks.turns import Turn
from msgspec.structs import replace

from benchmarks.chat_rounds import dealt, learn, loss_per_token, smollm2
from benchmarks.harness import MIN_RUNS, Row, costs, data_set, rates, scratch

DEVICES: Final = 3
PAIRS: Final = 1200
"""That the devices have; the others are held out."""
TOKENS: Final = 256
"""Of a prompt with a reply at most, of which the reply has two fifths at most: longer pairs are left out."""
GENERAL: Final = 24
"""Answers to school mathematics."""
AT_LEAST: Final = {"DPO": 0.61, "KTO": 0.59}
MARGIN: Final = 0.05
"""By how much of itself the loss on general answers may rise, about."""
PLANS: Final = {
    "DPO": ChatPlan(epsilon=None, planned_rounds=1, local_batch=8),
    "KTO": ChatPlan(epsilon=None, planned_rounds=1, local_batch=8, lora_lr=0.0005),
    "DPO at epsilon 8": ChatPlan(epsilon=8.0, nominal_examples=PAIRS // DEVICES),
}


class Measured(NamedTuple):
    """Of a release."""

    right: float
    """The part of the held-out pairs that are ranked right."""
    general: float
    """Loss per token on the answers to school mathematics."""


class Experiment:
    """A model, pairs of which the first ones are learnt and the others held out, and a place for updates."""

    def __init__(self, folder: Path, pairs: int, tokens: int, general: int) -> None:
        self._model, self._blobs = smollm2(folder), BlobStore(folder / "blobs")
        found = hh(self._model, tokens)
        self._known, self.held_out, self._general = found[:pairs], found[pairs:], gsm8k(general)
        if not self.held_out:
            raise UsageError(f"there are {len(found)} such pairs, so {pairs} leave none to be held out")
        self._model.load(self._model.initial_arrays(0))
        self.base = self._measured()

    def run(self, name: str, plan: ChatPlan, seed: int) -> Measured:
        """What a way to learn makes of the base; the first release and who has which pairs follow from the seed."""
        given = dealt(self._known, DEVICES, seed)
        shares = [thumbs(share) for share in given] if name == "KTO" else given
        learn(self._model, shares, plan, seed, self._blobs)
        return self._measured()

    def _measured(self) -> Measured:
        margins = self._model.preferences(self.held_out)
        return Measured(sum(each > 0 for each in margins) / len(margins), loss_per_token(self._model, self._general))


def hh(model: CausalModel, tokens: int) -> list[Pair]:
    """The pairs that are short enough, of each conversation's beginning the first one, so that no two parts share a prompt."""
    found: dict[str, Pair] = {}
    for row in corpus.read(data_set("preferences/hh_harmless_test.jsonl.gz")).rows:
        assert row.rejected is not None
        turns = (*row.earlier, Turn("user", row.text))
        answer = max(len(model.chat.answer(each)) for each in (row.answer, row.rejected))
        if answer <= tokens * 2 // 5 and len(model.chat.prompt(turns)) + answer <= tokens:
            found.setdefault(turns[0].content, Pair(turns, row.answer, row.rejected))
    return list(found.values())


def thumbs(pairs: Sequence[Pair]) -> list[Judged]:
    """Both replies of each pair, judged by themselves."""
    return [Judged(each.turns, answer, good) for each in pairs for answer, good in ((each.chosen, True), (each.rejected, False))]


def gsm8k(n: int) -> list[Example]:
    """`n` questions of school mathematics (Cobbe et al. 2021, arXiv 2110.14168), spread over the file, and worked answers."""
    rows = [json.loads(line) for line in gzip.decompress(data_set("education/gsm8k_train.jsonl.gz").read_bytes()).splitlines()]
    return [Example((Turn("user", row["question"]),), row["answer"]) for row in (rows[i * len(rows) // n] for i in range(n))]


def rows(quick: bool) -> Iterator[Row]:
    """Each way to learn against the base and the bounds."""
    runs, pairs, tokens, general = (1, 6, 64, 2) if quick else (MIN_RUNS, PAIRS, TOKENS, GENERAL)
    with scratch() as folder:
        experiment = Experiment(folder, pairs, tokens, general)
        for name, plan in PLANS.items():
            taken = replace(plan, planned_rounds=1) if quick else plan
            yield from compared(name, experiment.base, [experiment.run(name, taken, run) for run in range(runs)])


def compared(name: str, base: Measured, found: Sequence[Measured]) -> Iterator[Row]:
    """What a way to learn has made of the base, with its bounds, if it has some."""
    what = f"hh, {DEVICES} devices, {name}: held-out pairs ranked right"
    bound = AT_LEAST.get(name)
    yield rates(what, "the base model", [(each.right, base.right) for each in found], "of all")
    if bound is not None:
        yield rates(what, "the bound", [(each.right, bound) for each in found], "of all", 1.0)
    yield costs(
        f"hh, {DEVICES} devices, {name}: loss per token of gsm8k answers",
        "the base model",
        [(each.general, base.general) for each in found],
        "nats",
        None if bound is None else 1 - MARGIN,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.chat_preferences", description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=PLANS, default="DPO", metavar="WAY", help=f"of {', '.join(PLANS)}")
    parser.add_argument("--pairs", type=int, default=PAIRS, help="that the devices have; the others are held out")
    parser.add_argument("--tokens", type=int, default=TOKENS, help="of a prompt with a reply at most")
    parser.add_argument("--seed", type=int, default=0, help="of the shares and the first release; noise has none")
    given = parser.parse_args(arguments)
    try:
        with scratch() as folder:
            experiment = Experiment(folder, given.pairs, given.tokens, GENERAL)
            after = experiment.run(given.only, PLANS[given.only], given.seed)
    except FedloopError as error:
        print(f"error: {error.message}" + (f" ({error.hint})" if error.hint else ""), file=sys.stderr)
        return error.exit_status
    print(f"| {given.only}, {given.pairs:,} pairs | before | after |")
    print("| --- | --- | --- |")
    print(f"| of {len(experiment.held_out):,} held-out pairs ranked right | {experiment.base.right:.3f} | {after.right:.3f} |")
    print(f"| loss per token of gsm8k answers | {experiment.base.general:.3f} | {after.general:.3f} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
