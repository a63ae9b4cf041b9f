"""JSON Lines, an object a line, and a JSON array of objects."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, Literal

from fedloop_events.errors import UsageError

from fedloop_tasks.rows.rows import Row

LOOKS_SO: Final = re.compile(r'\s*(?:\{\s*["}]|\[\s*[\[{"\]])')
"""A table's first column may be called `[text]`, but hardly `{"text"`."""
_GAP: Final = re.compile(r"[\s,]*")
Object = dict[str, Any] | None


class ObjectRows:
    """See `Rows`. The columns are the keys of all objects; what an object does not have is None."""

    unit: Literal["line"] = "line"

    def __init__(self, path: Path, text: str) -> None:
        self._path, self._text, self._array = path, text, text.lstrip().startswith("[")
        self.heads = list(dict.fromkeys(key for _, found in self._objects() for key in found or ()))

    def cells(self, wanted: Sequence[int]) -> Iterator[Row]:
        keys = [self.heads[at] for at in wanted]
        for line, found in self._objects():
            if found is None:
                yield Row(line, wrong="no JSON object" if self._array else "no JSON object on one line")
            elif found:
                yield Row(line, [found.get(key) for key in keys])

    def _objects(self) -> Iterator[tuple[int, Object]]:
        """Each object and the line that it begins in; None for what is no object."""
        return _of_array(self._path, self._text) if self._array else _of_lines(self._text)


def _of_lines(text: str) -> Iterator[tuple[int, Object]]:
    # str.splitlines would also divide at characters that JSON allows within a text.
    for line, part in enumerate(text.split("\n"), 1):
        if part.strip():
            try:
                yield line, _object(json.loads(part))
            except (ValueError, RecursionError):
                yield line, None


def _of_array(path: Path, text: str) -> Iterator[tuple[int, Object]]:
    decoder, at, line = json.JSONDecoder(), text.index("[") + 1, 1 + text.count("\n", 0, text.index("["))
    while True:
        start = _end_of_gap(text, at)
        line += text.count("\n", at, start)
        if text.startswith("]", start):
            break
        try:
            found, at = decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:
            said = error.lineno if isinstance(error, json.JSONDecodeError) else line
            raise UsageError(f"{path} is no JSON: line {said} cannot be read", hint="is it cut off?") from None
        yield line, _object(found)
        line += text.count("\n", start, at)
    if text[start + 1 :].strip():
        raise UsageError(f"{path} is no JSON: something follows the array's end in line {line}")


def _end_of_gap(text: str, at: int) -> int:
    found = _GAP.match(text, at)
    return at if found is None else found.end()


def _object(found: object) -> Object:
    return found if isinstance(found, dict) else None
