"""CSV files: a bad file is an error that says where, a bad row costs that row alone."""

from __future__ import annotations

from pathlib import Path

import pytest
from fedloop_events.errors import UsageError
from fedloop_tasks.classification import corpus
from fedloop_tasks.task import Message

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
    long = "x" * (corpus.MAX_TEXT_CHARS + 1)
    huge = "y" * 1_000_000
    rows = ["good,a", f"{long},a", f"{huge},a", ",a", "text,", "one", "1,2,3", f"text,{'l' * 101}", "", "also good,b"]
    table = corpus.read(write(tmp_path, "text,label\n" + "\n".join(rows) + "\n"))
    assert table.rows == [Message("good", "a"), Message("also good", "b")]
    assert sum(table.skipped.values()) == 7
    assert table.skipped["text longer than 10,000 characters"] == 2
    assert corpus.labels_of(table) == ["a", "b"]


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


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_separators_and_encodings_of_spreadsheets_are_recognised(tmp_path: Path, separator: str, encoding: str) -> None:
    text = "text,label\r\nhell\u00f6,a\r\n,\r\nbye,b\r\n".replace(",", separator)
    table = corpus.read(write(tmp_path, text.encode(encoding)))
    assert (table.rows, table.lines, table.bad) == ([Message("hell\u00f6", "a"), Message("bye", "b")], [2, 4], [])


@pytest.mark.parametrize(
    ("data", "said"), [(b"PK\x03\x04..", "xlsx"), (b"\x1f\x8b..", "gzip"), (b"PAR1..", "Parquet"), (b"%PDF-1", "PDF")]
)
def test_what_a_file_really_is_stands_in_the_error(tmp_path: Path, data: bytes, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        corpus.read(write(tmp_path, data))


def test_the_hint_for_another_encoding_names_that_of_windows(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="line 2") as error:
        corpus.read(write(tmp_path, "text,label\n\u20ac 5,a\n".encode("cp1252")))
    assert "cp1252" in error.value.hint


def test_one_label_is_nothing_to_tell_apart(tmp_path: Path) -> None:
    path = write(tmp_path, "a\n")
    with pytest.raises(UsageError, match="nothing to tell apart"):
        corpus.read_labels(path)
    assert corpus.read_labels(write(tmp_path, "a\n\n b \n")) == ["a", "b"]
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
