"""One table of the lake as a Delta table: the one place that knows deltalake and Arrow.

Each commit carries the log's position after what it holds, a Delta transaction (application id, version) for each stream of the
log. So rows and position are in the table together or not at all, whatever the process dies of, and what a commit holds is never
committed again: who begins looks up `position` first, because Delta would append a replayed transaction a second time.
"""

from __future__ import annotations

import datetime
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, Final

from arro3.core import Array, DataType
from arro3.core import Table as Batch
from arro3.core.types import ArrowStreamExportable
from deltalake import CommitProperties, DeltaTable, Field, Schema, Transaction, write_deltalake
from deltalake.exceptions import DeltaError, TableNotFoundError
from deltalake.schema import PrimitiveType
from fedloop_events.errors import FedloopError, UsageError
from fedloop_events.logs.port import Position

from fedloop_server.feedback.lake.place import LakePlace
from fedloop_server.feedback.lake.tables import Kind, Row, Table

FILES_A_PART: Final = 16
"""So many files of one part of a table are made one."""
_EPOCH: Final = datetime.date(1970, 1, 1)
_DELTA: Final[Mapping[Kind, str]] = {
    "id": "string",
    "text": "string",
    "int": "long",
    "float": "double",
    "bool": "boolean",
    "time": "timestamp",
    "day": "date",
}
_ARROW: Final = {
    "id": DataType.string(),
    "text": DataType.string(),
    "int": DataType.int64(),
    "float": DataType.float64(),
    "bool": DataType.bool(),
    "time": DataType.timestamp("us", tz="UTC"),
    "day": DataType.date32(),
}


class LakeTable:
    """A table of the lake, opened by its one writer; made if it is not there.

    Raises `UsageError` if it is another deployment's, or has other columns than this program gives it.
    """

    def __init__(self, place: LakePlace, table: Table, origin: str) -> None:
        self.table = table
        self._place = place
        with translated(f"the lake's table {table.name} cannot be opened", place):
            self._delta = self._open(origin)
        found = self._delta.metadata().description
        if found != origin:
            raise UsageError(
                f"the lake in {place.location} is of the deployment {found}, and the log is of {origin}",
                hint="name another folder with --lake",
            )
        if self._delta.schema() != _schema(table):
            raise UsageError(
                f"the lake's table {table.name} in {place.location} has other columns than it should",
                hint="delete the lake and sync it again: the log has everything",
            )

    @property
    def version(self) -> int:
        return self._delta.version()

    def files(self, parts: Collection[str] | None = None) -> list[str]:
        """Where the rows are; with `parts`, those in these parts of the table alone (`part_of`)."""
        found = _files(self._place, self.table, self._delta)
        if parts is None or not self.table.divided_by:
            return found
        depth = len(self.table.divided_by) + 1
        return [each for each in found if "/".join(each.split("/")[-depth:-1]) in parts]

    def part_of(self, row: Row) -> str:
        """The part of the table that a row stands in: its folder, as Delta names it."""
        columns = list(self.table.columns)
        return "/".join(f"{name}={self._in_a_path(name, row[columns.index(name)])}" for name in self.table.divided_by)

    def last(self, application: str) -> int | None:
        """The version of the application's last transaction."""
        return self._delta.transaction_version(application)

    def position(self, end: Position) -> Position:
        """Up to where the log has been taken in, of a log that ends at `end`."""
        found = {stream: self.last(stream) for stream in end.offsets}
        return Position({stream: offset for stream, offset in found.items() if offset is not None})

    def append(self, rows: Sequence[Row], position: Position) -> None:
        """Add the rows, and say up to where the log has been taken in, in one commit."""
        with self._writing():
            if rows:
                write_deltalake(
                    self._delta, batch_of(self.table, rows), mode="append", commit_properties=_transactions(position.offsets)
                )
            else:
                done = _transactions(position.offsets)
                parts = list(self.table.divided_by)
                self._delta.create_write_transaction([], "append", self._delta.schema(), parts, commit_properties=done)

    def replace(self, rows: ArrowStreamExportable, application: str, version: int) -> None:
        """Put `rows` in the place of all rows, in one commit."""
        with self._writing():
            write_deltalake(self._delta, rows, mode="overwrite", commit_properties=_transactions({application: version}))

    def remove(self, condition: str) -> int:
        """Take the rows out that meet an SQL condition; how many they were. Their bytes are there until `vacuum`."""
        with self._writing():
            return int(self._delta.delete(condition)["num_deleted_rows"])

    def compact(self) -> bool:
        """Make one file of many, where a part has many; whether it had."""
        parts = Counter(PurePosixPath(each).parent for each in self.files())
        if max(parts.values(), default=0) < FILES_A_PART:
            return False
        with self._writing():
            self._delta.optimize.compact()
        return True

    def vacuum(self) -> None:
        """Remove every file that holds no row of the table as it is: those of rows that were taken out, and what a process left
        that was killed while it wrote. Only the one writer may, and no version before this one can be read afterwards."""
        with self._writing():
            if self._delta.vacuum(0, dry_run=True, enforce_retention_duration=False, full=True):
                self._delta.vacuum(0, dry_run=False, enforce_retention_duration=False, full=True)

    def _open(self, origin: str) -> DeltaTable:
        url = self._place.of(self.table.name)
        try:
            return DeltaTable(url, storage_options=self._place.options)
        except TableNotFoundError:
            self._place.make(self.table.name)
        kept = ",".join(name for name, kind in self.table.columns.items() if kind != "text")
        return DeltaTable.create(
            url,
            _schema(self.table),
            partition_by=list(self.table.divided_by),
            name=self.table.name,
            description=origin,
            configuration={"delta.dataSkippingStatsColumns": kept},
            storage_options=self._place.options,
        )

    def _in_a_path(self, column: str, value: Any) -> str:
        day = self.table.columns[column] == "day"
        return str(_EPOCH + datetime.timedelta(days=value)) if day else str(value)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with translated(f"the lake's table {self.table.name} cannot be written", self._place):
            yield
            self._delta.update_incremental()


