"""Withdrawing rows: what a user took back, and what is curated no more, leaves the lake and does not come back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Final

from fedloop_server.feedback.lake import reading
from fedloop_server.feedback.lake.tables import FEEDBACK, TRAINING, WITHDRAWN, Row, Table

if TYPE_CHECKING:
    import duckdb

    from fedloop_server.feedback.lake.delta import LakeTable

_FEEDBACK: Final = ("client_id", "feedback_id")
_EXAMPLE: Final = ("example_id",)
_AT_ONCE: Final = 1000
"""Rows that one condition names."""


class Withdrawals:
    """What was withdrawn, which the table `withdrawn` remembers for good, without content."""

    def __init__(
        self, connection: duckdb.DuckDBPyConnection, feedback: LakeTable, training: LakeTable, withdrawn: LakeTable
    ) -> None:
        self.feedback = feedback
        self._connection, self._training, self._withdrawn = connection, training, withdrawn
        self._removed_from: dict[str, LakeTable] = {}

    def remove(self, rows: Sequence[Row]) -> Counter[str]:
        """Remove what these rows of the table `withdrawn` name; how many rows, by table. It can be done again."""
        feedback = _values(WITHDRAWN, rows, _FEEDBACK)
        examples = _values(WITHDRAWN, rows, _EXAMPLE)
        removed: Counter[str] = Counter()
        for target, columns, values in (
            (self.feedback, _FEEDBACK, feedback),
            (self._training, _FEEDBACK, feedback),
            (self._training, _EXAMPLE, examples),
        ):
            there = sorted(reading.present(self._connection, target, columns, values, target.files()))
            for condition in _conditions(columns, there):
                removed[target.table.name] += target.remove(condition)
                self._removed_from[target.table.name] = target
        return removed

    def without(self, table: Table, rows: Sequence[Row]) -> Sequence[Row]:
        """The rows of a table that were not withdrawn before they came."""
        if table not in (FEEDBACK, TRAINING):
            return rows
        for columns in (_FEEDBACK, _EXAMPLE) if table is TRAINING else (_FEEDBACK,):
            values = _values(table, rows, columns)
            gone = reading.present(self._connection, self._withdrawn, columns, values, self._withdrawn.files())
            rows = [row for row, value in zip(rows, values, strict=True) if value not in gone]
        return rows

    def vacuum(self) -> None:
        """Remove the bytes of the rows that were removed."""
        for name, target in list(self._removed_from.items()):
            target.vacuum()
            del self._removed_from[name]


def _values(table: Table, rows: Sequence[Row], columns: Sequence[str]) -> list[tuple[str, ...]]:
    """What the rows have in these columns, where they have something."""
    names = list(table.columns)
    places = [names.index(each) for each in columns]
    found = [tuple(row[place] for place in places) for row in rows]
    return [each for each in found if None not in each]


def _conditions(columns: Sequence[str], values: Sequence[tuple[str, ...]]) -> Iterator[str]:
    """SQL conditions that hold for exactly the rows with these values: identifiers, which hold no quotation mark."""
    assert not any("'" in part for each in values for part in each)
    name = columns[0] if len(columns) == 1 else f"concat({columns[0]}, '/', {columns[1]})"
    for start in range(0, len(values), _AT_ONCE):
        listed = ", ".join(f"'{'/'.join(each)}'" for each in values[start : start + _AT_ONCE])
        yield f"{name} IN ({listed})"
