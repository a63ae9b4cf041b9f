"""A personal layer: what one person's examples add to a release, trained for their device alone and without noise.

Only what a round may leave frozen stays so: the A factors. So the layer is an adapter of the release's rank and targets with a B
of its own, that acts on top of every release that has the same A.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, Final, NamedTuple

from fedloop_events.blobs.tensors import Array
from fedloop_events.errors import UsageError

from fedloop_tasks.programs.adapter import Trains
from fedloop_tasks.table import program_of

LEAST_EXAMPLES: Final = 10
HELD_OUT: Final = 5
"""Every so manieth example is not trained on, but measured with."""
MOST_EPOCHS: Final = 8
BATCH: Final = 8
_MEASURED_TOKENS: Final = 2048


class Trained(NamedTuple):
    """What training found: `change` is what it adds to the release's tensors, empty if the mean loss of the held-out examples
    does not fall."""

    change: dict[str, Array]
    examples: int
    held_out: int
    loss_before: float
    loss_after: float
    """With the change; without one, after the only pass that was made."""


def trained(model: Trains, examples: Sequence[Any]) -> Trained:
    """Trains the model, which holds a release, in place, one pass after another as long as the loss on the held-out examples
    falls.

    Raises `UsageError` for fewer than `LEAST_EXAMPLES`.
    """
    import numpy as np

    if len(examples) < LEAST_EXAMPLES:
        raise UsageError(
            f"a personal layer needs {LEAST_EXAMPLES} examples, and this device has {len(examples)}",
            hint="give more feedback, and let the agent run, which masks it",
        )
    order = [examples[i] for i in np.random.default_rng(0).permutation(len(examples))]
    known, held_out = [each for n, each in enumerate(order) if n % HELD_OUT], order[::HELD_OUT]
    base = model.arrays(program_of("ffa").upload(list(model.arrays())))  # as a round that leaves A, and what is fixed, as it is
    before = best = loss = _loss(model, held_out, base)
    if not math.isfinite(before):
        raise UsageError("no example that was held out can be used: the answers are too long for the model")
    change: dict[str, Array] = {}
    for epoch in range(MOST_EPOCHS):
        _pass(model, known, base, epoch)
        loss = _loss(model, held_out, base)
        if not loss < best:
            break
        best = loss
        change = {name: values - base[name] for name, values in model.arrays(list(base)).items()}
    return Trained(change, len(known), len(held_out), before, best if change else loss)


def added(release: Mapping[str, Array], change: Mapping[str, Array]) -> dict[str, Array]:
    """The release with the layer on top."""
    return {name: values + change[name] if name in change else values for name, values in release.items()}


def _pass(model: Trains, examples: Sequence[Any], names: Mapping[str, Array], seed: int) -> None:
    import torch
    from fedloop_privacy.dp.dpsgd import plain_sgd

    with model.training(examples, list(names), model.hyperparameters(private=False)) as training:
        if training is not None:
            adam = partial(torch.optim.AdamW, weight_decay=0.0)
            plain_sgd(*training, epochs=1, batch_size=BATCH, seed=seed, make_optimizer=adam)


def _loss(model: Trains, examples: Sequence[Any], names: Mapping[str, Array]) -> float:
    """The mean over the examples; NaN if none of them can be used."""
    import torch

    from fedloop_tasks.models.kept import batches

    with model.training(examples, list(names), model.hyperparameters(private=False)) as training:
        assert training is not None  # no learning rate of a model's own is 0
        module, _, ready, losses = training
        with torch.no_grad():
            found = [losses(module, ready.collate(batch)) for batch in batches(ready.lengths, _MEASURED_TOKENS)]
    return float(torch.cat(found).mean()) if found else float("nan")
