"""CSV as spreadsheets and programs write it: any of four separators, blank rows, columns without a name."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Literal

from fedloop_events.errors import UsageError

from fedloop_tasks.rows.rows import MAX_FILE_BYTES, Row

SEPARATORS: Final = ",;\t|"
_STATED: Final = re.compile(r"sep=([^\"\r])\r?\n")
# As csv counts lines. StringIO would divide them too, at four bytes a character.
_LINE: Final = re.compile(r"[^\r\n]*(?:\r\n?|\n)|[^\r\n]+")
_HEAD_CHARS: Final = 1 << 16


class DelimitedRows:
    """See `Rows`. The first row that is not blank holds the names.

    What is left of the first name, such as the row numbers that pandas writes, is ignored. A column without a name elsewhere is
    what a spreadsheet leaves behind while it is empty; a value in it may belong to the text, with a separator between that is
    not quoted, so such a row is wrong. Cells that are missing at the end of a row are empty.
    """

    unit: Literal["line"] = "line"

    def __init__(self, path: Path, text: str) -> None:
        stated = _STATED.match(text)
        self._records = _records(path, text, stated[1] if stated else _separator(text))
        if stated:
            next(self._records)
        _, names = next(self._records, (0, []))
        self.heads = [name.strip() for name in names]
        named = [at for at, head in enumerate(self.heads) if head]
        self._nameless = [at for at, head in enumerate(self.heads) if not head and at > min(named)]

    def cells(self, wanted: Sequence[int]) -> Iterator[Row]:
        for line, cells in self._records:
            wrong = self._wrong(cells, wanted)
            yield Row(line, wrong=wrong) if wrong else Row(line, [cells[at] for at in wanted])

    def _wrong(self, cells: Sequence[str], wanted: Sequence[int]) -> str:
        if len(cells) <= max(wanted) or any(map(str.strip, cells[len(self.heads) :])):
            return "wrong number of columns"
        if any(cells[at].strip() for at in self._nameless if at < len(cells)):
            return "a value in a column without a name"
        return ""


def _records(path: Path, text: str, separator: str) -> Iterator[tuple[int, list[str]]]:
    """Each row that is not blank, and the line that it begins in."""
    csv.field_size_limit(MAX_FILE_BYTES)
    reader = csv.reader((found[0] for found in _LINE.finditer(text)), strict=True, delimiter=separator)
    line = 1
    try:
        for cells in reader:
            if any(map(str.strip, cells)):
                yield line, cells
            line = reader.line_num + 1
    except csv.Error as error:
        raise UsageError(
            f"{path} is no CSV file: the row of line {line} cannot be read", cause=str(error), hint='quotes are written ""'
        ) from None


def _separator(text: str) -> str:
    """The one that divides the first row into the most columns, and a comma among equals."""
    return max(SEPARATORS, key=lambda each: _columns(text[:_HEAD_CHARS], each))


def _columns(text: str, separator: str) -> int:
    try:
        return len(next(_records(Path(), text, separator), (0, []))[1])
    except UsageError:
        return 0
