"""DP-SGD (Abadi et al. 2016) over the trainable parameters of a model, and the same loop without privacy.

What one call of `dp_sgd` releases is the model: under add/remove-one-example adjacency it costs exactly its `terms`. Nothing
in it is computed from how many examples there are, and the path taken does not depend on them: `steps` steps, each on a
Poisson sample at `sampling_rate`, each adding noise, also when nobody was sampled. Time and memory do depend on them.

This is the one file that touches Opacus's private corners, as read in Opacus 1.6.0: `GradSampleHooks.cleanup`, the
attributes its hooks leave on modules, and `DPOptimizer.add_noise`, `scale_grad`, `summed_grad`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np
import torch
from fedloop_events.errors import FedloopError
from fedloop_events.types import Mechanism
from numpy.typing import NDArray
from opacus.grad_sample.grad_sample_module import GradSampleHooks
from opacus.grad_sample.gsm_base import OPACUS_PARAM_MONKEYPATCH_ATTRS
from opacus.optimizers import DPOptimizer
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from fedloop_privacy.dp.accounting import validate
from fedloop_privacy.dp.noise import SYSTEM, RandomSource, gaussian, poisson_sample

MICRO_BATCH_TOKENS = 256
"""Padded tokens that go through the model at once, by default: small pieces hold little padding, which is what a CPU pays
for; an accelerator wants larger ones."""

_MIXING_TOLERANCE = 1e-2  # far above float32 and TF32 rounding, far below what a batch-wide average does
_MIXING_TOLERANCE_ROUNDED = 0.2  # in bfloat16 a sum is rounded by the percent, and otherwise in another batch

Batch = TypeVar("Batch")
Batch_co = TypeVar("Batch_co", covariant=True)


class TrainingError(FedloopError):
    """The model, or what it computes, cannot be trained correctly; nothing of a private step was applied."""


class Examples(Protocol[Batch_co]):
    """What there is to train on."""

    @property
    def lengths(self) -> Sequence[int]:
        """Tokens of each example; as many as there are examples."""
        ...

    def collate(self, indices: Sequence[int]) -> Batch_co:
        """The batch of these examples, at least one, padded to the longest of them."""
        ...


@runtime_checkable
class SeveralRows(Protocol):
    """Examples of which some are several rows of what goes through the model, as a pair of answers is.

    A batch holds the rows of an example one after another, in the order of its examples. They share one clipped gradient.
    """

    @property
    def row_counts(self) -> Sequence[int]:
        """Of each example, at least 1."""
        ...


Forward = Callable[[Any, Batch], Tensor]
"""(model, batch) -> one loss for each example, shape [B]. No example's loss may depend on another example: a language
model's loss is the mean over that example's own tokens."""


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate."""

    parameters: Sequence[nn.Parameter]
    learning_rate: float


def dp_sgd(
    model: nn.Module,
    groups: Sequence[ParameterGroup],
    examples: Examples[Batch],
    forward: Forward[Batch],
    terms: Mechanism,
    *,
    source: RandomSource = SYSTEM,
    micro_batch_tokens: int = MICRO_BATCH_TOKENS,
    on_step: Callable[[int], None] | None = None,
) -> int:
    """Train `model` in place by plain SGD on noisy sums of clipped per-example gradients; returns `terms.steps`.

    Each step draws a Poisson sample, clips each sampled example's gradient over all groups together to L2 norm
    `terms.clip_norm`, adds N(0, (noise_multiplier x clip_norm)^2) to each coordinate of the sum in float64, and divides by
    `terms.divisor`. The sample is sorted by length and cut into micro-batches, each padded to its own longest example, which
    changes no clipped gradient; an example of several rows (`SeveralRows`) is clipped as a whole. The model trains on the
    device it is on, in train mode with dropout off, and is handed back in the mode it came in, without hooks. `on_step(n)` is
    called after step n, counted from 1.

    Raises MechanismError for invalid terms, and TrainingError for a model whose per-example gradients would be wrong (batch
    normalisation, gradient checkpointing, DoRA, LoRA on embeddings, a trainable parameter in no group or not reached by the
    loss), for a loss of another shape than [B], or for one that is not finite. The model is then left between two steps.
    """
    validate(terms)
    _check_groups(model, groups)
    _check_model(model)
    lengths, rows = _sizes(examples)
    mixing_checked = False
    with _training_mode(model), _per_example_gradients(model):
        optimizer = _PrivateSGD(groups, terms, source)
        for step in range(1, terms.steps + 1):
            sample = poisson_sample(len(lengths), terms.sampling_rate, source)
            for indices in _micro_batches(sample, lengths, rows, micro_batch_tokens):
                losses = _losses(model, examples, forward, indices)
                if len(indices) > 1 and not mixing_checked:
                    _check_alone(model, examples, forward, indices, losses)
                    mixing_checked = True
                torch.autograd.backward(losses.sum())
                _gather_gradients(model, rows[indices])
                optimizer.accumulate()
            optimizer.release()
            if on_step is not None:
                on_step(step)
    return terms.steps


