"""Files of rows: each is read as what it is, whatever its name says, within bounds, and an error says where."""

from __future__ import annotations

import gzip
import json
import lzma
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import duckdb
import pytest
from fedloop_events.errors import UsageError
from fedloop_tasks.rows import content, parquet
from fedloop_tasks.rows.reading import rows_of
from fedloop_tasks.rows.rows import Row
from row_files import FORMATS, delimited, json_lines, parquet_of
from row_files import parquet as as_parquet

gzipped = partial(gzip.compress, mtime=0)
"""Without the time: such bytes are in the names of tests, which are the same in every process that collects them."""
PAIRS = [("hell\u00f6, you", "a"), ('two\r\nlines, "quoted"; and\u2028more', "b"), ("\U0001f600", "a b")]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Its name says nothing about what is in it."""
    return tmp_path / "messages.csv"


def found(path: Path, data: bytes | str, *wanted: str) -> list[Row]:
    """The rows of a file of this content, in the columns `wanted`."""
    path.write_bytes(data.encode() if isinstance(data, str) else data)
    rows = rows_of(path)
    return list(rows.cells([rows.heads.index(each) for each in wanted or ("text", "label")]))


def refused(path: Path, data: bytes | str) -> UsageError:
    with pytest.raises(UsageError) as error:
        found(path, data)
    assert str(path) in error.value.message
    return error.value


@pytest.mark.parametrize("kind", FORMATS)
def test_the_same_rows_come_out_of_every_format(path: Path, kind: str) -> None:
    rows = found(path, FORMATS[kind](PAIRS))
    assert [tuple(row.cells) for row in rows] == PAIRS
    assert [row.wrong for row in rows] == [""] * 3


@pytest.mark.parametrize(
    ("kind", "unit", "places"),
    [
        ("csv", "line", [2, 3, 5]),
        ("tabs in UTF-16", "line", [2, 3, 5]),
        ("csv, gzip", "line", [2, 3, 5]),
        ("JSON Lines", "line", [1, 2, 3]),
        ("JSON array", "line", [2, 6, 10]),
        ("Parquet", "row", [1, 2, 3]),
    ],
)
def test_a_row_is_at_the_line_that_it_begins_in_and_in_parquet_at_its_number(
    path: Path, kind: str, unit: str, places: list[int]
) -> None:
    assert [row.at for row in found(path, FORMATS[kind](PAIRS))] == places
    assert rows_of(path).unit == unit


# --- what a file is ---


def zipped(path: Path) -> bytes:
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("xl/workbook.xml", "<workbook/>")
    return path.read_bytes()


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\xd0\xcf\x11\xe0..", "an old Office file (.xls)"),
        (b"%PDF-1", "a PDF file"),
        (b"{\\rtf1 text,label", "formatting"),
        (b"PARE....PARE", "an encrypted Parquet file"),
        (b"ARROW1\0\0", "Arrow"),
        (b"ORC\n", "ORC"),
        (b"Obj\x01..", "Avro"),
        (b"SQLite format 3\0", "SQLite"),
        (b"BZh91AY", "bzip2"),
        (lzma.compress(b"text,label\nx,y\n"), "xz"),
        (b"\x28\xb5\x2f\xfd..", "zstd"),
        (b"7z\xbc\xaf\x27\x1c", "7z"),
        (b"\x80\x04\x95..", "pickle"),
        (b"x" * 257 + b"ustar", "a tar archive"),
        (gzipped(b"x" * 257 + b"ustar"), "a tar archive"),
        (b"\n <!DOCTYPE html><table>", "HTML"),
        (b'<?xml version="1.0"?>', "XML"),
        (gzipped(gzipped(b"text,label\n")), "what is in it is no text"),
        (gzipped(as_parquet(PAIRS)), "what is in it is no text"),
        (gzipped(b" \n"), "is empty"),
    ],
)
def test_what_a_file_really_is_stands_in_the_error_with_what_to_do(path: Path, data: bytes, said: str) -> None:
    error = refused(path, data)
    assert said in error.message
    assert error.hint or said == "is empty"


def test_a_workbook_is_refused_as_what_it_is(path: Path) -> None:
    error = refused(path, zipped(path))
    assert ".xlsx" in error.message
    assert "CSV in UTF-8" in error.hint


@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        *((encoding, "\ufeff") for encoding in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be")),
        *((encoding, "") for encoding in ("utf-8", "utf-16-le", "utf-16-be")),
    ],
)
def test_unicode_is_recognised_with_a_mark_and_utf_16_without(path: Path, encoding: str, mark: str) -> None:
    assert found(path, f"{mark}text,label\nhell\u00f6,a\n".encode(encoding)) == [Row(2, ["hell\u00f6", "a"])]


@pytest.mark.parametrize(
    ("data", "said"),
    [
        ("text,label\nx,y\n\u20ac 5,a\n".encode("cp1252"), "UTF-8: line 3, byte 15"),
        ("text,label\nx,y\nhello,a".encode("utf-16")[:-1], "UTF-16: line 3, byte 44"),
        (gzipped("text,label\n\u20ac 5,a\n".encode("cp1252")), "UTF-8: line 2"),
    ],
)
def test_what_cannot_be_decoded_is_an_error_with_its_line(path: Path, data: bytes, said: str) -> None:
    assert f"is not {said}" in refused(path, data).message


@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_the_hint_for_the_encoding_of_windows_makes_a_file_that_can_be_read(
    tmp_path: Path, pack: Callable[[bytes], bytes]
) -> None:
    error = refused(tmp_path / "it's mine.csv", pack("text,label\n\u20ac 5,a\n".encode("cp1252")))
    _, _, command = error.hint.partition(": ")
    subprocess.run(command, shell=True, cwd=tmp_path, check=True)
    assert [row.cells for row in rows_of(tmp_path / "NEW.csv").cells([0, 1])] == [["\u20ac 5", "a"]]


@pytest.mark.parametrize("name", ["nowhere", "."])
def test_a_file_that_cannot_be_opened_is_an_error(tmp_path: Path, name: str) -> None:
    with pytest.raises(UsageError, match="cannot be read"):
        rows_of(tmp_path / name)


# --- bounds ---


def test_what_unpacks_to_more_than_the_bound_is_refused_and_not_unpacked(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bound = 1 << 20
    packed = gzip.compress(bytes(200 * bound), 1)
    monkeypatch.setattr(content, "MAX_FILE_BYTES", bound)
    assert len(packed) < bound
    tracemalloc.start()
    error = refused(path, packed)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "unpacks to more than 1,048,576 bytes" in error.message
    assert peak < 10 * bound


def test_a_file_larger_than_the_bound_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(content, "MAX_FILE_BYTES", 20)
    assert found(path, "text,label\nhello,a\n\n") == [Row(2, ["hello", "a"])]
    assert "larger than 20 bytes" in refused(path, "text,label\nhello,a\n\n\n").message


def test_parquet_that_unpacks_to_more_than_the_bound_is_refused(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with duckdb.connect() as database:
        data = parquet_of(database, "SELECT repeat('x', 1000) AS text, 'a' AS label FROM range(100000)")
    monkeypatch.setattr(parquet, "MAX_FILE_BYTES", 10**6)
    assert len(data) < 10**6
    assert "unpacks to more than 1,000,000 characters" in refused(path, data).message


@pytest.mark.parametrize("cut", [20, -1, -20])
def test_gzip_that_is_cut_off_is_refused(path: Path, cut: int) -> None:
    assert "damaged or cut off" in refused(path, gzip.compress(delimited(PAIRS))[:cut]).message


# --- CSV ---


@pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_separators_and_encodings_of_spreadsheets_are_recognised(path: Path, separator: str, encoding: str) -> None:
    text = "text,label\r\nhell\u00f6,a\r\n,\r\nbye,b\r\n".replace(",", separator)
    assert found(path, text.encode(encoding)) == [Row(2, ["hell\u00f6", "a"]), Row(4, ["bye", "b"])]


@pytest.mark.parametrize("blank", ["\n\n", ",,\n\n", " , ,\n"])
def test_blank_rows_are_left_out_also_before_the_header(path: Path, blank: str) -> None:
    lines = blank.count("\n")
    assert found(path, f"{blank}text,label,\n{blank}hello,a,\n{blank}") == [Row(2 * lines + 2, ["hello", "a"])]


@pytest.mark.parametrize(
    ("head", "row"),
    [
        ("text,label,,,", "hello,a,,,"),
        ("text , label, ,", "hello,a, ,"),
        ("text,label,,,", "hello,a"),
        ("text,label", "hello,a,, "),
        ("text,,label,", "hello,,a,"),
        ("text,label,note", "hello,a"),
        (",text,label", "0,hello,a"),
        (",,text,label,", "0,7,hello,a,"),
    ],
)
def test_columns_without_a_name_are_ignored_while_they_are_empty_or_left_of_the_first_name(
    path: Path, head: str, row: str
) -> None:
    assert found(path, f"{head}\n{row}\n") == [Row(2, ["hello", "a"])]


@pytest.mark.parametrize(
    ("head", "row", "wrong"),
    [
        ("text,label,,", "hello, you,a,", "a value in a column without a name"),
        ("text,,label", "hello, you,a", "a value in a column without a name"),
        ("text,label", "hello, you,a", "wrong number of columns"),
        ("text,note,label", "hello,x", "wrong number of columns"),
    ],
)
def test_a_value_where_no_name_is_costs_its_row(path: Path, head: str, row: str, wrong: str) -> None:
    assert found(path, f"{head}\n{row}\n") == [Row(2, wrong=wrong)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('"text; or what was said",label\n"hello, you",a\n', "text; or what was said"),
        ('"a,b,c";label\nhello;a\n', "a,b,c"),
        ("sep=;\r\na,b,c;label\r\nhello;a\r\n", "a,b,c"),
        ("sep=^\ntext^label\nhello^a\n", "text"),
        ("text; or what was said,label\nhello,a\n", "text; or what was said"),
        ("text|label\rhello, you; there|a\r", "text"),
        ("text\tlabel\nI said; no, no, no\ta\n", "text"),
    ],
)
def test_the_separator_is_the_one_that_divides_the_header(path: Path, text: str, expected: str) -> None:
    (row,) = found(path, text, expected, "label")
    assert row.cells[1] == "a"


@pytest.mark.parametrize(
    ("text", "line"), [('text,label\nx,y\n"never ends,a\nx,b\n', 3), ('text,label\n"two\nlines",a\n"a"b,c\n', 4)]
)
def test_quotes_that_do_not_match_are_an_error_with_the_line_of_their_row(path: Path, text: str, line: int) -> None:
    error = refused(path, text)
    assert f"is no CSV file: the row of line {line} cannot be read" in error.message


# --- JSON ---


def test_a_line_that_is_no_object_costs_that_line_alone(path: Path) -> None:
    lines = ['{"text": "x", "label": "a"}', "", '{"text": "x"', "[1]", "[" * 100_000, '{"label": "b", "more": 1}', "9" * 5000]
    assert found(path, "\r\n".join(lines)) == [
        Row(1, ["x", "a"]),
        *(Row(line, wrong="no JSON object on one line") for line in (3, 4, 5)),
        Row(6, [None, "b"]),
        Row(7, wrong="no JSON object on one line"),
    ]


def test_a_json_text_may_hold_what_divides_lines_elsewhere(path: Path) -> None:
    text = "one\u2028two\x85three\u2029"
    assert found(path, json.dumps({"text": text, "label": "a"}, ensure_ascii=False)) == [Row(1, [text, "a"])]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('[\n{"text": "x", "label": "a"},\n{"text": "y",', "line 3 cannot be read"),
        ('[\n{"text": "x", "label": "a"}\n', "line 3 cannot be read"),
        ('[\n{"text": "x",\n\n"label": a}]', "line 4 cannot be read"),
        ('[\n{"text": "x", "label": "a"}]\n]', "something follows the array's end in line 2"),
        ("[[" + "[" * 100_000, "line 1 cannot be read"),
    ],
)
def test_an_array_that_cannot_be_read_is_an_error_with_its_line(path: Path, text: str, said: str) -> None:
    assert f"is no JSON: {said}" in refused(path, text).message


def test_an_element_that_is_no_object_costs_that_row(path: Path) -> None:
    data = '\n\n[{"text": "x",\n "label": "a"}, ["x", "b"], {},\n{"text": "y", "label": "b"}]'
    assert found(path, data) == [Row(3, ["x", "a"]), Row(4, wrong="no JSON object"), Row(5, ["y", "b"])]


@pytest.mark.parametrize("head", ["[text],label", "{text},label", '"[text]",label'])
def test_a_table_whose_header_begins_with_a_bracket_is_a_table(path: Path, head: str) -> None:
    assert found(path, f"{head}\nhello,a\n", head.split(",")[0].strip('"'), "label") == [Row(2, ["hello", "a"])]


# --- Parquet ---


@pytest.mark.parametrize("name", ["label=x/messages", "[ab]*?.parquet", "it's.csv"])
def test_parquet_is_read_whatever_its_path_holds(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "a.parquet").write_bytes(as_parquet([("another file", "b")]))
    assert found(path, as_parquet(PAIRS)) == [Row(number, pair) for number, pair in enumerate(PAIRS, 1)]
    assert list(rows_of(path).heads) == ["text", "label"]


def test_parquet_gives_values_as_they_are_and_reads_no_other_column(path: Path) -> None:
    query = """FROM (VALUES ('x', 1, NULL), (NULL, 2, [1]), ('y', NULL, [2])) AS t("a ""text", label, more)"""
    with duckdb.connect() as database:
        data = parquet_of(database, query)
    assert found(path, data, 'a "text', "label") == [Row(1, ("x", 1)), Row(2, (None, 2)), Row(3, ("y", None))]


@pytest.mark.parametrize("damage", ["cut off", "footer", "pages"])
def test_parquet_that_is_damaged_is_an_error(path: Path, damage: str) -> None:
    data = bytearray(as_parquet(PAIRS))
    if damage == "cut off":
        data = data[: len(data) // 2]
    elif damage == "footer":
        data[-8:-4] = b"\xff\xff\xff\x7f"
    else:
        data[4:30] = b"\xff" * 26
    assert "is a Parquet file that cannot be read" in refused(path, bytes(data)).message


def test_an_error_quotes_nothing_of_what_the_file_holds(path: Path) -> None:
    with duckdb.connect() as database:
        data = parquet_of(database, "SELECT 'my secret' AS text, 'a' AS label", "COMPRESSION uncompressed")
    assert b"secret" in data
    for each in (data.replace(b"secret", b"secre\xff"), b'text,label\n"my secret"s,a\n', b"text,label\nmy secret\xff,a\n"):
        error = refused(path, each)
        assert "secre" not in error.message + error.cause + error.hint


def test_without_the_extra_a_parquet_file_says_what_to_install_and_all_else_is_read(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = as_parquet(PAIRS)
    monkeypatch.setitem(sys.modules, "duckdb", None)
    error = refused(path, data)
    assert "what reads those is not installed" in error.message
    assert "pip install 'fedloop[parquet]'" in error.hint
    assert len(found(path, json_lines(PAIRS))) == 3
