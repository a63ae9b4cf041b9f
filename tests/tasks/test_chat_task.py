"""What a chat's task says: what its first release has learnt, what is held out, and which release passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tiny_models as tiny
from fedloop_events.errors import UsageError
from fedloop_events.files import write_private
from fedloop_tasks.causal import heldout
from fedloop_tasks.causal import task as chat
from fedloop_tasks.causal.examples import Example
from fedloop_tasks.causal.model import CausalModel, describe
from fedloop_tasks.causal.task import Chat
from fedloop_tasks.task import Material, Message
from fedloop_tasks.turns import Turn

HELD_OUT = [
    Message("where is my card", "we have sent it"),
    Message("a loan", "yes", (Turn("user", "hello"), Turn("assistant", "yes?"))),
    Message("the card is lost", "a new one is sent", rejected="no"),
    Message("what now", "nothing", good=False),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "llama", max_position_embeddings=256)


def task_of(folder: Path) -> Chat:
    return Chat(describe(folder.name, model_dir=folder))


def test_the_first_release_is_the_base_model_and_learns_what_is_public_the_same_bytes_each_time(folder: Path) -> None:
    public = [Message("where is my card", "we have sent it"), Message("a loan", "yes")]
    spec, plain = Chat.make(Material([], HELD_OUT, {}), folder.name, folder, 3)
    assert all(not values.any() for name, values in plain.items() if name.endswith(".B"))
    (_, first), (same, again) = (Chat.make(Material([], HELD_OUT, {}, public=public), folder.name, folder, 3) for _ in range(2))
    assert same == spec
    assert spec.learns == "feedback"
    assert Chat.make(Material([], HELD_OUT, {}, shape={"learns": "kto", "layers": 1}), folder.name, folder, 3)[0].learns == "kto"
    assert all(np.array_equal(values, again[name]) for name, values in first.items())
    model = CausalModel(spec, model_dir=folder, device="cpu")
    losses = []
    for arrays in (plain, first):
        model.load(arrays)
        losses.append(sum(each.loss for each in model.scores(model.encoded([example(each) for each in public]))))
    assert losses[1] < losses[0]


def example(message: Message) -> Example:
    return Example((*message.earlier, Turn("user", message.text)), message.answer)


def test_every_text_that_is_held_out_is_masked_and_what_cannot_be_is_left_out(folder: Path, tmp_path: Path) -> None:
    seen: list[str] = []

    def mask(text: str) -> str | None:
        seen.append(text)
        return None if "loan" in text else text.upper()

    assert task_of(folder).keep(tmp_path, HELD_OUT, mask) == {"could not be masked": 1, "no right answer": 1}
    kept = (tmp_path / heldout.FILE).read_text()
    assert set(seen) >= {"where is my card", "we have sent it", "hello", "yes?", "no"}
    assert "A NEW ONE IS SENT" in kept
    assert not any(text in kept for text in ("where", "hello", "loan", "nothing"))
    assert task_of(folder).keep(tmp_path, [], mask) == {}
    assert (tmp_path / heldout.FILE).read_text() == kept


def test_a_release_is_evaluated_by_loss_exact_match_and_words(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chat, "WARM_EPOCHS", 90)
    task = task_of(folder)
    task.keep(tmp_path, HELD_OUT, lambda text: text)
    evaluate = task.evaluator(tmp_path, folder)
    _, plain = Chat.make(Material([], [], {}), folder.name, folder, 0)
    _, taught = Chat.make(Material([], [], {}, public=HELD_OUT[:3]), folder.name, folder, 0)
    before, after = evaluate(plain), evaluate(taught)
    assert set(before.metrics) == {"loss_per_token", "exact_match", "token_f1", "preference_accuracy"}
    assert before.leading == "loss_per_token"
    assert before.examples == 3
    assert after.metrics["loss_per_token"] < before.metrics["loss_per_token"]
    assert after.metrics["exact_match"] == after.metrics["token_f1"] == after.metrics["preference_accuracy"] == 1
    assert [each.answer for each in task.samples(tmp_path, taught)] == [each.answer for each in HELD_OUT[:3]]
    assert [each.wanted for each in task.samples(tmp_path, plain)] == [each.answer for each in HELD_OUT[:3]]
    assert task.samples(tmp_path, plain)[0].answer != HELD_OUT[0].answer
    assert task.samples(tmp_path / "elsewhere", plain) == []
    assert before.metrics["exact_match"] == 0
    assert not task.gate(after, before, 0.02).reason
    assert task.gate(before, after, 0.02).reason
    assert not before.higher_is_better


@pytest.mark.parametrize(
    ("found", "wanted", "value"), [("a b", "a b", 1), ("A, b!", "a b", 1), ("a a", "a b", 0.5), ("c", "a b", 0), ("", "a", 0)]
)
def test_words_count_as_often_as_both_have_them(found: str, wanted: str, value: float) -> None:
    assert heldout.f1(found, wanted) == value


def test_a_server_whose_held_out_set_is_gone_or_damaged_says_what_to_do(folder: Path, tmp_path: Path) -> None:
    task = task_of(folder)
    with pytest.raises(UsageError, match="no held-out set"):
        task.evaluator(tmp_path, folder)
    write_private(tmp_path / heldout.FILE, b"{")
    with pytest.raises(UsageError, match="cannot be read"):
        task.evaluator(tmp_path, folder)


def test_tensors_that_are_no_pairs_of_factors_are_no_first_release(folder: Path) -> None:
    task = task_of(folder)
    _, arrays = Chat.make(Material([], [], {}), folder.name, folder, 0)
    task.check(arrays)
    for wrong in ({}, {**arrays, "x": arrays[min(arrays)]}, dict(list(arrays.items())[1:])):
        with pytest.raises(UsageError, match="pairs of adapter factors"):
            task.check(wrong)


def test_what_the_operator_sets_of_the_model_is_checked_before_anything_is_made(tmp_path: Path) -> None:
    test = tmp_path / "test.jsonl"
    test.write_text('{"prompt": "a", "completion": "b"}\n', encoding="utf-8")
    files = {"test": test, "layers": 2, "rank": 4, "targets": "q_proj, v_proj", "learns": "sft", "act-on": "everything"}
    shape = {"layers": 2, "rank": 4, "targets": ["q_proj", "v_proj"], "learns": "sft", "activated": False}
    assert Chat.material(files).shape == shape
    for wrong in ({"learns": "all"}, {"layers": 0}, {"rank": 257}, {"act-on": "prompt"}):
        with pytest.raises(UsageError, match=f"--{next(iter(wrong))}"):
            Chat.material({"test": test, **wrong})
