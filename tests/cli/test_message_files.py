"""Files of messages on the command line: columns with names of their own, and every format, wherever such a file is given."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from row_files import parquet

from .conftest import Fedloop

pytestmark = pytest.mark.slow

PAIRS = [("my card is gone", "lost"), ("I need a loan", "loan"), ("where is my card", "lost"), ("a loan, please", "loan")]
COLUMNS = ("--text-column", "utterance", "--label-column", "Answer")


def own_names(path: Path) -> Path:
    path.write_text("".join(json.dumps({"id": "x", "utterance": text, "answer": label}) + "\n" for text, label in PAIRS))
    return path


def test_a_deployment_is_made_and_fed_from_files_whose_columns_have_names_of_their_own(fedloop: Fedloop, tmp_path: Path) -> None:
    named, usual = own_names(tmp_path / "named.csv"), tmp_path / "usual.csv"
    init = ("server", "init", tmp_path / "bank", "--data", named, "--test", named, "--no-dp", "--json")
    refused = fedloop(*init)
    assert (refused.status, refused.document["error"]["cause"]) == (2, "its columns are id, utterance, answer")
    assert not (tmp_path / "bank").exists()
    made = fedloop(*init, *COLUMNS)
    assert (made.status, made.document["labels"], made.document["held_out"]) == (0, 2, 4), made.err
    store = tmp_path / "phone"
    enrolled = fedloop("agent", "enrol", tmp_path / "bank", "--store", store, "--key-from", "file", "--no-dp")
    assert enrolled.status == 0, enrolled.err
    feedback = ("agent", "feedback", "--store", store, "--json", "--data")
    assert fedloop(*feedback, named, *COLUMNS).document["recorded"] == 4
    usual.write_bytes(parquet(PAIRS))
    assert fedloop(*feedback, usual).document["known"] == 4
    settings = tmp_path / "feedback.toml"
    settings.write_text('[agent.feedback]\ntext-column = "utterance"\nlabel-column = "answer"\n')
    assert fedloop(*feedback, named, "--config", settings).document["known"] == 4
    wrong = fedloop(*feedback, usual, *COLUMNS)
    assert (wrong.status, wrong.document["error"]["cause"]) == (2, "its columns are text, label")


def test_the_demo_reads_every_format_and_the_columns_that_are_named(fedloop: Fedloop, tmp_path: Path) -> None:
    data = tmp_path / "data.csv"
    data.write_bytes(parquet(PAIRS))
    ended = fedloop("demo", "--data", data, "--test", data, "--clients", "8")
    assert (ended.status, "has 4 messages for 8 devices" in ended.err) == (2, True)
    named = own_names(tmp_path / "named.jsonl")
    ended = fedloop("demo", "--data", named, "--test", named, "--clients", "8", *COLUMNS)
    assert (ended.status, "has 4 messages for 8 devices" in ended.err) == (2, True)
    assert "no column 'utterance'" in fedloop("demo", "--data", data, "--test", named, *COLUMNS).err
