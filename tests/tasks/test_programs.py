"""What a device uploads: exactly the tensors asked for, and under DP the sum of clipped gradients and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from fedloop_events.blobs.tensors import Array
from fedloop_events.errors import TensorError
from fedloop_events.types import BlobRef, Mechanism, RoundOpened
from fedloop_privacy.dp.accounting import MechanismError
from fedloop_tasks.classification.examples import Example
from fedloop_tasks.classification.model import EmbeddingClassifier, describe
from fedloop_tasks.models.tensors import Arrays
from fedloop_tasks.programs.adapter import default_hyperparameters
from fedloop_tasks.programs.class_sums import NAME as SUMS
from fedloop_tasks.table import program_of
from fedloop_tasks.task import TermsError
from msgspec.structs import replace
from torch.nn import functional as F

LABELS = ["card", "loan", "transfer"]
TEXTS = [
    "hi",
    "my card has not arrived and I have been waiting for two weeks now",
    "how do I cancel a transfer?",
    "what does a loan cost",
    "is there a fee on transfers to other banks",
]
TRUE = ["card", "card", "transfer", "loan", "transfer"]
QUIET = Mechanism(sampling_rate=1.0, noise_multiplier=1e-6, clip_norm=0.5, steps=1, divisor=4.0)
NOISY = Mechanism(sampling_rate=0.5, noise_multiplier=1.0, clip_norm=1.0, steps=3, divisor=4.0)


@pytest.fixture(scope="module")
def model() -> EmbeddingClassifier:
    return EmbeddingClassifier(describe(LABELS), device="cpu")


@pytest.fixture
def base(model: EmbeddingClassifier) -> Arrays:
    random = np.random.default_rng(3)
    arrays = {name: random.normal(0, 0.05, shape).astype(np.float32) for name, shape in model.shapes.items()}
    arrays["head.weight"] *= 20
    model.load(arrays)
    return arrays


def train(model: EmbeddingClassifier, texts: Sequence[str], labels: Sequence[str], opened: RoundOpened) -> dict[str, Array]:
    examples = [Example(text, label) for text, label in zip(texts, labels, strict=True)]
    return program_of(opened.strategy).compute(model, examples, opened)


def ffa(model: EmbeddingClassifier) -> list[str]:
    return [name for name in model.shapes if not name.endswith(".A")]


def opened(upload: Sequence[str], mechanism: Mechanism | None, **change: Any) -> RoundOpened:
    return RoundOpened(
        origin="test",
        epoch=0,
        run_id="main",
        round_id="r0001",
        request_id="q",
        number=1,
        model="default",
        base_release="0000-0",
        base=BlobRef("0" * 64, 1),
        strategy=change.pop("strategy", "ffa"),
        cohort=["a"],
        quorum=1,
        deadline_s=60.0,
        upload=list(upload),
        max_upload_bytes=1 << 20,
        max_update_norm=1e6,
        mechanism=mechanism,
        **change,
    )


def clipped_sum(model: EmbeddingClassifier, names: Sequence[str], clip_norm: float) -> dict[str, torch.Tensor]:
    """One backward pass for each example, by itself."""
    total = {name: torch.zeros(model.shapes[name]) for name in names}
    with model.trainable(names) as parameters:
        for text, label in zip(TEXTS, TRUE, strict=True):
            loss = F.cross_entropy(model.tail(*model.batch([text])), torch.tensor([LABELS.index(label)]))
            gradients = torch.autograd.grad(loss, list(parameters.values()))
            norm = torch.sqrt(sum(((g**2).sum() for g in gradients), start=torch.zeros(())))
            for name, g in zip(names, gradients, strict=True):
                total[name] += g * min(1.0, clip_norm / float(norm))
    return total


@pytest.mark.parametrize("strategy", ["ffa", "fedavg", "head", "weight"])
def test_a_private_step_is_the_sum_of_gradients_clipped_one_at_a_time(
    model: EmbeddingClassifier, base: Arrays, strategy: str
) -> None:
    head = ["head.weight", "head.bias"]
    names = {"ffa": ffa(model), "fedavg": list(model.shapes), "head": head, "weight": head}[strategy]
    rates = {"head_lr": 3.0, "bias_lr": 0.0 if strategy == "weight" else 1.0, "lora_lr": 2.0}
    trained = ["head.weight"] if strategy == "weight" else names  # what is frozen has no part in the norm
    expected = clipped_sum(model, trained, QUIET.clip_norm)
    got = train(model, TEXTS, TRUE, opened(names, QUIET, hyperparameters=rates))
    assert list(got) == names
    for name in trained:
        rate = rates["lora_lr" if name.startswith("lora.") else "bias_lr" if name == "head.bias" else "head_lr"]
        step = (base[name] - got[name]) * QUIET.divisor / rate
        np.testing.assert_allclose(step, expected[name].numpy(), atol=2e-5, err_msg=name)
        assert np.abs(step).max() > 1e-3


def test_what_is_not_uploaded_stays_bit_for_bit(model: EmbeddingClassifier, base: Arrays) -> None:
    got = train(model, TEXTS, TRUE, opened(ffa(model), NOISY))
    after = model.arrays()
    for name in model.shapes:
        if name.endswith(".A"):
            assert name not in got
            assert after[name].tobytes() == base[name].tobytes()
    assert got["lora.5.output.dense.B"].tobytes() != base["lora.5.output.dense.B"].tobytes()


@pytest.mark.parametrize("frozen", ["bias_lr", "lora_lr"])
def test_learning_rate_zero_freezes(model: EmbeddingClassifier, base: Arrays, frozen: str) -> None:
    rates = {"head_lr": 1.0, "bias_lr": 1.0, "lora_lr": 1.0} | {frozen: 0.0}
    got = train(model, TEXTS, TRUE, opened(ffa(model), NOISY, hyperparameters=rates))
    same = {name for name, value in got.items() if value.tobytes() == base[name].tobytes()}
    assert same == {name for name in got if (name == "head.bias" if frozen == "bias_lr" else name.startswith("lora."))}


@pytest.mark.parametrize("mechanism", [NOISY, QUIET])
def test_what_a_private_round_shows_does_not_depend_on_how_many_examples_there_are(
    model: EmbeddingClassifier, base: Arrays, mechanism: Mechanism
) -> None:
    seen = set()
    for n in (0, 1, 5):
        model.load(base)
        got = train(model, TEXTS[:n], TRUE[:n], opened(ffa(model), mechanism))
        seen.add(tuple((name, value.shape, str(value.dtype), bool(np.isfinite(value).all())) for name, value in got.items()))
        assert got["head.weight"].tobytes() != base["head.weight"].tobytes()  # noise, if nothing else
    assert len(seen) == 1


def test_sums_are_those_of_the_embeddings_of_each_class(model: EmbeddingClassifier, base: Arrays) -> None:
    rows = model.embed(TEXTS).astype(np.float64)
    expected = np.stack([rows[[label == name for label in TRUE]].sum(0) for name in LABELS])
    exact = train(model, TEXTS, TRUE, opened([SUMS], None, strategy="sums"))
    assert list(exact) == [SUMS]
    np.testing.assert_allclose(exact[SUMS], expected, atol=1e-6)
    quiet = Mechanism(sampling_rate=1.0, noise_multiplier=1e-9, clip_norm=1.0, steps=1, divisor=1.0)
    np.testing.assert_allclose(train(model, TEXTS, TRUE, opened([SUMS], quiet, strategy="sums"))[SUMS], expected, atol=1e-6)
    for n in (0, 5):
        noisy = train(model, TEXTS[:n], TRUE[:n], opened([SUMS], replace(quiet, noise_multiplier=2.0), strategy="sums"))[SUMS]
        assert noisy.shape == (3, 384)
        assert noisy.dtype == np.float32
        assert 1.5 < np.std(noisy - (expected if n else 0)) < 2.5


@pytest.mark.parametrize("strategy", ["sums", "ffa"])
def test_an_example_of_an_unknown_label_takes_no_part(model: EmbeddingClassifier, base: Arrays, strategy: str) -> None:
    terms = opened([SUMS] if strategy == "sums" else ffa(model), None, strategy=strategy)
    known = train(model, TEXTS, TRUE, terms)
    model.load(base)
    with_unknown = train(model, ["unseen", *TEXTS], ["no such label", *TRUE], terms)
    for name in known:
        assert known[name].tobytes() == with_unknown[name].tobytes()


def test_without_privacy_it_learns_the_examples_and_gives_the_same_again(model: EmbeddingClassifier, base: Arrays) -> None:
    terms = opened(list(model.shapes), None, hyperparameters={"lora_lr": 0.01, "local_epochs": 10.0, "batch": 2.0})
    first = train(model, TEXTS, TRUE, terms)
    assert model.accuracy(TEXTS, TRUE) == 1.0
    model.load(base)
    again = train(model, TEXTS, TRUE, terms)
    assert all(first[name].tobytes() == again[name].tobytes() for name in first)
    assert all(np.abs(first[name] - base[name]).max() > 0 for name in first)
    model.load(base)
    nothing = train(model, [], [], terms)
    assert all(nothing[name].tobytes() == base[name].tobytes() for name in first)


@pytest.mark.parametrize(
    "wrong",
    [{"head_lr": -1.0}, {"lora_lr": float("nan")}, {"bias_lr": float("inf")}],
)
def test_private_rounds_refuse_impossible_hyperparameters(
    model: EmbeddingClassifier, base: Arrays, wrong: dict[str, float]
) -> None:
    with pytest.raises(TermsError, match=next(iter(wrong))):
        train(model, TEXTS, TRUE, opened(ffa(model), NOISY, hyperparameters=wrong))
    assert model.arrays()["head.weight"].tobytes() == base["head.weight"].tobytes()


@pytest.mark.parametrize(
    "wrong", [{"head_lr": -1.0}, {"local_epochs": 0.0}, {"local_epochs": 1e9}, {"batch": 1.5}, {"batch": 1e9}]
)
def test_plain_rounds_refuse_impossible_hyperparameters(model: EmbeddingClassifier, wrong: dict[str, float]) -> None:
    with pytest.raises(TermsError, match=next(iter(wrong))):
        train(model, TEXTS, TRUE, opened(ffa(model), None, hyperparameters=wrong))


def test_terms_that_cannot_be_followed_are_refused(model: EmbeddingClassifier) -> None:
    with pytest.raises(TermsError, match="sums"):
        train(model, TEXTS, TRUE, opened(ffa(model), None, strategy="sums"))
    with pytest.raises(TensorError, match=r"no\.such"):
        train(model, TEXTS, TRUE, opened(["no.such"], NOISY))
    with pytest.raises(MechanismError):
        train(model, TEXTS, TRUE, opened(ffa(model), replace(NOISY, noise_multiplier=0.0)))
    assert not any(p.requires_grad for p in model.tail.parameters())


def test_the_defaults_name_all_that_a_round_may_set(model: EmbeddingClassifier) -> None:
    private, plain = (default_hyperparameters(model, private=each) for each in (True, False))
    assert set(private) == {"head_lr", "bias_lr", "lora_lr"}
    assert set(plain) - {"local_epochs", "batch"} == set(private)
