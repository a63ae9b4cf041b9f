"""What a chat learns from corrected answers: questions about financial reports (TAT-QA, Zhu et al. 2021, arXiv 2105.07624).

Of each question the paragraphs that its answer stands in are given, and the answer is a piece of them. The held-out questions are
of other reports, and every device has reports of its own. The peer is the base model.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from itertools import chain
from typing import Final

from fedloop_events.blobs.store import BlobStore
from fedloop_tasks.causal.examples import Example
from fedloop_tasks.causal.plan import ChatPlan
from fedloop_tasks.turns import Turn

from benchmarks.chat_rounds import dealt, learn, loss_per_token, smollm2
from benchmarks.harness import MIN_RUNS, Row, costs, data_set, scratch

DEVICES: Final = 3
HELD_OUT: Final = 3
"""Every third report."""
AT_MOST: Final = 0.60


def tatqa() -> list[list[Example]]:
    """Of each report the questions whose answer is one piece of its paragraphs."""
    found = []
    for report in json.loads(gzip.decompress(data_set("finance/tatqa_dev.json.gz").read_bytes())):
        paragraphs = {str(each["order"]): each["text"] for each in report["paragraphs"]}
        examples = []
        for asked in report["questions"]:
            if (asked["answer_type"], asked["answer_from"]) == ("span", "text") and len(asked["answer"]) == 1:
                given = "\n".join(paragraphs[each] for each in asked["rel_paragraphs"])
                examples.append(Example((Turn("user", f"{given}\n\n{asked['question']}"),), asked["answer"][0]))
        if examples:
            found.append(examples)
    return found


def rows(quick: bool) -> Iterator[Row]:
    """Loss per token after the rounds against the base's and the bound; a run each first release and deal of the reports."""
    runs, plan = MIN_RUNS, ChatPlan(epsilon=None, planned_rounds=2, local_epochs=2, local_batch=8)
    reports = tatqa()
    if quick:
        runs, plan, reports = 1, ChatPlan(epsilon=None, planned_rounds=1), reports[:6]
    held_out = list(chain.from_iterable(reports[::HELD_OUT]))
    known = [each for n, each in enumerate(reports) if n % HELD_OUT]
    pairs = []
    with scratch() as folder:
        model = smollm2(folder)
        model.load(model.initial_arrays(0))
        before = loss_per_token(model, held_out)
        for run in range(runs):
            shares = [list(chain.from_iterable(share)) for share in dealt(known, DEVICES, run)]
            learn(model, shares, plan, run, BlobStore(folder / "blobs"))
            pairs.append((loss_per_token(model, held_out), before))
    what = f"TAT-QA answers, {DEVICES} devices, no DP: loss per token"
    yield costs(what, "the base model", pairs, "nats")
    yield costs(what, "the bound", [(after, AT_MOST) for after, _ in pairs], "nats", 1.0)