def plain_sgd(
    model: nn.Module,
    groups: Sequence[ParameterGroup],
    examples: Examples[Batch],
    forward: Forward[Batch],
    *,
    epochs: int,
    batch_size: int,
    seed: int,
    micro_batch_tokens: int = MICRO_BATCH_TOKENS,
    make_optimizer: Callable[[list[dict[str, Any]]], torch.optim.Optimizer] = torch.optim.SGD,
    on_step: Callable[[int], None] | None = None,
) -> int:
    """The same without any privacy: `epochs` shuffled passes, mean loss of each batch; returns the number of steps.

    The order follows from `seed`. Raises TrainingError as `dp_sgd` does for a loss of another shape than [B] or not finite.
    """
    _check_groups(model, groups)
    lengths, rows = _sizes(examples)
    order = np.random.default_rng(seed)
    step = 0
    with _training_mode(model):
        optimizer = make_optimizer(_torch_groups(groups))
        for _ in range(epochs):
            shuffled = order.permutation(len(lengths))
            for batch in np.split(shuffled, range(batch_size, len(shuffled), batch_size)) if len(shuffled) else []:
                optimizer.zero_grad()
                for indices in _micro_batches(batch, lengths, rows, micro_batch_tokens):
                    losses = _losses(model, examples, forward, indices)
                    torch.autograd.backward(losses.sum() / len(batch))
                optimizer.step()
                step += 1
                if on_step is not None:
                    on_step(step)
        optimizer.zero_grad()
    return step


def example_gradients(
    model: nn.Module,
    parameters: Sequence[nn.Parameter],
    examples: Examples[Batch],
    forward: Forward[Batch],
    indices: Sequence[int],
) -> list[Tensor]:
    """What `dp_sgd` clips: for each of the parameters, which must be all that are trainable, the examples' gradients [B, ...].

    They come from one batch; a model can be checked by comparing them with those of each example by itself. Raises TrainingError
    as `dp_sgd` does.
    """
    _check_model(model)
    _, rows = _sizes(examples)
    with _training_mode(model), _per_example_gradients(model):
        torch.autograd.backward(_losses(model, examples, forward, np.asarray(indices)).sum())
        _gather_gradients(model, rows[np.asarray(indices)])
        return [getattr(p, "grad_sample").detach().clone() for p in parameters]  # noqa: B009  # Opacus's, unknown to nn.Parameter


