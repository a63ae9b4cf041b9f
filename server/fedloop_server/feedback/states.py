"""What the embedded runner keeps: the operators' states, how far the log is taken in, and the ids it has met, in one SQLite file.

A commit is whole or not at all. The file is a saving of time: without it the log is taken in again from its beginning, and what
that emits is in the log already.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, Self

import apsw
import msgspec
from fedloop_events import topics
from fedloop_events.envelope import Record
from fedloop_events.errors import LogError, UnreachableError
from fedloop_events.files import create_private
from fedloop_events.folds.admit import Standing
from fedloop_events.folds.marks import Marks
from fedloop_events.logs.port import Position
from fedloop_events.logs.sqlite_file import transaction
from msgspec import Struct

from fedloop_server.feedback.operator import Operator

FILE_NAME: Final = "feedback.sqlite"
REMEMBERED: Final = 4_096
"""Ids of each stream: far more than a producer that was cut off, or a step that is done again, ever writes twice."""
CACHED: Final = 10_000
"""States in memory."""

_SCHEMA: Final = """
CREATE TABLE IF NOT EXISTS state (operator TEXT, version INTEGER, key TEXT, data BLOB, PRIMARY KEY (operator, version, key))
    STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS seen (stream TEXT, "offset" INTEGER, id BLOB, PRIMARY KEY (stream, "offset")) STRICT, WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS progress (one INTEGER PRIMARY KEY CHECK (one = 1), data BLOB) STRICT;
"""


class Progress(Struct):
    """How far the log is taken in, and by what it is known again."""

    offsets: dict[str, int] = {}
    standing: Standing = msgspec.field(default_factory=Standing)
    marks: Marks = {}


class States:
    """Opened by one process at a time: raises `UnreachableError` while another one has it, `LogError` if it is no such file."""

    def __init__(self, path: Path) -> None:
        self.progress = Progress()
        self._cache: OrderedDict[tuple[str, int, str], Any] = OrderedDict()
        self._changed: set[tuple[str, int, str]] = set()
        self._seen: dict[str, deque[tuple[int, bytes]]] = {}
        self._ids: dict[str, set[bytes]] = {}
        self._new: list[tuple[str, int, bytes]] = []
        create_private(path)
        self._db = apsw.Connection(str(path))
        try:
            # Exclusive from the first write on, which is the schema: a second pipeline would count everything twice.
            for setting in ("locking_mode=EXCLUSIVE", "journal_mode=WAL", "synchronous=NORMAL"):
                self._db.pragma(*setting.split("="))
            with transaction(self._db):
                self._db.execute(_SCHEMA)
            self._load()
        except apsw.BusyError as error:
            self._db.close()
            raise UnreachableError(
                f"another pipeline has {path}", cause=str(error), hint="one runs for a folder: stop it first"
            ) from None
        except (apsw.Error, msgspec.MsgspecError) as error:
            self._db.close()
            raise LogError(
                f"{path} does not hold a pipeline's states", cause=str(error), hint="delete it: it is made again from the log"
            ) from None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._db.close()

    @property
    def position(self) -> Position:
        return Position(self.progress.offsets)

    def of(self, operator: Operator[Any], key: str) -> Any:
        """The state of one key, to be changed in place; it is kept with the next commit."""
        place = (operator.name, operator.version, key)
        self._changed.add(place)
        if place not in self._cache:
            self._cache[place] = self._stored(operator, place)
        self._cache.move_to_end(place)
        return self._cache[place]

    def advancing(self, operator: Operator[Any]) -> Iterator[tuple[str, Any]]:
        """The keys of an operator that time can do something to, and their states."""
        if any(topics.DECLARED[each].by_client for each in operator.topics):
            return
        stored = self._db.execute("SELECT key FROM state WHERE (operator, version) = (?, ?)", (operator.name, operator.version))
        cached = (key for name, version, key in self._cache if (name, version) == (operator.name, operator.version))
        for key in sorted({*(str(key) for (key,) in stored), *cached}):
            yield key, self.of(operator, key)

    def first(self, record: Record) -> bool:
        """Whether an event is met for the first time; it is remembered."""
        identity = bytes.fromhex(record.id)
        ids = self._ids.setdefault(record.stream, set())
        if identity in ids:
            return False
        self._remember(record.stream, record.offset, identity)
        self._new.append((record.stream, record.offset, identity))
        return True

    def commit(self, position: Position) -> None:
        """Keep everything that has changed, and that the log is taken in up to `position`."""
        self.progress.offsets = dict(position.offsets)
        changed = [(*place, msgspec.msgpack.encode(self._cache[place])) for place in sorted(self._changed)]
        oldest = [(stream, self._seen[stream][0][0]) for stream in {stream for stream, _, _ in self._new}]
        with transaction(self._db):
            self._db.executemany("INSERT OR REPLACE INTO state VALUES (?, ?, ?, ?)", changed)
            self._db.executemany("INSERT OR REPLACE INTO seen VALUES (?, ?, ?)", self._new)
            self._db.executemany('DELETE FROM seen WHERE stream = ? AND "offset" < ?', oldest)
            self._db.execute("INSERT OR REPLACE INTO progress VALUES (1, ?)", (msgspec.msgpack.encode(self.progress),))
        self._changed.clear()
        self._new.clear()
        while len(self._cache) > CACHED:
            self._cache.popitem(last=False)

    def _stored(self, operator: Operator[Any], place: tuple[str, int, str]) -> Any:
        row = self._db.execute("SELECT data FROM state WHERE (operator, version, key) = (?, ?, ?)", place).fetchone()
        return operator.state_type() if row is None else msgspec.msgpack.decode(row[0], type=operator.state_type)

    def _load(self) -> None:
        row = self._db.execute("SELECT data FROM progress").fetchone()
        if row is not None:
            self.progress = msgspec.msgpack.decode(row[0], type=Progress)
        for stream, offset, identity in self._db.execute('SELECT stream, "offset", id FROM seen ORDER BY stream, "offset"'):
            self._remember(str(stream), int(offset), bytes(identity))

    def _remember(self, stream: str, offset: int, identity: bytes) -> None:
        seen, ids = self._seen.setdefault(stream, deque()), self._ids.setdefault(stream, set())
        seen.append((offset, identity))
        ids.add(identity)
        if len(seen) > REMEMBERED:
            ids.discard(seen.popleft()[1])
