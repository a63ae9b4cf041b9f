"""The benchmark of what a chat learns: who holds which questions, and that its rounds run with the parts that ship."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
from fedloop_tasks.causal.plan import ChatPlan

from benchmarks import chat_utility
from benchmarks.chat_utility import Chats, Size, examples, federate, noise_shared, plain, private, private_plan, split, spread
from benchmarks.utility import Questions

ROOT = Path(__file__).resolve().parent.parent
LABELS = ("card_lost", "card_arrival", "a_loan")
QUESTIONS = Questions([f"{label} question {n}" for n in range(12) for label in LABELS], [*LABELS] * 12)
SIZE = Size(public=2, held_out=1, private=4)


@pytest.fixture
def federation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Chats:
    """Two devices with a small model and a small data set."""
    (tmp_path / "banking77").mkdir()
    for part, first in (("train", 0), ("test", 30)):
        with (tmp_path / "banking77" / f"{part}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows(
                [("text", "category"), *zip(QUESTIONS.texts[first:], QUESTIONS.labels[first:], strict=True)]
            )
    monkeypatch.setenv("FEDLOOP_DATA", str(tmp_path))
    folder = tiny.save(tmp_path / "llama")
    return federate(tmp_path / "blobs", 2, 100.0, SIZE, base_model=folder.name, model_dir=folder)(0)


def test_a_public_question_is_on_no_device_and_every_intent_has_as_many() -> None:
    for seed in range(3):
        public, kept = split(QUESTIONS, Size(public=2), seed)
        assert sorted(public.labels) == sorted(LABELS * 2)
        assert not set(public.texts) & set(kept.texts)
        assert len(set(public.texts) | set(kept.texts)) == len(QUESTIONS.texts)
    some, few = split(QUESTIONS, Size(public=2, private=4, intents=2), 0)
    assert (len(some.texts), len(few.texts)) == (2 * 2, 2 * 4)
    assert spread(QUESTIONS.labels, 2, None, 0) != spread(QUESTIONS.labels, 2, None, 1)


def test_an_intent_is_learnt_as_words() -> None:
    (example, *_) = examples(QUESTIONS)
    assert (example.turns[0].content, example.answer) == ("card_lost question 0", "card lost")


def test_shared_noise_adds_up_to_what_one_device_adds_alone() -> None:
    plan = ChatPlan()
    terms = plan.terms(plan.merge, plan.mechanisms()[plan.merge])
    shared = noise_shared(terms, 10)
    assert terms.mechanism is not None
    assert shared.mechanism is not None
    assert 10 * shared.mechanism.noise_multiplier**2 == pytest.approx(terms.mechanism.noise_multiplier**2)
    assert shared.hyperparameters == terms.hyperparameters


def test_the_rounds_run_from_the_public_examples_and_without_privacy_from_the_base_model(federation: Chats) -> None:
    assert sum(map(len, federation.shares)) == len(LABELS) * 4
    base = federation.model.initial_arrays(0)
    assert federation.measured(federation.first)["loss per token"] < federation.measured(dict(base))["loss per token"]
    plan = private_plan(8.0, 2)
    terms = plan.terms(plan.merge, plan.mechanisms()[plan.merge])
    release = federation.rounds(1, 2, federation.first, terms)
    changed = {name for name, values in federation.first.items() if not np.array_equal(values, release[name])}
    assert changed == {name for name in base if name.endswith(".B")}
    assert list(private(federation, plan)) == [
        "public examples alone: exact match",
        "each device its own noise: exact match",
        "simulated, noise shared: exact match",
    ]
    found = plain(federation, chat_utility.plain_plan(2), 0)
    assert found["no privacy: loss per token"] < federation.measured(dict(base))["loss per token"]


@pytest.mark.slow
def test_the_benchmark_of_what_a_chat_learns_prints_a_table() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "chat_utility"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("the bound") == 4
    assert "simulated: noise shared" in done.stdout