def files(place: LakePlace, table: Table) -> list[str] | None:
    """The files that hold the rows of a table, for whoever reads it; None if the lake has no such table."""
    with translated(f"the lake's table {table.name} cannot be opened", place):
        try:
            return _files(place, table, DeltaTable(place.of(table.name), storage_options=place.options))
        except TableNotFoundError:
            return None


def _files(place: LakePlace, table: Table, delta: DeltaTable) -> list[str]:
    """Delta gives URIs, with a folder's characters in another form: what comes after the folder is the same in both."""
    depth = len(table.divided_by) + 1
    return ["/".join((place.of(table.name), *each.split("/")[-depth:])) for each in delta.file_uris()]


def batch_of(table: Table, rows: Sequence[Row]) -> Batch:
    """The rows as Arrow."""
    columns = zip(*rows, strict=True)
    return Batch.from_pydict(
        {name: _array(kind, values) for (name, kind), values in zip(table.columns.items(), columns, strict=True)}
    )


def _array(kind: Kind, values: Iterable[Any]) -> Array:
    if kind == "time":
        microseconds = [None if each is None else each * 1000 for each in values]
        return Array(microseconds, type=DataType.int64()).cast(_ARROW[kind])
    if kind == "day":
        return Array(list(values), type=DataType.int32()).cast(_ARROW[kind])
    return Array(list(values), type=_ARROW[kind])


def _schema(table: Table) -> Schema:
    return Schema([Field(name, PrimitiveType(_DELTA[kind])) for name, kind in table.columns.items()])


def _transactions(versions: Mapping[str, int]) -> CommitProperties:
    return CommitProperties(app_transactions=[Transaction(name, version) for name, version in versions.items()])


@contextmanager
def translated(what: str, place: LakePlace) -> Iterator[None]:
    """Errors of the library as the project's."""
    try:
        yield
    except (DeltaError, OSError) as error:
        cause = str(error).strip().partition("\n")[0][:300]
        raise FedloopError(what, cause=cause, hint=f"is {place.location} there, and may it be written?") from error
