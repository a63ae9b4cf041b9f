"""CSV files of texts and labels, read strictly: a bad file is an error, a bad row costs that row alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from fedloop_events.errors import UsageError

from fedloop_tasks import words
from fedloop_tasks.task import BadRow, Message, Messages
from fedloop_tasks.words import normalised

MAX_TEXT_CHARS: Final = 10_000
MAX_LABEL_CHARS: Final = 100
MAX_FILE_BYTES: Final = 1 << 30
LABEL_COLUMNS: Final = ("label", "intent", "category")
_SEPARATORS: Final = ",;\t|"
_MAGIC: Final = {
    b"PK\x03\x04": "a ZIP archive (as an .xlsx workbook is)",
    b"\xd0\xcf\x11\xe0": "an old Office file (.xls)",
    b"\x1f\x8b": "compressed with gzip",
    b"PAR1": "a Parquet file",
    b"%PDF": "a PDF file",
}


def read(path: Path) -> Messages:
    """The CSV file at `path`: a header, a column `text`, and a column `label`, `intent` or `category` (or just one other column).

    Labels are the answers, normalised. Rows whose text is empty or longer than `MAX_TEXT_CHARS`, whose label is empty or longer
    than `MAX_LABEL_CHARS`, or that have too few or too many columns are left out and listed with their lines. Raises
    `UsageError` for anything else, and if no row is left.
    """
    text = _decoded(path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True, delimiter=_separator(text))
    csv.field_size_limit(MAX_FILE_BYTES)
    found = Messages(path, [], [], [])
    try:
        heads = [head.strip() for head in next(reader, [])]
        text_at, label_at = _columns(path, heads)
        line = reader.line_num + 1
        for cells in reader:
            if any(map(str.strip, cells)):
                wrong = _wrong(cells, heads, text_at, label_at)
                if wrong:
                    found.bad.append(BadRow(line, wrong))
                else:
                    found.rows.append(Message(cells[text_at], normalised(cells[label_at])))
                    found.lines.append(line)
            line = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(
            f"{path} is no CSV file: line {reader.line_num} cannot be read", cause=str(error), hint='quotes are written ""'
        ) from None
    if not found.rows:
        cause = ", ".join(f"{count} skipped: {reason}" for reason, count in found.skipped.items())
        raise UsageError(f"{path} holds no row that can be used", cause=cause)
    return found


def written(messages: Iterable[Message]) -> str:
    """The text of such a file."""
    text = io.StringIO(newline="")
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(("text", LABEL_COLUMNS[0]))
    writer.writerows((each.text, each.answer) for each in messages)
    return text.getvalue()


def labels_of(messages: Messages) -> list[str]:
    """Each label once, sorted. Raises `UsageError` if there is nothing to tell apart."""
    return check_labels(sorted({each.answer for each in messages.rows}), messages.path)


def check_known(messages: Messages, labels: list[str]) -> None:
    """Raises `UsageError` for a label that is none of `labels`."""
    unknown = sorted({each.answer for each in messages.rows} - set(labels))
    if unknown:
        more = f" and {len(unknown) - 1} others" if len(unknown) > 1 else ""
        near = words.find(unknown[0], labels, any_case=True)
        raise UsageError(
            f"{messages.path} has the label {unknown[0]!r}{more}, which the training data does not have",
            hint=f"it has {near!r}: upper and lower case count" if near else "",
        )


def notes(labels: list[str]) -> list[str]:
    """What an operator should know of these labels."""
    return [f"the labels {' and '.join(map(repr, group))} differ in case alone" for group in words.alike(labels)]


def read_labels(path: Path) -> list[str]:
    """One label a line, each once, normalised. Raises `UsageError`."""
    labels: dict[str, int] = {}
    for number, line in enumerate(_decoded(path).splitlines(), 1):
        label = normalised(line)
        if len(label) > MAX_LABEL_CHARS:
            raise UsageError(f"{path}, line {number}: a label of {len(label)} characters", hint=f"at most {MAX_LABEL_CHARS}")
        if label in labels:
            raise UsageError(f"{path}, line {number}: the label {label!r} is there twice", cause=f"first in line {labels[label]}")
        if label:
            labels[label] = number
    return check_labels([*labels], path)


def check_labels(labels: list[str], path: Path) -> list[str]:
    """`labels`, if there is something to tell apart. Raises `UsageError`."""
    if len(labels) < 2:
        raise UsageError(f"{path} has {len(labels)} label: there is nothing to tell apart", hint="a classifier needs two or more")
    return labels


def _decoded(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise UsageError(f"{path} cannot be read", cause=error.strerror or "") from None
    if len(data) > MAX_FILE_BYTES:
        raise UsageError(f"{path} is larger than {MAX_FILE_BYTES:,} bytes")
    if not data.strip():
        raise UsageError(f"{path} is empty")
    for magic, what in _MAGIC.items():
        if data.startswith(magic):
            raise UsageError(f"{path} is {what}, not text", hint="save or unpack it as CSV in UTF-8")
    try:
        return data.decode("utf-16" if data.startswith((b"\xff\xfe", b"\xfe\xff")) else "utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UsageError(
            f"{path} is not UTF-8: line {line}, byte {error.start}",
            hint=f"if a Windows program wrote it: iconv -f cp1252 -t utf-8 {path} > NEW.csv",
        ) from None


def _separator(text: str) -> str:
    """Of the four that programs write, the one that stands most often in the header; a comma among equals."""
    header = text.partition("\n")[0]
    return max(_SEPARATORS, key=header.count)


def _columns(path: Path, heads: list[str]) -> tuple[int, int]:
    lower = [head.lower() for head in heads]
    for head in lower:
        if lower.count(head) > 1:
            raise UsageError(f"{path} has the column {head!r} twice")
    if "text" not in lower:
        raise UsageError(f"{path} has no column `text`", cause=f"its columns are {', '.join(heads)}"[:300])
    text_at = lower.index("text")
    named = [lower.index(name) for name in LABEL_COLUMNS if name in lower]
    if named:
        return text_at, named[0]
    if len(heads) == 2:
        return text_at, 1 - text_at
    raise UsageError(
        f"{path} has no column of labels", cause=f"its columns are {', '.join(heads)}"[:300], hint=f"name it {LABEL_COLUMNS[0]}"
    )


def _wrong(cells: list[str], heads: list[str], text_at: int, label_at: int) -> str:
    if len(cells) != len(heads):
        return "wrong number of columns"
    text, label = cells[text_at], normalised(cells[label_at])
    if not normalised(text):
        return "empty text"
    if len(text) > MAX_TEXT_CHARS:
        return f"text longer than {MAX_TEXT_CHARS:,} characters"
    if not label:
        return "no label"
    return "" if len(label) <= MAX_LABEL_CHARS else f"label longer than {MAX_LABEL_CHARS} characters"
