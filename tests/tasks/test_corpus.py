"""Files of messages: a bad file is an error that says where, a bad row costs that row alone."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pytest
from fedloop_events.errors import UsageError
from fedloop_tasks.classification import corpus
from fedloop_tasks.classification.corpus import Columns
from fedloop_tasks.task import Message
from row_files import FORMATS, parquet, parquet_of

SAME = ("caf\u00e9 bar", "cafe\u0301 bar", " caf\u00e9\u200b  bar\ufeff", "caf\u00e9\u00a0bar\ufe0f")
"""One label, as four programs write it."""


def write(tmp_path: Path, data: bytes | str) -> Path:
    path = tmp_path / "messages.csv"
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    return path


@pytest.mark.parametrize(
    "head", ["text,label", "Text,Label", "text,intent", "category,text", "text,anything", "\ufefftext,label"]
)
def test_columns_are_found_by_name(tmp_path: Path, head: str) -> None:
    first = head.lower().lstrip("\ufeff").startswith("text")
    row = '"hello, you",greet' if first else 'greet,"hello, you"'
    assert corpus.read(write(tmp_path, f"{head}\n{row}\n")).rows == [Message("hello, you", "greet")]


def test_a_bad_row_is_skipped_and_counted_and_nothing_else_is_lost(tmp_path: Path) -> None:
    most, long = "x" * corpus.MAX_TEXT_CHARS, "x" * (corpus.MAX_TEXT_CHARS + 1)
    huge = "y" * 1_000_000
    rows = [
        "good,a",
        f"{most},{'l' * 100}",
        "\u200b \ufeff,a",
        f"{long},a",
        f"{huge},a",
        ",a",
        "text,",
        "one",
        "1,2,3",
        f"text,{'l' * 101}",
        "",
        "also good,b",
    ]
    table = corpus.read(write(tmp_path, "text,label\n" + "\n".join(rows) + "\n"))
    assert table.rows == [Message("good", "a"), Message(most, "l" * 100), Message("also good", "b")]
    assert (table.lines, [each.line for each in table.bad]) == ([2, 3, 13], [*range(4, 12)])
    assert sum(table.skipped.values()) == 8
    assert table.skipped["text longer than 10,000 characters"] == 2
    assert table.skipped["empty text"] == 2
    assert corpus.labels_of(table) == ["a", "b", "l" * 100]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"", "is empty"),
        (b"\n\n", "is empty"),
        (b"text,label\n", "no row that can be used"),
        (b"text,label\n,a\n", "no row that can be used"),
        (b"words,label\nx,y\n", "no column `text`"),
        (b"text,one,two\nx,y,z\n", "no column of labels"),
        (b"text,text,label\nx,y,z\n", "twice"),
        (b"text,label\nhello\xff,a\n", "not UTF-8: line 2"),
        (b'text,label\n"never ends,a\nx,b\n', "is no CSV file"),
        (b'text,label\n"a"b,c\n', "is no CSV file"),
    ],
)
def test_a_bad_file_is_an_error_that_says_what(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(UsageError) as raised:
        corpus.read(write(tmp_path, data))
    assert said in raised.value.message
    assert "hello" not in raised.value.message + raised.value.cause


@pytest.mark.parametrize(
    ("text", "columns"),
    [
        ("utterance,answer,note\nhello,a,x\n", Columns("utterance", "answer")),
        ("Utterance ;\u00c4nswer;note\nhello;a;x\n", Columns("utterance", "a\u0308nswer")),
        ("text,label,intent\nhello,x,a\n", Columns(label="intent")),
        ("A\u0308ndern,text,note\na,hello,x\n", Columns(label="\u00e4ndern")),
        ("text,note,intent\nhello,x,a\n", Columns()),
        ("category,intent,text,label\nx,y,hello,a\n", Columns()),
        ("text,label,words\nx,a,hello\n", Columns("words")),
        ("label,text\nhello,a\n", Columns("label")),
        ("text,category\na,hello\n", Columns("category")),
        ("label,text\nhello,a\n", Columns("label", "text")),
        ("words,anything\nhello,a\n", Columns("words")),
        ("Words,words,label\nx,hello,a\n", Columns("words")),
        ("text,label,note,note,,\nhello,a,x,y,,\n", Columns()),
        (",text,anything,\n0,hello,a,\n", Columns()),
        ('{"utterance": "hello", "answer": "a", "note": 1}\n', Columns("utterance", "answer")),
    ],
)
def test_columns_that_are_named_are_those_that_are_read(tmp_path: Path, text: str, columns: Columns) -> None:
    assert corpus.read(write(tmp_path, text), columns).rows == [Message("hello", "a")]


@pytest.mark.parametrize(
    ("text", "columns", "said"),
    [
        ("words,note,,label\n", Columns(), "no column `text`"),
        ("words,note,,label\n", Columns("wrods"), "no column 'wrods'"),
        ("words,note,,label\n", Columns("words", "answer"), "no column 'answer'"),
        ("words,note,,label\n", Columns("words", "words"), "the column 'words' cannot hold both"),
        ("words,note,,label\n", Columns("words", ""), "no column ''"),
        ("words,note,,label\n", Columns("words", "Words"), "the column 'words' cannot hold both"),
        ("words,note,other,,\n", Columns("words"), "no column of labels"),
        ("words,Words,label\n", Columns("WORDS"), "the column 'WORDS' twice"),
        ('{"words": "x", "note": 1}\n{"label": 1}\n', Columns(), "no column `text`"),
    ],
)
def test_columns_that_are_not_there_are_an_error_that_names_those_that_are(
    tmp_path: Path, text: str, columns: Columns, said: str
) -> None:
    with pytest.raises(UsageError) as raised:
        corpus.read(write(tmp_path, text), columns)
    error = raised.value
    assert said in error.message
    if "twice" not in said:
        assert error.cause.startswith("its columns are words, note, ")
        assert "-column NAME" in error.hint or columns != Columns()


@pytest.mark.parametrize("kind", FORMATS)
def test_messages_are_the_same_from_every_format(tmp_path: Path, kind: str) -> None:
    pairs = [("hello, you", " card\u200b lost"), ("", "a"), ("two\nlines", "b"), ("bye", ""), ("42", "7")]
    table = corpus.read(write(tmp_path, FORMATS[kind](pairs)))
    assert table.rows == [Message("hello, you", "card lost"), Message("two\nlines", "b"), Message("42", "7")]
    assert table.skipped == {"empty text": 1, "no label": 1}
    assert table.lines == {"csv": [2, 4, 7], "JSON Lines": [1, 3, 5], "Parquet": [1, 3, 5]}.get(kind, table.lines)
    assert table.unit == ("row" if kind == "Parquet" else "line")


def test_values_that_are_numbers_are_text_and_others_cost_their_row(tmp_path: Path) -> None:
    rows = ['"x", "label": 7', '5, "label": "a"', '"x", "label": true', '"x", "label": 1.0', '["x"], "label": "a"']
    rows += ['"\\ud83d", "label": "a"', 'null, "label": "a"', '"x", "label": null']
    table = corpus.read(write(tmp_path, "".join(f'{{"text": {row}}}\n' for row in rows)))
    assert table.rows == [Message("x", "7"), Message("5", "a")]
    assert [(each.line, each.reason) for each in table.bad] == [
        (3, "the label is neither text nor a whole number"),
        (4, "the label is neither text nor a whole number"),
        (5, "the text is neither text nor a whole number"),
        (6, "the text is neither text nor a whole number"),
        (7, "empty text"),
        (8, "no label"),
    ]


def test_texts_that_parquet_holds_as_bytes_or_categories_are_texts(tmp_path: Path) -> None:
    query = r"""SELECT x::BLOB AS text, y::ENUM('a', 'b') AS label FROM (VALUES ('hello', 'a'), ('\xFF', 'b')) AS t(x, y)"""
    with duckdb.connect() as database:
        table = corpus.read(write(tmp_path, parquet_of(database, query)))
    assert table.rows == [Message("hello", "a")]
    assert [each.line for each in table.bad] == [2]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}\n{}\n", "no row that can be used"),
        ('{"": "x"}\n', "no row that can be used"),
        ('{\n"text": "x",\n"label": "a"\n}\n', "no row that can be used"),
        ("[]", "no row that can be used"),
        ("text\nx\n", "no column of labels"),
        (",,\n", "no column `text`"),
    ],
)
def test_a_file_without_columns_or_rows_is_an_error(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        corpus.read(write(tmp_path, text))


def test_a_file_of_too_many_rows_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "MAX_ROWS", 2)
    assert len(corpus.read(write(tmp_path, "text,label\nx,a\n\ny,b\n")).rows) == 2
    with pytest.raises(UsageError, match="more than 2 rows"):
        corpus.read(write(tmp_path, "text,label\nx,a\n,\ny,b\nz,\n"))


def test_one_label_is_nothing_to_tell_apart(tmp_path: Path) -> None:
    path = write(tmp_path, "a\n")
    with pytest.raises(UsageError, match="nothing to tell apart"):
        corpus.read_labels(path)
    assert corpus.read_labels(write(tmp_path, "a\n\n b \n")) == ["a", "b"]
    with pytest.raises(UsageError, match="line 2: a label of 101 characters"):
        corpus.read_labels(write(tmp_path, f"a\n{'l' * 101}\nb\n"))
    with pytest.raises(UsageError, match="is a Parquet file"):
        corpus.read_labels(write(tmp_path, parquet([("x", "a")])))
    with pytest.raises(UsageError, match="line 3: the label 'a' is there twice"):
        corpus.read_labels(write(tmp_path, "a\n\n a\u200b\n"))


def test_labels_that_look_the_same_are_one_and_those_that_differ_in_case_are_noted(tmp_path: Path) -> None:
    table = corpus.read(write(tmp_path, "text,label\n" + "".join(f"hello,{each}\n" for each in (*SAME, "CAF\u00c9 bar", "b"))))
    labels = corpus.labels_of(table)
    assert labels == ["CAF\u00c9 bar", "b", "caf\u00e9 bar"]
    assert corpus.read_labels(write(tmp_path, f"{SAME[1]}\nb\n")) == [SAME[0], "b"]
    assert corpus.notes(labels) == ["the labels 'CAF\u00c9 bar' and 'caf\u00e9 bar' differ in case alone"]
    corpus.check_known(corpus.read(write(tmp_path, f"text,label\nhello,{SAME[2]}\n")), labels)
    with pytest.raises(UsageError) as error:
        corpus.check_known(corpus.read(write(tmp_path, "text,label\nhello,B\n")), labels)
    assert "it has 'b'" in error.value.hint
