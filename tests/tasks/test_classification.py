"""What a classifier's task says: what users teach, what can be a release, and which release passes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from devices import SPEC, evaluation, initial_arrays
from fedloop_events.blobs.tensors import Array
from fedloop_events.errors import UsageError
from fedloop_tasks.classification import heldout
from fedloop_tasks.classification.examples import Example
from fedloop_tasks.classification.task import Classification
from fedloop_tasks.table import PROGRAMS, TASKS, UnknownProgramError, kind_of, program_of, task_of
from fedloop_tasks.task import Interaction, Material, Message
from msgspec.structs import replace
from samples import masked

TASK = Classification(SPEC)
SAID = Interaction(interaction_id="i1", release="0001-x", prompt=masked("my <PERSON_1>"), predicted="b")


# --- what users teach ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("said", "taught"),
    [
        ({"label": "a"}, "a"),
        ({"label": "a", "thumb": "up"}, "a"),
        ({"label": "unknown"}, None),
        ({"edit": masked(" A ")}, "a"),
        ({"edit": masked("something else")}, None),
        ({"edit": masked("something else"), "thumb": "up"}, "b"),
        ({"thumb": "up"}, "b"),
        ({"thumb": "down"}, None),
        ({"thumb": "down", "rating": 5}, None),
        ({"rating": 4}, "b"),
        ({"rating": 3}, None),
        ({}, None),
    ],
)
def test_one_thing_that_a_user_does_teaches_a_label_or_nothing(said: dict[str, object], taught: str | None) -> None:
    expected = [] if taught is None else [Example("my <PERSON_1>", taught)]
    assert TASK.examples([replace(SAID, **said)]) == expected


@pytest.mark.parametrize(
    ("said", "taught"),
    [
        ([{"label": "a"}, {"label": "c"}], "c"),
        ([{"label": "a"}, {"thumb": "up"}], "a"),
        ([{"thumb": "up"}, {"label": "a"}], "a"),
        ([{"thumb": "up"}, {"thumb": "down"}], None),
        ([{"thumb": "down"}, {"rating": 5}], "b"),
        ([{"thumb": "up"}, {}], "b"),
        ([{"label": "a"}, {"edit": masked("c")}], "c"),
        ([{"label": "a"}, {"label": "unknown"}], None),
        ([{"edit": masked("words")}, {"thumb": "up"}], "b"),
    ],
)
def test_of_several_the_latest_label_holds_else_the_latest_thumb_or_rating(
    said: list[dict[str, object]], taught: str | None
) -> None:
    expected = [] if taught is None else [Example("my <PERSON_1>", taught)]
    assert TASK.examples([replace(SAID, **each) for each in said]) == expected


def test_examples_stand_in_the_order_in_which_they_were_taught() -> None:
    first, second = replace(SAID, thumb="up"), replace(SAID, interaction_id="i2", prompt=masked("two"), label="c")
    assert TASK.examples([first, second]) == [Example("my <PERSON_1>", "b"), Example("two", "c")]
    third = replace(first, thumb=None, label="a")
    assert TASK.examples([first, second, third]) == [Example("two", "c"), Example("my <PERSON_1>", "a")]


def test_what_a_label_is_is_decided_when_examples_are_read() -> None:
    """A model with other labels learns other things from the same interactions."""
    said = [replace(SAID, edit=masked("refund")), replace(SAID, interaction_id="i2", label="a")]
    assert TASK.examples(said) == [Example("my <PERSON_1>", "a")]
    assert Classification(replace(SPEC, labels=["refund", "b"])).examples(said) == [Example("my <PERSON_1>", "refund")]


# --- the gate ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("candidate", "current", "margin", "reason"),
    [
        (0.9, 0.8, 0.0, ""),
        (0.8, 0.8, 0.0, ""),
        (0.79, 0.8, 0.02, ""),
        (0.77, 0.8, 0.02, "worse"),
        (0.799, 0.8, 0.0, "worse"),
        (0.0, 1.0, 1.0, ""),
    ],
)
def test_the_gate_lets_pass_what_is_at_most_a_margin_worse(candidate: float, current: float, margin: float, reason: str) -> None:
    verdict = Classification(SPEC).gate(evaluation(candidate), evaluation(current), margin)
    assert verdict.reason == reason


def test_accuracies_on_different_sets_are_not_compared() -> None:
    with pytest.raises(ValueError, match="held-out"):
        Classification(SPEC).gate(evaluation(0.9, "a"), evaluation(0.8, "b"), 0.0)


def test_the_gate_goes_by_the_leading_metric() -> None:
    better = replace(evaluation(0.9), metrics={"accuracy": 0.9, "loss": 5.0})
    assert TASK.gate(better, evaluation(0.5), 0.0).reason == ""


# --- a model and its held-out set ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arrays",
    [
        {"head.bias": np.zeros(4, np.float32)},
        {"head.weight": np.zeros((2, 4), np.float32)},
        {"head.more": np.zeros(3, np.float32)},
    ],
    ids=["bias", "labels", "names"],
)
def test_tensors_that_are_no_head_for_the_labels_are_refused(arrays: dict[str, Array]) -> None:
    TASK.check(initial_arrays())
    with pytest.raises(UsageError, match="head"):
        TASK.check(initial_arrays() | arrays)


def test_a_held_out_set_is_kept_once_masked_and_without_what_cannot_be_masked(tmp_path: Path) -> None:
    held_out = [Message("call 123", "a"), Message("impossible", "b")]

    def mask(text: str) -> str | None:
        return None if text == "impossible" else text.replace("123", "<NUMBER_1>")

    assert TASK.keep(tmp_path, held_out, mask) == {"could not be masked": 1}
    assert (tmp_path / "heldout.json").stat().st_mode & 0o777 == 0o600
    kept = (tmp_path / heldout.FILE).read_bytes()
    assert kept == b'{"texts":["call <NUMBER_1>"],"labels":["a"]}'
    assert TASK.keep(tmp_path, [], mask) == {}
    assert (tmp_path / heldout.FILE).read_bytes() == kept


def test_without_a_held_out_set_or_with_a_broken_one_there_is_no_evaluator(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no held-out set"):
        TASK.evaluator(tmp_path, None)
    (tmp_path / heldout.FILE).write_bytes(b"{")
    with pytest.raises(UsageError, match="cannot be read"):
        TASK.evaluator(tmp_path, None)


def test_the_files_of_a_material_give_it_again(tmp_path: Path) -> None:
    material = Material(["a", "b,c"], [Message('say "hi",\nthen go', "a"), Message("x", "b,c")], {})
    for name, text in Classification.files_of(material).items():
        (tmp_path / name).write_text(text)
    assert Classification.material({"labels": tmp_path / "labels.txt", "test": tmp_path / "test.csv"}) == material
    assert Classification.read(tmp_path / "test.csv").rows == material.held_out


def test_labels_come_from_their_file_or_the_training_file_or_the_held_out_one(tmp_path: Path) -> None:
    (tmp_path / "test.csv").write_text("text,label\nx,a\ny,b\n")
    (tmp_path / "data.csv").write_text("text,label\nx,a\ny,b\nz,c\n")
    (tmp_path / "labels").write_text("d\nb\na\n")
    test, data, labels = tmp_path / "test.csv", tmp_path / "data.csv", tmp_path / "labels"
    assert Classification.material({"test": test}).about == ["a", "b"]
    assert Classification.material({"test": test, "data": data, "labels": None}).about == ["a", "b", "c"]
    assert Classification.material({"test": test, "labels": labels}).about == ["d", "b", "a"]
    with pytest.raises(UsageError, match="both say"):
        Classification.material({"test": test, "data": data, "labels": labels})
    with pytest.raises(UsageError, match="'c'"):
        Classification.material({"test": data, "data": test})


# --- the table -----------------------------------------------------------------------------------------------------------


def test_every_spec_has_its_task_and_every_program_its_name() -> None:
    assert isinstance(task_of(SPEC), Classification)
    assert list(TASKS) == ["classification", "chat"]
    assert (
        [program.name for program in PROGRAMS.values()]
        == list(PROGRAMS)
        == ["sums", "ffa", "fedavg", "svd", "stack", "residual", "fedavgm", "fedadam"]
    )
    assert [kind_of(name) for name in PROGRAMS] == ["sums", *["train"] * 7]


def test_a_program_that_is_not_there_is_an_error_and_has_no_kind() -> None:
    with pytest.raises(UnknownProgramError, match="median"):
        program_of("median")
    assert kind_of("median") is None
