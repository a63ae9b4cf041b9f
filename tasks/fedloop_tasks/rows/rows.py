"""What every such file gives, whatever its format."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final, Literal, Protocol

from msgspec import Struct

MAX_FILE_BYTES: Final = 1 << 28
"""Of a file, and of what a compressed one unpacks to: a thousand times what people label by hand."""


class Row(Struct, frozen=True):
    """The cells that were asked for, and where the row begins; none, if something is `wrong` with it."""

    at: int
    cells: Sequence[object] = ()
    wrong: str = ""


class Rows(Protocol):
    """The rows of one file. Blank ones are left out."""

    @property
    def heads(self) -> Sequence[str]:
        """The columns' names; "" for a column that has none."""

    @property
    def unit(self) -> Literal["line", "row"]:
        """What `Row.at` counts, from 1."""

    def cells(self, wanted: Sequence[int]) -> Iterator[Row]:
        """The cells of the columns `wanted`, row by row; called once. Raises `UsageError` for a file that cannot be read on."""