class _PrivateSGD(DPOptimizer):  # type: ignore[misc]
    """Opacus's clipping and accumulation, with our noise and our divisor."""

    def __init__(self, groups: Sequence[ParameterGroup], terms: Mechanism, source: RandomSource) -> None:
        super().__init__(
            torch.optim.SGD(_torch_groups(groups), lr=0.0),
            noise_multiplier=terms.noise_multiplier,
            max_grad_norm=terms.clip_norm,
            expected_batch_size=None,
            loss_reduction="sum",
        )
        self._divisor, self._source = terms.divisor, source

    def accumulate(self) -> None:
        """Clip the per-example gradients of one micro-batch and add them to the step's sum."""
        self.clip_and_accumulate()
        for p in self.params:
            p.grad_sample = p.grad = None

    def release(self) -> None:
        """Add noise to the step's sum, update the parameters, and start the next sum at zero."""
        self.add_noise()
        self.original_optimizer.step()
        for p in self.params:
            p.summed_grad = p.grad = None

    def add_noise(self) -> None:
        std = self.noise_multiplier * self.max_grad_norm
        for p in self.params:
            total = torch.zeros_like(p) if p.summed_grad is None else p.summed_grad
            if not torch.isfinite(total).all():
                raise TrainingError("a gradient is not finite", hint="check the model and the learning rates")
        for p in self.params:
            noise = torch.from_numpy(gaussian(tuple(p.shape), std, self._source))
            if p.summed_grad is not None:
                noise += p.summed_grad.to("cpu", torch.float64)
            p.grad = (noise / self._divisor).to(p)


def _losses(model: nn.Module, examples: Examples[Batch], forward: Forward[Batch], indices: NDArray[np.int64]) -> Tensor:
    losses = forward(model, examples.collate(indices.tolist()))
    if losses.shape != (len(indices),):
        raise TrainingError(
            f"the loss of a batch of {len(indices)} examples has shape {list(losses.shape)}",
            hint='return one loss for each example: reduction="none" across examples',
        )
    if not torch.isfinite(losses).all():
        raise TrainingError("a loss is not finite", hint="check the model and the learning rates")
    return losses


