"""The most memory that a language model takes in this process while it is loaded and trained (Linux): run with its folder, its
own settings, and what its examples are like. Prints that, and what was expected of it, in bytes."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import tiny_models as tiny
import torch
from fedloop_events.types import Mechanism
from fedloop_privacy.dp.dpsgd import MICRO_BATCH_TOKENS, ParameterGroup, dp_sgd
from fedloop_tasks.causal import memory
from fedloop_tasks.causal.chat import Encoded
from fedloop_tasks.causal.model import CausalModel, describe
from fedloop_tasks.causal.preferences import SETTINGS, EncodedFeedback, FeedbackExamples, losses
from fedloop_tasks.causal.training import PROMPT_TOKENS, Answers

_KEPT: Final = 32 * 2**20


def most_bytes() -> int:
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def train(folder: Path, settings: Mapping[str, Any], acting: int, before: int) -> CausalModel:
    """A step on two micro-batches of examples of random tokens, `acting` of which adapters act on, after `before`."""
    model = CausalModel(describe(folder.name, model_dir=folder, **settings), model_dir=folder, device="cpu", cache_bytes=_KEPT)
    model.load(model.initial_arrays(0))
    random = torch.Generator().manual_seed(0)
    rows = 2 * max(1, MICRO_BATCH_TOKENS // (acting + before // PROMPT_TOKENS))
    texts = torch.randint(3, 300, (rows, acting + before + 1), generator=random).tolist()
    learnt = [EncodedFeedback((Encoded(ids, before + acting // 2, 0, before),), sft=1.0) for ids in texts]
    with model.trainable(list(model.shapes)) as chosen:
        taken = FeedbackExamples(learnt, lambda given: Answers(given, model.states), _no_reference, SETTINGS)
        terms = Mechanism(sampling_rate=1.0, noise_multiplier=1.0, clip_norm=1.0, steps=1, divisor=1.0)
        dp_sgd(model.tail, [ParameterGroup(list(chosen.values()), 0.0)], taken, losses, terms)
    return model


def _no_reference(given: Sequence[Encoded]) -> list[float]:
    return [0.0] * len(given)


def main(folder: Path, settings: Mapping[str, Any], acting: int, before: int) -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:  # what is imported and made once is no part of it
        train(tiny.save(Path(place) / "tiny"), {"layers": 1}, 4, 4)
    found = most_bytes()
    model = train(folder, settings, acting, before)
    base = memory.sizes(folder)
    expected = base.weights_bytes + memory.training_bytes(base, model.spec, _KEPT)
    print(json.dumps({"measured": most_bytes() - found, "expected": expected, "weights": base.weights_bytes}))


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
