"""What the command line prints: results on standard output, everything else on standard error."""

from __future__ import annotations

import datetime
import sys
import unicodedata
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import msgspec
from fedloop_events.errors import FedloopError

Text = str | Callable[[], str]


class ReaderGoneError(Exception):
    """Whoever read standard output has closed it. (Click would make an error of a `BrokenPipeError`.)"""


def show(document: Mapping[str, Any], text: Text, *, as_json: bool) -> None:
    """Print a result: `document` as one line of JSON, or `text` for a person (a function, so that only what is shown is made)."""
    try:
        if as_json:
            print(msgspec.json.encode(document).decode(), flush=True)
        else:
            print(text if isinstance(text, str) else text(), flush=True)
    except BrokenPipeError:
        raise ReaderGoneError from None


def note(text: str) -> None:
    """Print how things go, on standard error."""
    print(text, file=sys.stderr, flush=True)


def show_error(error: FedloopError, *, as_json: bool) -> None:
    """The three lines of an error on standard error; with `as_json` also a document on standard output."""
    lines = {"error": error.message, "cause": error.cause, "hint": error.hint}
    for name, line in lines.items():
        if line:
            note(f"{name}: {printable(line)}")
    if as_json:
        found = {"message": error.message, "cause": error.cause, "hint": error.hint, "exit_status": error.exit_status}
        print(msgspec.json.encode({"error": found}).decode(), flush=True)


def printable(text: object) -> str:
    r"""`text` on one line, its control and format characters (terminal escapes, direction marks) written as `\x1b`."""
    return "".join(
        character if unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Zl", "Zp"} else _code(character)
        for character in str(text)
    )


def _code(character: str) -> str:
    return character.encode("unicode_escape").decode()


def table(heads: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str = "none") -> str:
    """Columns under their heads; numbers to the right."""
    cells = [[_cell(cell) for cell in row] for row in rows]
    if not cells:
        return empty
    widths = [max(map(len, column)) for column in zip(heads, *cells, strict=True)]
    right = [all(_is_number(row[i]) for row in cells) for i in range(len(heads))]
    lines = [
        "  ".join(
            cell.rjust(width) if at_right else cell.ljust(width)
            for cell, width, at_right in zip(line, widths, right, strict=True)
        )
        for line in [list(heads), *cells]
    ]
    return "\n".join(line.rstrip() for line in lines)


def fields(pairs: Mapping[str, object]) -> str:
    """One name and value a line; counts by name as "2 submitted, 1 declined"."""
    width = max(map(len, pairs), default=0)
    return "\n".join(f"{name.ljust(width)}  {_value(value)}" for name, value in pairs.items())


def _value(value: object) -> str:
    counts = value.items() if isinstance(value, Mapping) else ()
    return ", ".join(f"{_cell(count)} {printable(name)}" for name, count in counts) or (
        "-" if value in ("", {}) else _cell(value)
    )


def offset(stream: str | None, number: int) -> str:
    """The offset `number`, with its stream where a log has several (`updates-3:17`)."""
    name = (stream or "").rpartition(".")[2]
    return str(number) if name in {"", "log"} else f"{name}:{number}"


def moment(ms: int) -> str | None:
    """ISO 8601, UTC, whole seconds; None for 0."""
    return datetime.datetime.fromtimestamp(ms // 1000, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ") if ms else None


def _cell(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return printable(value)


def _is_number(cell: str) -> bool:
    return cell == "-" or cell.replace(",", "").replace(".", "", 1).removeprefix("-").isdigit()
