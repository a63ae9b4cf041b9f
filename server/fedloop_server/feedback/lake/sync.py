"""Bringing a lake up to date with its log: each table is a reader of its topics, and keeps its own position."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import Any, Final, Self

from fedloop_events import envelope, types
from fedloop_events.envelope import Record
from fedloop_events.errors import InvalidEventError, UsageError
from fedloop_events.folds.admit import Admit
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.logs.port import READ_AHEAD, START, EventLog, Position
from msgspec import Struct

from fedloop_server.feedback.lake import features, reading
from fedloop_server.feedback.lake.catalog import EVENTS, EVERY
from fedloop_server.feedback.lake.delta import FILES_A_PART, LakeTable
from fedloop_server.feedback.lake.features import FEATURES
from fedloop_server.feedback.lake.place import LakePlace
from fedloop_server.feedback.lake.tables import FEEDBACK, TRAINING, WITHDRAWN, Row
from fedloop_server.feedback.lake.withdrawals import Withdrawals

MAX_ROWS: Final = 50_000
MAX_BYTES: Final = 64_000_000
"""Of a commit: rows, and bytes of the events that they are of."""
WORTH_A_COMMIT: Final = 10_000
"""Events without a row are read again next time, unless they are so many."""


class Counts(Struct):
    """What a sync did to a table: events that made rows of it, rows that were withdrawn, events that were refused."""

    added: int = 0
    removed: int = 0
    refused: int = 0

    @property
    def any(self) -> bool:
        return (self.added, self.removed, self.refused) != (0, 0, 0)


class Taken(Struct):
    """Rows to be, and the position after the events that they are of."""

    rows: dict[str, Row] = {}
    """By key: an event that was read twice makes one."""
    position: Position = START
    size_bytes: int = 0
    read: int = 0

    @property
    def full(self) -> bool:
        return len(self.rows) >= MAX_ROWS or self.size_bytes >= MAX_BYTES


class Lake:
    """A lake and the log that it is of, within `with`: its one writer.

    Raises `UnreachableError` while there is another one, `UsageError` if the lake is another deployment's.
    """

    def __init__(self, log: EventLog, place: LakePlace) -> None:
        self.counts: dict[str, Counts] = {each.name: Counts() for each in EVERY}
        self._log, self._place = log, place
        self._held = ExitStack()

    def __enter__(self) -> Self:
        self._held.enter_context(self._place.locked())
        try:
            self._open()
        except BaseException:
            self._held.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._held.close()

    def catch_up(self, *, with_features: bool = True) -> int:
        """Take in everything that is in the log now, and withdraw what is to be withdrawn; how many rows came or went.

        When it returns, no byte of a row that it withdrew is left in the lake.
        """
        before = sum(each.added + each.removed for each in self.counts.values())
        for source in (self._withdrawn, *self._sources, self._withdrawn):
            for taken in source.take(self.counts[source.target.table.name]):
                self.commit(source, taken)
        for target in self._targets:
            if target.compact():
                target.vacuum()
        self._withdrawals.vacuum()
        if with_features:
            self.refresh_features()
        return sum(each.added + each.removed for each in self.counts.values()) - before

    def refresh_features(self) -> None:
        """Make the feature table that of the feedback as it is."""
        features.refresh(self._connection, self._withdrawals.feedback, self._features)

    def source(self, table: str) -> Source:
        """What reads the log for a table."""
        return next(each for each in (self._withdrawn, *self._sources) if each.target.table.name == table)

    def commit(self, source: Source, taken: Taken) -> None:
        """Add a portion to its table, as far as it is not there. What is withdrawn is removed before that is known to be done,
        and what is withdrawn already is not added."""
        target, counts = source.target, self.counts[source.target.table.name]
        keys = [(key,) for key in taken.rows]
        files = target.files({target.part_of(row) for row in taken.rows.values()})
        there = reading.present(self._connection, target, (target.table.key,), keys, files)
        rows: Sequence[Row] = [row for key, row in taken.rows.items() if (key,) not in there]
        if source is self._withdrawn:
            for name, removed in self._withdrawals.remove(rows).items():
                self.counts[name].removed += removed
        else:
            rows = self._withdrawals.without(target.table, rows)
        target.append(rows, taken.position)
        source.committed = taken.position
        counts.added += len(rows)
        if len(files) > FILES_A_PART and target.compact():
            target.vacuum()

    def _open(self) -> None:
        people = Reader(self._log, Identities())
        people.catch_up()
        if not people.fold.origin:
            raise UsageError("the log holds no deployment", hint="name the log of one")
        opened = {each.name: LakeTable(self._place, each, people.fold.origin) for each in EVERY}
        for target in opened.values():
            target.vacuum()  # of what a sync left that was killed
        self._connection = self._held.enter_context(reading.connect(self._place))
        self._targets = list(opened.values())
        self._features = opened[FEATURES.name]
        self._sources = [Source(self._log, people, opened[each.name]) for each in EVENTS]
        self._withdrawn = Source(self._log, people, opened[WITHDRAWN.name])
        self._withdrawals = Withdrawals(self._connection, opened[FEEDBACK.name], opened[TRAINING.name], opened[WITHDRAWN.name])


class Source:
    """What one table takes of the log."""

    def __init__(self, log: EventLog, people: Reader[Identities], target: LakeTable) -> None:
        self.target = target
        self._log, self._people = log, people
        self._admit = Admit(people.fold)
        self.committed = target.position(log.end())
        self._position = START if target.table.fenced else self.committed

    def take(self, counts: Counts) -> Iterator[Taken]:
        """What is in the log now, in portions that are each to be committed before the next one is asked for."""
        taken = Taken()
        while True:
            batch = self._log.read(self.target.table.topics, self._position, limit=READ_AHEAD)
            if not batch.records:
                break
            self._people.catch_up()
            self._take(batch.records, taken, counts)
            taken.position = self._position = batch.position
            taken.read += sum(not self.committed.covers(each.stream, each.offset) for each in batch.records)
            if taken.full:
                yield taken
                taken = Taken()
        if taken.rows or taken.read >= WORTH_A_COMMIT:
            yield taken

    def _take(self, records: Sequence[Record], taken: Taken, counts: Counts) -> None:
        table = self.target.table
        key_at = list(table.columns).index(table.key)
        for record in records:
            if not self._concerns(record):
                continue
            news = not self.committed.covers(record.stream, record.offset)
            try:
                payload: Any = self._admit(record)
            except InvalidEventError:
                counts.refused += news
                continue
            row_of = table.rows.get(type(payload))
            if row_of is not None and news:
                row = row_of(record, payload)
                taken.rows.setdefault(row[key_at], row)
                taken.size_bytes += len(record.data)

    def _concerns(self, record: Record) -> bool:
        """Whether it is to be authenticated. What does not count may still decide about what does, where there are epochs."""
        table = self.target.table
        return table.fenced or record.type == envelope.MALFORMED or types.newest(record.type) in table.rows
