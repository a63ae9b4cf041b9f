"""Files of texts and labels, read strictly: a bad file is an error, a bad row costs that row alone."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

from fedloop_events.errors import UsageError
from msgspec import Struct

from fedloop_tasks import words
from fedloop_tasks.rows.content import text_of
from fedloop_tasks.rows.reading import rows_of
from fedloop_tasks.task import BadRow, Message, Messages
from fedloop_tasks.words import normalised

MAX_TEXT_CHARS: Final = 10_000
MAX_LABEL_CHARS: Final = 100
MAX_ROWS: Final = 5_000_000
TEXT_COLUMNS: Final = ("text",)
LABEL_COLUMNS: Final = ("label", "intent", "category")


class Columns(Struct, frozen=True):
    """What the columns are called; None is one of `TEXT_COLUMNS` or `LABEL_COLUMNS`."""

    text: str | None = None
    label: str | None = None


USUAL: Final = Columns()


def read(path: Path, columns: Columns = USUAL) -> Messages:
    """The file of rows at `path`: CSV, JSON Lines, a JSON array or Parquet, see `fedloop_tasks.rows`.

    If it has two columns, the one that holds no texts holds the labels, whatever it is called. Labels are the answers,
    normalised. Rows whose text is empty or longer than `MAX_TEXT_CHARS`, whose label is empty or longer than `MAX_LABEL_CHARS`,
    or that cannot be read are left out and listed with their places. Raises `UsageError` for anything else, and if no row is
    left.
    """
    rows = rows_of(path)
    found = Messages(path, [], [], [], rows.unit)
    wanted = _columns(path, rows.heads, columns) if any(rows.heads) else ()
    for count, row in enumerate(rows.cells(wanted), 1):
        if count > MAX_ROWS:
            raise UsageError(f"{path} has more than {MAX_ROWS:,} rows", hint="divide it")
        message = row.wrong or (_message(*row.cells) if wanted else "no column has a name")
        if isinstance(message, str):
            found.bad.append(BadRow(row.at, message))
        else:
            found.rows.append(message)
            found.lines.append(row.at)
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
    text = text_of(path)
    if text is None:
        raise UsageError(f"{path} is a Parquet file, not a list of labels", hint="write one label a line, or give it as --data")
    labels: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), 1):
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


def _columns(path: Path, heads: Sequence[str], columns: Columns) -> tuple[int, int]:
    """Where the texts are, and where the labels. Raises `UsageError`, which names the columns that there are."""
    said = f"its columns are {', '.join(filter(None, heads))}"[:300]
    text_at = _given(path, heads, columns.text, said)
    label_at = _given(path, heads, columns.label, said)
    if text_at is None and (text_at := _usual(path, heads, TEXT_COLUMNS, None)) is None:
        raise UsageError(f"{path} has no column `{TEXT_COLUMNS[0]}`", cause=said, hint="--text-column NAME says which one it is")
    if label_at is None and (label_at := _usual(path, heads, LABEL_COLUMNS, text_at)) is None:
        others = [at for at, head in enumerate(heads) if head and at != text_at]
        if len(others) != 1:
            raise UsageError(f"{path} has no column of labels", cause=said, hint="--label-column NAME says which one it is")
        label_at = others[0]
    if text_at == label_at:
        raise UsageError(f"{path}: the column {heads[text_at]!r} cannot hold both texts and labels", cause=said)
    return text_at, label_at


def _given(path: Path, heads: Sequence[str], name: str | None, said: str) -> int | None:
    if name is not None and (at := _find(path, heads, name, None)) is None:
        raise UsageError(f"{path} has no column {name!r}", cause=said)
    return None if name is None else at


def _usual(path: Path, heads: Sequence[str], names: Sequence[str], taken: int | None) -> int | None:
    return next((at for name in names if (at := _find(path, heads, name, taken)) is not None), None)


def _find(path: Path, heads: Sequence[str], name: str, taken: int | None) -> int | None:
    """The one column of this name, in any case unless one is in the same. Raises `UsageError` if there are two."""
    folded = normalised(name).casefold()
    free = [(at, head) for at, head in enumerate(heads) if head and at != taken]
    found = [at for at, head in free if head == name] or [at for at, head in free if normalised(head).casefold() == folded]
    if len(found) > 1:
        raise UsageError(f"{path} has the column {name!r} twice")
    return found[0] if found else None


def _message(text: object, label: object) -> Message | str:
    """What a row says, or what is wrong with it."""
    text, label = _as_text(text), _as_text(label)
    if text is None or label is None:
        return f"the {'text' if text is None else 'label'} is neither text nor a whole number"
    label = normalised(label)
    if not normalised(text):
        return "empty text"
    if len(text) > MAX_TEXT_CHARS:
        return f"text longer than {MAX_TEXT_CHARS:,} characters"
    if not label:
        return "no label"
    return Message(text, label) if len(label) <= MAX_LABEL_CHARS else f"label longer than {MAX_LABEL_CHARS} characters"


def _as_text(cell: object) -> str | None:
    """A cell as CSV would hold it; None for what is no Unicode text, such as half a surrogate pair that JSON has escaped."""
    if cell is None:
        return ""
    if isinstance(cell, int) and not isinstance(cell, bool):
        return str(cell)
    try:
        if isinstance(cell, bytes):
            return cell.decode()
        return cell.encode().decode() if isinstance(cell, str) else None
    except UnicodeError:
        return None
