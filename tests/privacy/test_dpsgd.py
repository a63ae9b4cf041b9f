"""The clipped sums are those of one example at a time, the path does not depend on the data, and nothing is left behind."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from fedloop_events.types import Mechanism
from fedloop_privacy.dp.accounting import MechanismError
from fedloop_privacy.dp.dpsgd import ParameterGroup, TrainingError, dp_sgd, plain_sgd
from numpy.typing import NDArray
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it

CLASSES = 5
NO_NOISE = 1e-12


def terms(
    sampling_rate: float = 1.0,
    noise_multiplier: float = NO_NOISE,
    clip_norm: float = 0.5,
    steps: int = 1,
    divisor: float = 1.0,
) -> Mechanism:
    return Mechanism(
        sampling_rate=sampling_rate,
        noise_multiplier=noise_multiplier,
        clip_norm=clip_norm,
        steps=steps,
        divisor=divisor,
    )


class PrefixSource:
    """One randomness for neighbours: call k gives the first n values of sequence k, whatever n."""

    def __init__(self) -> None:
        self.calls: list[int] = []

    def uniform53(self, n: int) -> NDArray[np.float64]:
        self.calls.append(n)
        return np.random.default_rng(len(self.calls)).random(n)


@dataclass
class Texts:
    """Random token ids of several lengths; `extra` adds padding that no example needs."""

    ids: list[list[int]]
    labels: list[int]
    extra: int = 0
    sizes: list[int] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        return [len(row) for row in self.ids]

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        self.sizes.append(len(indices))
        width = max(len(self.ids[i]) for i in indices) + self.extra
        ids = torch.zeros(len(indices), width, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(indices):
            ids[row, : len(self.ids[i])] = torch.tensor(self.ids[i])
            mask[row, : len(self.ids[i])] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([self.labels[i] for i in indices])}


def texts(n: int, extra: int = 0, seed: int = 0) -> Texts:
    rng = np.random.default_rng(seed)
    ids = [rng.integers(3, 60, size=rng.integers(2, 13)).tolist() for _ in range(n)]
    return Texts(ids, rng.integers(0, CLASSES, size=n).tolist(), extra)


def losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits, batch["labels"], reduction="none")


def config(dropout: float) -> transformers.BertConfig:
    made = transformers.BertConfig(
        vocab_size=60,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=32,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )
    made.num_labels = CLASSES
    return made


def bert(dropout: float = 0.1, **lora: Any) -> nn.Module:
    """A small random BERT with LoRA and a classifier; A frozen, B not zero, so that every gradient has something to say."""
    torch.manual_seed(0)
    adapter = LoraConfig(task_type="SEQ_CLS", r=2, lora_alpha=4, lora_dropout=dropout, target_modules=["query", "value"], **lora)
    model: nn.Module = get_peft_model(transformers.BertForSequenceClassification(config(dropout)), adapter)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
        if "lora_A" in name:
            p.requires_grad = False
    return model.eval()


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def groups(model: nn.Module, learning_rate: float = 1.0) -> list[ParameterGroup]:
    return [ParameterGroup(list(trainable(model).values()), learning_rate)]


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def clipped_sum(model: nn.Module, examples: Texts, clip_norm: float) -> dict[str, Tensor]:
    """One example at a time, in float64: the oracle."""
    model = model.double().eval()
    total = {name: torch.zeros_like(p) for name, p in trainable(model).items()}
    for i in range(len(examples.ids)):
        gradients = torch.autograd.grad(losses(model, examples.collate([i]))[0], list(trainable(model).values()))
        norm = torch.sqrt(torch.stack([(g**2).sum() for g in gradients]).sum())
        for name, g in zip(total, gradients, strict=True):
            total[name] += g * min(1.0, clip_norm / float(norm))
    return total


@pytest.mark.parametrize("micro_batch_tokens", [1, 30, 10_000])
@pytest.mark.parametrize("extra", [0, 5])
@pytest.mark.parametrize("clip_norm", [0.5, 100.0])
def test_each_step_sums_the_clipped_gradients_of_one_example_at_a_time(
    micro_batch_tokens: int, extra: int, clip_norm: float
) -> None:
    model, examples = bert(), texts(12, extra)
    before = weights(model)
    dp_sgd(model, groups(model), examples, losses, terms(clip_norm=clip_norm), micro_batch_tokens=micro_batch_tokens)
    want = clipped_sum(bert(), texts(12), clip_norm)
    after = weights(model)
    for name in before:
        if name not in want:
            assert torch.equal(before[name], after[name]), f"{name} is frozen"
            continue
        got = (before[name] - after[name]).double()
        assert (got - want[name]).norm() <= 1e-5 * want[name].norm() + 2e-6, name


def test_several_steps_equal_several_single_steps() -> None:
    once, often = bert(), bert()
    dp_sgd(once, groups(once), texts(6), losses, terms(steps=3))
    for _ in range(3):
        dp_sgd(often, groups(often), texts(6), losses, terms())
    for name, p in weights(once).items():
        torch.testing.assert_close(p, weights(often)[name], rtol=1e-5, atol=1e-6)


def test_learning_rates_are_those_of_the_groups_and_the_divisor_divides() -> None:
    def moved(head_rate: float, lora_rate: float, divisor: float) -> tuple[Tensor, Tensor]:
        model = bert()
        head = [p for name, p in trainable(model).items() if "classifier" in name]
        lora = [p for name, p in trainable(model).items() if "lora_B" in name]
        before = torch.cat([p.detach().flatten().clone() for p in head]), lora[0].detach().clone()
        dp_sgd(
            model,
            [ParameterGroup(head, head_rate), ParameterGroup(lora, lora_rate)],
            texts(6),
            losses,
            terms(divisor=divisor),
        )
        return torch.cat([p.detach().flatten() for p in head]) - before[0], lora[0].detach() - before[1]

    head, lora = moved(1.0, 1.0, 1.0)
    head_scaled, lora_scaled = moved(8.0, 2.0, 4.0)
    torch.testing.assert_close(head_scaled, 2.0 * head, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(lora_scaled, 0.5 * lora, rtol=1e-4, atol=1e-6)


def test_noise_has_the_standard_deviation_of_the_terms_on_every_trainable_parameter() -> None:
    model = bert()
    before = weights(model)
    mechanism = terms(sampling_rate=0.5, noise_multiplier=3.0, clip_norm=2.0, steps=4, divisor=10.0)
    dp_sgd(model, groups(model), Texts([], []), losses, mechanism, source=PrefixSource())  # nobody to sample: noise alone
    moved = torch.cat([(p.detach() - before[name]).flatten() for name, p in trainable(model).items()])
    assert (moved != 0).all()
    assert float(moved.std()) == pytest.approx(3.0 * 2.0 / 10.0 * 4**0.5, rel=0.1)


def test_default_noise_and_sampling_differ_each_time() -> None:
    one, other = bert(), bert()
    for model in (one, other):
        dp_sgd(model, groups(model), texts(4), losses, terms(noise_multiplier=1.0))
    assert not torch.equal(*(next(iter(trainable(model).values())) for model in (one, other)))


def test_neighbours_under_one_randomness_take_one_path() -> None:
    """The same steps, noise and divisor whether or not one more example exists; it moves a step by the clip norm at most."""
    mechanism = terms(sampling_rate=0.3, noise_multiplier=1.0, steps=1, clip_norm=0.5, divisor=2.0)
    same = set()
    for seed in range(6):
        sources, after, steps = [], [], []
        for n in (9, 10):
            model, source = bert(), PrefixSource()
            source.calls += [0] * seed  # another randomness for each seed
            whole = texts(10)
            examples = Texts(whole.ids[:n], whole.labels[:n])
            ticks: list[int] = []
            returned = dp_sgd(model, groups(model), examples, losses, mechanism, source=source, on_step=ticks.append)
            steps.append((returned, ticks))
            sources.append(source.calls[seed + 1 :])
            after.append(torch.cat([p.detach().flatten() for p in trainable(model).values()]))
        assert [9 if n == 10 else n for n in sources[1]] == sources[0]  # the same draws of noise, one more of sampling
        assert steps[0] == steps[1] == (1, [1])
        assert float((after[0] - after[1]).norm()) <= 0.5 / 2.0 + 1e-5
        same.add(torch.equal(after[0], after[1]))
    assert same == {True, False}  # the last example was sampled under some randomness and not under other


def test_steps_are_exactly_those_of_the_terms_and_empty_samples_are_steps_too() -> None:
    model, source = bert(), PrefixSource()
    mechanism = terms(sampling_rate=1e-9, noise_multiplier=1.0, steps=5)
    assert dp_sgd(model, groups(model), texts(3), losses, mechanism, source=source) == 5
    sampling = [n for n in source.calls if n == 3]
    assert len(sampling) == 5
    assert len(source.calls) == 5 * (1 + len(trainable(model)))


def test_a_sample_is_cut_into_micro_batches_of_like_length_within_their_bound() -> None:
    model, examples = bert(), texts(40)
    dp_sgd(model, groups(model), examples, losses, terms(), micro_batch_tokens=36)
    sizes = [size for size in examples.sizes if size > 1]
    assert len(sizes) >= 5
    assert max(sizes) <= 36 // 2


@dataclass
class Bundles:
    """Examples of one to three texts each."""

    texts: Texts
    row_counts: list[int]
    padded: list[int] = field(default_factory=list)

    @property
    def lengths(self) -> list[int]:
        return [max(self.texts.lengths[i] for i in self.members(n)) for n in range(len(self.row_counts))]

    def members(self, n: int) -> range:
        start = sum(self.row_counts[:n])
        return range(start, start + self.row_counts[n])

    def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
        owners = torch.tensor([row for row, n in enumerate(indices) for _ in self.members(n)])
        batch = self.texts.collate([i for n in indices for i in self.members(n)])
        self.padded += [batch["input_ids"].numel()] * (len(indices) > 1)
        return batch | {"owners": owners}


def bundle_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """One for each bundle, in which the texts of a bundle act on each other."""
    each = losses(model, batch)
    return each.new_zeros(int(batch["owners"][-1]) + 1).index_add(0, batch["owners"], each).square()


def bundles(*row_counts: int) -> Bundles:
    return Bundles(texts(sum(row_counts)), list(row_counts))


@pytest.mark.parametrize("micro_batch_tokens", [1, 30, 10_000])
def test_an_example_of_several_rows_has_one_gradient_and_is_clipped_as_a_whole(micro_batch_tokens: int) -> None:
    model, examples = bert(), bundles(2, 1, 3, 2, 1, 2)
    before, oracle = weights(model), bert().double()
    want = {name: torch.zeros_like(p) for name, p in trainable(oracle).items()}
    for n in range(6):
        gradients = torch.autograd.grad(bundle_losses(oracle, examples.collate([n]))[0], list(trainable(oracle).values()))
        norm = torch.sqrt(torch.stack([(g**2).sum() for g in gradients]).sum())
        assert norm > 0.5
        for name, g in zip(want, gradients, strict=True):
            want[name] += g * 0.5 / float(norm)
    dp_sgd(model, groups(model), examples, bundle_losses, terms(), micro_batch_tokens=micro_batch_tokens)
    after = weights(model)
    for name, each in want.items():
        assert ((before[name] - after[name]).double() - each).norm() <= 1e-5 * each.norm() + 2e-6, name
    assert list(leftovers(model)) == []


def test_rows_of_an_example_count_towards_the_bound_of_a_micro_batch() -> None:
    model, examples = bert(), bundles(*[3] * 12)
    dp_sgd(model, groups(model), examples, bundle_losses, terms(), micro_batch_tokens=72)
    assert len(examples.padded) < 12
    assert max(examples.padded) <= 72


@pytest.mark.parametrize("row_counts", [[1, 1, 1], [2, 2], [0, 2, 2]], ids=["too few rows", "too few examples", "an empty one"])
def test_rows_that_are_not_those_of_the_examples_are_refused(row_counts: list[int]) -> None:
    """The examples have one row, one, and two."""

    class Wrong(Bundles):
        @property
        def lengths(self) -> list[int]:
            return [12] * 3

        def collate(self, indices: Sequence[int]) -> dict[str, Tensor]:
            return self.texts.collate(range(4)) | {"owners": torch.tensor([0, 1, 2, 2])}

    model = bert()
    with pytest.raises(TrainingError, match=r"a row each|no gradient for each example"):
        dp_sgd(model, groups(model), Wrong(texts(4), row_counts), bundle_losses, terms(), micro_batch_tokens=10_000)


def leftovers(model: nn.Module) -> Iterator[str]:
    for name, module in model.named_modules():
        if module._forward_hooks or module._backward_hooks:
            yield f"hooks on {name}"
        for attribute in ("activations", "max_batch_len", "autograd_grad_sample_hooks", "ft_compute_sample_grad"):
            if attribute in vars(module):
                yield f"{attribute} on {name}"
    for name, p in model.named_parameters():
        for attribute in ("grad_sample", "summed_grad", "_forward_counter", "_current_grad_sample"):
            if hasattr(p, attribute):
                yield f"{attribute} on {name}"
        if p.grad is not None:
            yield f"grad on {name}"


class BrokenError(Exception):
    pass


class Breaking(torch.autograd.Function):
    """Fails in the backward pass."""

    @staticmethod
    def forward(_: Any, losses: Tensor) -> Tensor:
        return losses.clone()

    @staticmethod
    def backward(_: Any, *gradients: Tensor) -> Tensor:
        raise BrokenError


@pytest.mark.parametrize("where", ["forward", "backward", "on_step"])
def test_nothing_of_a_run_that_fails_is_left_on_the_model_and_another_can_follow(where: str) -> None:
    model = bert(dropout=0.25)
    kept = [m.p for m in model.modules() if isinstance(m, nn.Dropout)]

    def broken(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        result = losses(model, batch)
        if where == "forward":
            raise BrokenError
        if where == "backward":
            return Breaking.apply(result)  # type: ignore[no-any-return, no-untyped-call]
        return result

    def on_step(_: int) -> None:
        if where == "on_step":
            raise BrokenError

    with pytest.raises(BrokenError):
        dp_sgd(model, groups(model), texts(4), broken, terms(), on_step=on_step)
    for _ in range(2):
        assert list(leftovers(model)) == []
        assert not any(module.training for module in model.modules())
        assert [m.p for m in model.modules() if isinstance(m, nn.Dropout)] == kept
        dp_sgd(model, groups(model), texts(4), losses, terms())


def test_dropout_is_off_while_training() -> None:
    runs = []
    for _ in range(2):
        model = bert(dropout=0.5)
        dp_sgd(model, groups(model), texts(6), losses, terms())
        runs.append(weights(model))
    for name, p in runs[0].items():
        torch.testing.assert_close(p, runs[1][name], rtol=0, atol=1e-7)


class Toy(nn.Module):
    """Sum of embeddings and a linear head: room to put something wrong in."""

    def __init__(self, *, norm: nn.Module | None = None, unused: bool = False) -> None:
        super().__init__()
        self.embedding = nn.Embedding(60, 8).requires_grad_(requires_grad=False)
        self.norm = norm or nn.Identity()
        self.head = nn.Linear(8, CLASSES)
        self.unused = nn.Linear(2, 2) if unused else None

    def forward(self, ids: Tensor) -> Tensor:
        pooled: Tensor = self.norm((self.embedding(ids) * (ids > 0)[..., None]).sum(dim=1))
        return torch.as_tensor(self.head(pooled))


def toy_losses(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return F.cross_entropy(model(batch["input_ids"]), batch["labels"], reduction="none")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Toy(norm=nn.BatchNorm1d(8)), "batch normalisation"),
        (Toy(norm=nn.BatchNorm1d(8).requires_grad_(requires_grad=False)), "batch normalisation"),
        (Toy(norm=nn.InstanceNorm1d(8, affine=True, track_running_stats=True)), "buffer"),
        (Toy(unused=True), r"unused\.weight has no gradient"),
    ],
    ids=["batch norm", "frozen batch norm", "buffers", "unreached"],
)
def test_a_model_whose_gradients_would_be_wrong_is_refused(model: nn.Module, message: str) -> None:
    before = weights(model)
    with pytest.raises(TrainingError, match=message):
        dp_sgd(model, groups(model), texts(4), toy_losses, terms())
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())
    assert list(leftovers(model)) == []


def test_dora_lora_on_embeddings_and_gradient_checkpointing_are_refused() -> None:
    embedding = get_peft_model(
        transformers.BertForSequenceClassification(config(0.0)),
        LoraConfig(task_type="SEQ_CLS", r=2, target_modules=["word_embeddings"]),
    )
    checkpointing = bert()
    checkpointing.base_model.activation_checkpointing_enable()  # type: ignore[operator, union-attr]
    for model, message in (
        (bert(use_dora=True), "DoRA"),
        (embedding, "LoRA on an embedding"),
        (checkpointing, "gradient checkpointing"),
    ):
        with pytest.raises(TrainingError, match=message):
            dp_sgd(model, groups(model), texts(4), losses, terms())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda model, batch: toy_losses(model, batch).mean(), r"shape \[\]"),
        (lambda model, batch: toy_losses(model, batch).mean().expand(len(batch["labels"])), "depends on the other"),
        (lambda model, batch: toy_losses(model, batch) * torch.inf, "not finite"),
        (lambda model, batch: (toy_losses(model, batch) * 0.0).sqrt(), "gradient is not finite"),
    ],
    ids=["batch mean", "batch mean for each", "infinite loss", "infinite gradient"],
)
def test_a_loss_that_is_not_one_finite_number_for_each_example_is_refused(wrong: Any, message: str) -> None:
    model = Toy()
    before = weights(model)
    with pytest.raises(TrainingError, match=message):
        dp_sgd(model, groups(model), texts(6), wrong, terms())
    assert all(torch.equal(p, before[name]) for name, p in weights(model).items())


def test_over_a_frozen_part_in_bfloat16_rounding_passes_and_an_average_over_the_batch_does_not() -> None:
    def rounded(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return toy_losses(model, batch) * (1.03 if len(batch["labels"]) > 1 else 1.0)

    def averaged(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        return toy_losses(model, batch) / len(batch["labels"])

    with pytest.raises(TrainingError, match="depends on the other"):
        dp_sgd(model := Toy(), groups(model), texts(6), rounded, terms())
    model = Toy()
    model.frozen = nn.Parameter(torch.zeros(1, dtype=torch.bfloat16), requires_grad=False)
    dp_sgd(model, groups(model), texts(6), rounded, terms())
    with pytest.raises(TrainingError, match="depends on the other"):
        dp_sgd(model, groups(model), texts(6), averaged, terms())


def test_groups_must_hold_each_trainable_parameter_once() -> None:
    model = Toy()
    head = list(model.head.parameters())
    for wrong in ([], [ParameterGroup([], 1.0)], [ParameterGroup(head[:1], 1.0)], [ParameterGroup(head, 1.0)] * 2):
        with pytest.raises(TrainingError, match="group"):
            dp_sgd(model, wrong, texts(4), toy_losses, terms())


def test_terms_without_noise_are_refused_before_anything_is_computed() -> None:
    with pytest.raises(MechanismError):
        dp_sgd(Toy(), [], texts(4), toy_losses, terms(noise_multiplier=0.0))


@pytest.mark.parametrize("micro_batch_tokens", [1, 40, 10_000])
def test_plain_sgd_takes_the_mean_gradient_of_each_shuffled_batch_however_many_go_through_at_once(
    micro_batch_tokens: int,
) -> None:
    """A batch may be larger than what memory allows: it is one step, and the same."""
    model, reference, examples = bert(), bert(dropout=0.0), texts(10)
    taken = plain_sgd(
        model,
        groups(model, 0.1),
        examples,
        losses,
        epochs=1,
        batch_size=10,
        seed=1,
        micro_batch_tokens=micro_batch_tokens,
    )
    assert taken == 1
    assert len(examples.sizes) == {1: 10, 40: 3, 10_000: 1}[micro_batch_tokens]
    gradient = torch.autograd.grad(losses(reference, examples.collate(range(10))).mean(), list(trainable(reference).values()))
    for p, start, g in zip(trainable(model).values(), trainable(reference).values(), gradient, strict=True):
        torch.testing.assert_close(p.detach(), start.detach() - 0.1 * g, rtol=1e-4, atol=1e-6)


def test_plain_sgd_sees_every_example_once_an_epoch_and_repeats_with_its_seed() -> None:
    runs = []
    for seed in (1, 1, 2):
        torch.manual_seed(0)
        model, examples = Toy(), texts(10)
        steps = plain_sgd(model, groups(model), examples, toy_losses, epochs=3, batch_size=4, seed=seed)
        assert (steps, sum(examples.sizes)) == (9, 30)
        runs.append(model.head.weight.detach())
    assert plain_sgd(model, groups(model), Texts([], []), toy_losses, epochs=3, batch_size=4, seed=0) == 0
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])
