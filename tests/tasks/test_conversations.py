"""Files of conversations, as TRL's trainers read them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from fedloop_events.errors import UsageError
from fedloop_tasks.causal import corpus
from fedloop_tasks.task import Message
from fedloop_tasks.turns import Turn

ASKED = [{"role": "user", "content": "where is it?"}]
ANSWERED = [{"role": "assistant", "content": "on its way"}]


def read(path: Path, *rows: object, **columns: str) -> Any:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return corpus.read(path, {name.replace("_", "-"): value for name, value in columns.items()})


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "rows.jsonl"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "where is it?", "completion": "on its way"}, Message("where is it?", "on its way")),
        ({"prompt": ASKED, "completion": ANSWERED}, Message("where is it?", "on its way")),
        ({"messages": [*ASKED, *ANSWERED]}, Message("where is it?", "on its way")),
        ({"prompt": ASKED, "completion": ANSWERED, "label": False}, Message("where is it?", "on its way", good=False)),
        ({"prompt": "where is it?", "completion": "on its way", "label": 1}, Message("where is it?", "on its way", good=True)),
        (
            {"prompt": ASKED, "chosen": ANSWERED, "rejected": [{"role": "assistant", "content": "gone"}]},
            Message("where is it?", "on its way", rejected="gone"),
        ),
        (
            {"chosen": [*ASKED, *ANSWERED], "rejected": [*ASKED, {"role": "assistant", "content": "gone"}]},
            Message("where is it?", "on its way", rejected="gone"),
        ),
        ({"chosen": "It is on its way.", "rejected": "It is gone."}, Message("It is", "on its way.", rejected="gone.")),
        (
            {
                "chosen": "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: where is it?\n\nAssistant: on its way",
                "rejected": "\n\nHuman: hello\n\nAssistant: hi\n\nHuman: where is it?\n\nAssistant: gone",
            },
            Message("where is it?", "on its way", (Turn("user", "hello"), Turn("assistant", "hi")), "gone"),
        ),
        (
            {"messages": [{"role": "system", "content": "be short"}, *ASKED, *ANSWERED]},
            Message("where is it?", "on its way", (Turn("system", "be short"),)),
        ),
    ],
)
def test_a_row_of_each_format_is_a_message_and_is_read_again_as_it_was_written(path: Path, row: object, message: Message) -> None:
    assert read(path, row).rows == [message]
    path.write_text(corpus.written([message]), encoding="utf-8")
    assert corpus.read(path).rows == [message]


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "", "completion": "b"}, "no prompt"),
        ({"prompt": "a", "completion": ""}, "no completion"),
        ({"prompt": " ", "completion": "b"}, "empty prompt"),
        ({"prompt": "a", "completion": "\u200b"}, "empty answer"),
        ({"prompt": "a" * 10_001, "completion": "b"}, "longer than 10,000"),
        ({"prompt": ANSWERED, "completion": "b"}, "does not end with what a user says"),
        ({"prompt": ASKED, "completion": ASKED}, "one answer of the assistant"),
        ({"prompt": [{"role": "tool", "content": "a"}], "completion": "b"}, "neither text nor turns"),
        ({"prompt": [], "completion": "b"}, "does not end with what a user says"),
        ({"prompt": {"a": 1}, "completion": "b"}, "neither text nor turns"),
        ({"prompt": "a\ud800", "completion": "b"}, "no Unicode text"),
        ({"prompt": "a", "completion": "b", "label": "perhaps"}, "neither true nor false"),
        ({"prompt": "a", "chosen": "b", "rejected": "b", "completion": None}, "the chosen answer is the rejected one"),
        ("a text", "no JSON object"),
    ],
)
def test_a_bad_row_costs_itself_alone_and_no_word_of_it_is_said(path: Path, row: object, reason: str) -> None:
    found = read(path, {"prompt": "good", "completion": "row"}, row, {"prompt": "another", "completion": "one"})
    assert [each.text for each in found.rows] == ["good", "another"]
    assert [each.line for each in found.bad] == [2]
    assert reason in found.bad[0].reason


def test_columns_may_have_names_of_their_own_and_csv_may_hold_turns_as_json(path: Path) -> None:
    rows = read(path, {"question": "a?", "answer": "b"}, prompt_column="question", completion_column="answer").rows
    assert rows == [Message("a?", "b")]
    table = path.with_suffix(".csv")
    table.write_text('prompt,completion\n"[{""role"": ""user"", ""content"": ""a?""}]",b\n', encoding="utf-8")
    assert corpus.read(table).rows == rows


@pytest.mark.parametrize("row", [{"text": "a"}, {"prompt": "a"}, {"chosen": "a"}, {"prompt": "a", "answer": "b"}])
def test_a_file_of_no_format_is_one_clear_error_that_names_its_columns(path: Path, row: dict[str, str]) -> None:
    with pytest.raises(UsageError, match="holds no conversations") as caught:
        read(path, row)
    assert all(name in str(caught.value.cause) for name in row)
