"""What a chat learns without answers that are written for it: which of two replies is better, and which reply was good.

hh's pairs (Bai et al. 2022, arXiv 2204.05862) on devices. A held-out pair is ranked right if training has made the chosen reply
more probable, against the base model, than the rejected one (`preference_accuracy`). The peer is the base itself, which ranks by
how probable it finds a token of each. An adapter that learns one narrow thing may harm all else, so the loss on answers to school
mathematics stands beside.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Sequence
from typing import Final, NamedTuple

from fedloop_events.blobs.store import BlobStore
from fedloop_tasks.causal import corpus
from fedloop_tasks.causal.examples import Example, Judged, Pair
from fedloop_tasks.causal.model import CausalModel
from fedloop_tasks.causal.plan import ChatPlan
from fedloop_tasks.turns import Turn
from msgspec.structs import replace

from benchmarks.chat_rounds import Devices, dealt, loss_per_token, smollm2
from benchmarks.harness import MIN_RUNS, Row, costs, data_set, rates, scratch

DEVICES: Final = 3
KNOWN: Final = 500
"""Pairs that the devices have; the others are held out."""
GENERAL: Final = 24
"""Answers to school mathematics."""
TOKENS: Final = 160
ANSWER_TOKENS: Final = 64
"""Of a prompt with a reply, and of a reply, at most: longer pairs are left out."""
AT_LEAST: Final = {"DPO": 0.61, "KTO": 0.59}
MARGIN: Final = 0.05
"""By how much of itself the loss on general answers may rise, about."""
PLANS: Final = {
    "DPO": ChatPlan(epsilon=None, planned_rounds=2, local_batch=8),
    "KTO": ChatPlan(epsilon=None, planned_rounds=2, local_batch=16, lora_lr=0.0003),
    "DPO at epsilon 8": ChatPlan(epsilon=8.0, nominal_examples=150),
}

QUICK: Final = {name: replace(plan, planned_rounds=1) for name, plan in PLANS.items()}


def hh(model: CausalModel) -> list[Pair]:
    """The pairs that are short enough, of each conversation's beginning the first one, so that no two parts share a prompt."""
    found: dict[str, Pair] = {}
    for row in corpus.read(data_set("preferences/hh_harmless_test.jsonl.gz")).rows:
        assert row.rejected is not None
        turns = (*row.earlier, Turn("user", row.text))
        answer = max(len(model.chat.answer(each)) for each in (row.answer, row.rejected))
        if answer <= ANSWER_TOKENS and len(model.chat.prompt(turns)) + answer <= TOKENS:
            found.setdefault(turns[0].content, Pair(turns, row.answer, row.rejected))
    return list(found.values())


def thumbs(pairs: Sequence[Pair]) -> list[Judged]:
    """Both replies of each pair, judged by themselves."""
    return [Judged(each.turns, answer, good) for each in pairs for answer, good in ((each.chosen, True), (each.rejected, False))]


def gsm8k(n: int) -> list[Example]:
    """`n` questions of school mathematics (Cobbe et al. 2021, arXiv 2110.14168), spread over the file, and worked answers."""
    rows = [json.loads(line) for line in gzip.decompress(data_set("education/gsm8k_train.jsonl.gz").read_bytes()).splitlines()]
    return [Example((Turn("user", row["question"]),), row["answer"]) for row in (rows[i * len(rows) // n] for i in range(n))]


class Measured(NamedTuple):
    """What is measured of a release."""

    right: float
    """The part of the held-out pairs."""
    general: float
    """Loss per token on the answers to school mathematics."""


def measured(model: CausalModel, held_out: Sequence[Pair], general: Sequence[Example]) -> Measured:
    margins = model.preferences(held_out)
    return Measured(sum(each > 0 for each in margins) / len(margins), loss_per_token(model, general))


def rows(quick: bool) -> Iterator[Row]:
    """Each way to learn against the base and the bounds; a run each first release and deal of the pairs."""
    runs, plans, known, general = (1, QUICK, 6, 2) if quick else (MIN_RUNS, PLANS, KNOWN, GENERAL)
    with scratch() as folder:
        model = smollm2(folder)
        pairs, mathematics = hh(model), gsm8k(general)
        pairs, held_out = pairs[:known], pairs[known : 2 * known] if quick else pairs[known:]
        model.load(model.initial_arrays(0))
        base = measured(model, held_out, mathematics)
        for name, plan in plans.items():
            found = []
            for run in range(runs):
                given = dealt(pairs, DEVICES, run)
                shares = [thumbs(share) for share in given] if name == "KTO" else given
                Devices(model, shares, BlobStore(folder / "blobs")).learn(plan, run)
                found.append(measured(model, held_out, mathematics))
            yield from compared(name, base, found)


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
