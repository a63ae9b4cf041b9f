"""The labels of `server init`: published as they are, so none may name a person; none twice by mistake."""

from __future__ import annotations

from pathlib import Path

import pytest

from .conftest import Fedloop

pytestmark = pytest.mark.slow


def write(path: Path, *labels: str) -> Path:
    path.write_text("text,label\n" + "".join(f"hello there,{label}\n" for label in labels))
    return path


@pytest.mark.parametrize("as_is", [[], ["--held-out-as-is"]])
def test_a_label_that_the_masker_would_mask_is_refused_and_nothing_is_made(
    fedloop: Fedloop, tmp_path: Path, as_is: list[str]
) -> None:
    test = write(tmp_path / "test.csv", "loan", "John Smith")
    ended = fedloop("server", "init", tmp_path / "bank", "--test", test, "--json", *as_is)
    assert ended.status == 2
    assert ended.document["error"]["message"] == "'John Smith', which the model would answer with, would be masked"
    assert not (tmp_path / "bank").exists()


def test_labels_that_differ_in_case_alone_are_noted(fedloop: Fedloop, tmp_path: Path) -> None:
    test = write(tmp_path / "test.csv", "loan", "Loan", "cafe\u0301", "caf\u00e9\u200b")
    made = fedloop("server", "init", tmp_path / "bank", "--test", test, "--no-dp", "--json")
    assert (made.status, made.document["labels"]) == (0, 3), made.err
    assert "warning: the labels 'Loan' and 'loan' differ in case alone" in made.err