def _sizes(examples: Examples[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Of each example: how long it is, and how many rows."""
    lengths = np.asarray(examples.lengths, dtype=np.int64)
    rows = np.asarray(examples.row_counts if isinstance(examples, SeveralRows) else np.ones_like(lengths), dtype=np.int64)
    if len(rows) != len(lengths) or (rows < 1).any():
        raise TrainingError(f"{len(lengths)} examples must have a row each, or more, not {rows.tolist()[:10]}")
    return lengths, rows


def _micro_batches(
    sample: NDArray[np.int64], lengths: NDArray[np.int64], rows: NDArray[np.int64], most_tokens: int
) -> Iterator[NDArray[np.int64]]:
    """The sample in order of length, cut where the next example would take a piece above `most_tokens` padded tokens."""
    ordered = sample[np.argsort(lengths[sample], kind="stable")]
    before = np.concatenate(([0], np.cumsum(rows[ordered])))
    start = 0
    for end in range(1, len(ordered) + 1):
        if end == len(ordered) or (before[end + 1] - before[start]) * lengths[ordered[end]] > most_tokens:
            yield ordered[start:end]
            start = end


def _torch_groups(groups: Sequence[ParameterGroup]) -> list[dict[str, Any]]:
    return [{"params": list(group.parameters), "lr": group.learning_rate} for group in groups]


def _check_groups(model: nn.Module, groups: Sequence[ParameterGroup]) -> None:
    """Raise TrainingError unless the groups hold the model's trainable parameters, each once."""
    grouped = [p for group in groups for p in group.parameters]
    ids = {id(p) for p in grouped}
    trainable = {id(p): name for name, p in model.named_parameters() if p.requires_grad}
    if len(ids) != len(grouped) or not ids or ids - trainable.keys():
        raise TrainingError("the groups must hold trainable parameters of the model, each once, and at least one")
    if left_out := [name for key, name in trainable.items() if key not in ids]:
        raise TrainingError(
            f"{len(left_out)} trainable parameters are in no group, {left_out[0]} among them",
            hint="put them into a group or freeze them with requires_grad_(False)",
        )


def _check_model(model: nn.Module) -> None:
    """Raise TrainingError for what Opacus's hooks would fail at, or silently get wrong."""
    for name, module in model.named_modules():
        trainable = any(p.requires_grad for p in module.parameters())
        problem = (
            "batch normalisation, which mixes examples"
            if isinstance(module, _BatchNorm)
            else "gradient checkpointing, which runs the hooks twice"
            if getattr(module, "gradient_checkpointing", False)
            else "DoRA, whose magnitudes get no per-example gradient"
            if trainable and len(getattr(module, "lora_magnitude_vector", None) or ())
            else "LoRA on an embedding, which gets no per-example gradient"
            if trainable and len(getattr(module, "lora_embedding_A", None) or ())
            else None
        )
        if problem is not None:
            raise TrainingError(f"module {name or type(module).__name__} uses {problem}", hint="turn it off to train with DP-SGD")


def _check_alone(
    model: nn.Module, examples: Examples[Batch], forward: Forward[Batch], indices: NDArray[np.int64], losses: Tensor
) -> None:
    """Raise TrainingError if the first example's loss is another one without the rest of its batch."""
    with torch.no_grad():
        alone = float(forward(model, examples.collate(indices[:1].tolist()))[0])
    together = float(losses.detach()[0])
    exact = all(p.dtype in {torch.float32, torch.float64} for p in model.parameters())
    if abs(alone - together) > (_MIXING_TOLERANCE if exact else _MIXING_TOLERANCE_ROUNDED) * (1 + abs(alone)):
        raise TrainingError(
            "an example's loss depends on the other examples of its batch",
            hint="average over the example's own tokens, never over the batch's; no module may mix examples",
        )


def _gather_gradients(model: nn.Module, rows: NDArray[np.int64]) -> None:
    """Leave each trainable parameter with one gradient for each example: the sum over the example's rows.

    Raises TrainingError unless there is one for each row.
    """
    for name, p in model.named_parameters():
        if not p.requires_grad:
            continue
        gradients = getattr(p, "grad_sample", None)
        if not isinstance(gradients, Tensor) or len(gradients) != rows.sum():
            raise TrainingError(
                f"trainable parameter {name} has no gradient for each example",
                hint="the loss does not reach it, or its module does not see the rows of each example: freeze it",
            )
        if len(rows) < len(gradients):
            owners = torch.from_numpy(np.repeat(np.arange(len(rows)), rows)).to(gradients.device)
            whole = gradients.new_zeros((len(rows), *gradients.shape[1:])).index_add(0, owners, gradients)
            setattr(p, "grad_sample", whole)  # noqa: B010  # Opacus's, unknown to nn.Parameter


@contextmanager
def _training_mode(model: nn.Module) -> Iterator[None]:
    """Train mode without dropout, and afterwards every module as it was."""
    modes = [(module, module.training) for module in model.modules()]
    dropouts = [(module, module.p) for module in model.modules() if isinstance(module, _DropoutNd)]
    model.train()
    for dropout, _ in dropouts:
        dropout.p = 0.0
    try:
        yield
    finally:
        for dropout, p in dropouts:
            dropout.p = p
        for module, training in modes:
            module.training = training


@contextmanager
def _per_example_gradients(model: nn.Module) -> Iterator[None]:
    """Opacus's hooks on every module with trainable parameters; whatever happens, nothing of them stays."""
    if hasattr(model, "autograd_grad_sample_hooks"):
        raise TrainingError("the model carries Opacus's hooks already", hint="remove them: to_standard_module()")
    try:
        hooks = GradSampleHooks(model, batch_first=True, loss_reduction="sum", strict=True)
        try:
            with warnings.catch_warnings():
                # No input of the lowest adapted layer needs a gradient, and Opacus asks for the output's alone.
                warnings.filterwarnings("ignore", message="Full backward hook is firing", category=UserWarning)
                yield
        finally:
            hooks.cleanup()
    except NotImplementedError as error:
        raise TrainingError(f"Opacus cannot train this {type(model).__name__}: {error}") from error
    finally:
        for module in model.modules():
            if any(p.requires_grad for p in module.parameters(recurse=False)):
                for name in ("activations", "max_batch_len"):
                    vars(module).pop(name, None)  # PEFT's wrappers answer hasattr for what they wrap
        for p in model.parameters():
            p.grad = None
            for name in (*OPACUS_PARAM_MONKEYPATCH_ATTRS, "summed_grad"):
                if hasattr(p, name):
                    delattr(p, name)
