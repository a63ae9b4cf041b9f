"""The benchmarks of what a chat learns, on a tiny model and a few texts in the data sets' own formats."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
from fedloop_events.blobs.store import BlobStore
from fedloop_tasks.causal.examples import Example, Judged, Pair
from fedloop_tasks.causal.model import CausalModel, describe
from fedloop_tasks.causal.plan import ChatPlan
from fedloop_tasks.task import Arrays
from fedloop_tasks.turns import Turn

from benchmarks import chat_finance, chat_preferences, chat_rounds
from benchmarks.harness import Row

WORDS = ("card", "loan", "house", "fee", "rate", "bank", "cash", "bill", "coin", "safe", "vault", "debt")


def written(folder: Path, name: str, value: Any, *, lines: bool = False) -> None:
    text = "".join(f"{json.dumps(each)}\n" for each in value) if lines else json.dumps(value)
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_bytes(gzip.compress(text.encode()))


def asked(question: str, answer: list[str], **what: str) -> dict[str, Any]:
    kind = {"answer_type": "span", "answer_from": "text"} | what
    return {"question": question, "answer": answer, "rel_paragraphs": ["2"], **kind}


@pytest.fixture
def data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The data sets, as far as the benchmarks read them, and a tiny model in place of the package's."""
    reports = [
        {
            "paragraphs": [{"order": 1, "text": "no"}, {"order": 2, "text": f"the {word} is lost"}],
            "questions": [
                asked("what is lost?", [word]),
                asked("how many?", ["1"], answer_from="table"),
                asked("which?", ["a", "b"], answer_type="multi-span"),
                asked("both?", ["a", "b"]),
            ],
        }
        for word in WORDS[:6]
    ]
    written(tmp_path, "finance/tatqa_dev.json.gz", reports)
    pairs = [
        {"chosen": f"\n\nHuman: my {word}?\n\nAssistant: we sent it", "rejected": f"\n\nHuman: my {word}?\n\nAssistant: no"}
        for word in WORDS
    ]
    long = {"chosen": f"\n\nHuman: a?\n\nAssistant: {'word ' * 20}", "rejected": "\n\nHuman: a?\n\nAssistant: no"}
    written(tmp_path, "preferences/hh_harmless_test.jsonl.gz", [*pairs, pairs[0], long], lines=True)
    sums = [{"question": f"{n} + 1?", "answer": f"{n + 1}"} for n in range(4)]
    written(tmp_path, "education/gsm8k_train.jsonl.gz", sums, lines=True)
    monkeypatch.setenv("FEDLOOP_DATA", str(tmp_path))
    for benchmark in (chat_finance, chat_preferences):
        monkeypatch.setattr(benchmark, "smollm2", model)
    return tmp_path


def model(folder: Path) -> CausalModel:
    spec = describe("tiny", rank=2, layers=2, model_dir=tiny.save(folder / "tiny").parent)
    return CausalModel(spec, model_dir=folder, device="cpu")


def shown(rows: list[Row]) -> list[tuple[str, str]]:
    return [(row.what.split(": ", 1)[1], row.peer) for row in rows]


def test_the_finance_benchmark_compares_the_loss_with_the_base_and_the_bound(data: Path) -> None:
    rows = list(chat_finance.rows(quick=True))
    assert shown(rows) == [("loss per token", "the base model"), ("loss per token", "the bound")]
    assert rows[0].pairs[0].ours != rows[0].pairs[0].theirs
    assert rows[1].pairs[0].theirs == 0.6


def test_questions_about_a_report_have_one_answer_that_stands_in_its_text(data: Path) -> None:
    found = chat_finance.tatqa()
    assert found[1] == [Example((Turn("user", "the loan is lost\n\nwhat is lost?"),), "loan")]
    assert [len(each) for each in found] == [1] * 6


def test_the_preference_benchmark_measures_each_way_to_learn_on_pairs_and_on_general_answers(data: Path) -> None:
    rows = list(chat_preferences.rows(quick=True))
    names = [row.what.split(", ")[2].split(":")[0] for row in rows]
    assert names == ["DPO"] * 3 + ["KTO"] * 3 + ["DPO at epsilon 8"] * 2
    assert [row.at_least for row in rows] == [None, 1.0, 0.95, None, 1.0, 0.95, None, None]
    general = [row.pairs[0] for row in rows if "gsm8k" in row.what]
    assert all(each.ours != each.theirs for each in general)
    assert len({each.theirs for each in general}) == 1


def test_one_run_says_what_was_before_and_after(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat_preferences.main(["--only", "KTO", "--pairs", "6", "--tokens", "64"]) == 0
    assert capsys.readouterr().out.splitlines()[2].startswith("| of 6 held-out pairs ranked right | ")


def test_a_run_that_leaves_no_pair_to_be_held_out_is_refused(data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert chat_preferences.main(["--pairs", "12", "--tokens", "64"]) != 0
    assert "error: there are 12 such pairs, so 12 leave none to be held out" in capsys.readouterr().err


def test_pairs_share_no_beginning_and_none_is_long(data: Path, tmp_path: Path) -> None:
    found = chat_preferences.hh(model(tmp_path), 64)
    assert len(found) == len(WORDS)
    assert found[0] == Pair((Turn("user", "my card?"),), "we sent it", "no")


def test_thumbs_are_of_both_replies() -> None:
    turns = (Turn("user", "a?"),)
    assert chat_preferences.thumbs([Pair(turns, "b", "c")]) == [Judged(turns, "b", good=True), Judged(turns, "c", good=False)]


def test_a_release_is_the_mean_of_what_each_device_makes_of_the_one_before(tmp_path: Path) -> None:
    learner = model(tmp_path)
    shares = [[Example((Turn("user", f"my {word}?"),), "yes") for word in words] for words in (WORDS[:1], WORDS[1:3])]
    plan = ChatPlan(epsilon=None, planned_rounds=1)

    def after(*some: list[Example]) -> Arrays:
        chat_rounds.learn(learner, some, plan, 0, BlobStore(tmp_path / "blobs"))
        return learner.arrays()

    first, second, both = after(shares[0]), after(shares[1]), after(*shares)
    assert any((first[name] != second[name]).any() for name in both)
    for name, found in both.items():
        np.testing.assert_allclose(found, first[name] / 3 + second[name] * 2 / 3, rtol=1e-5, atol=1e-7)


def test_every_row_is_dealt_to_one_device() -> None:
    shares = chat_rounds.dealt(range(7), 3, 0)
    assert sorted(each for share in shares for each in share) == list(range(7))
    assert [len(share) for share in shares] == [3, 2, 2]
    assert shares != chat_rounds.dealt(range(7), 3, 1)
