"""`fedloop log verify`: whether a log is whole and everything in it was said by whom it names.

The file may come from anybody, so it is opened for reading alone, checked by SQLite before it is believed, and never obeyed
(https://sqlite.org/security.html). What cannot be found without signed checkpoints is in `UNSEEN`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import apsw
import msgspec
from fedloop_events import envelope, locations, topics, types
from fedloop_events.blobs import BlobStore
from fedloop_events.envelope import Record
from fedloop_events.errors import BlobError, FedloopError, InvalidEventError, LogError, UsageError
from fedloop_events.identities import Identities
from fedloop_events.locations import Place
from fedloop_events.sqlite import STREAM
from fedloop_events.sqlite_file import APPLICATION_ID, FORMAT
from msgspec import Struct

MOST_FINDINGS: Final = 100
UNSEEN: Final = (
    "events cut off at the end of the log, and a history written anew by whoever holds the server's key and every client's: "
    "both need signed checkpoints kept elsewhere, which this version does not make"
)

_COLUMNS: Final = "position, topic, id, key, source, type, time, data, signature, appended_ms"
_TYPES: Final = (int, str, bytes, str, str, str, int, bytes, str, int)


class Finding(Struct, frozen=True):
    """One thing that is wrong, and at which offset; `offset` None if it concerns no single event."""

    what: str
    offset: int | None = None
    event_id: str | None = None


class Report(Struct):
    """What was checked and found. `findings` are the first `MOST_FINDINGS`, `wrong` counts all."""

    log: str
    verified: bool = False
    events: int = 0
    by_topic: dict[str, int] = {}
    clients: int = 0
    blobs: int = 0
    """Different blobs that events name, each read and hashed."""
    blob_bytes: int = 0
    unknown: int = 0
    """Events of types that only a newer program knows; their signatures cannot be checked here."""
    stale: int = 0
    """Decisions of a server after another one had taken over: they count for nothing, and are no fault of the log."""
    wrong: int = 0
    findings: list[Finding] = []
    not_seen: str = UNSEEN


def verify(place: Place) -> Report:
    """Read the whole log at `place` and every blob that it names.

    Raises `UsageError` if there is no log, `LogError` if the file is none or cannot be read at all.
    """
    path = Path(place.log) / locations.LOG_FILE
    if not path.is_file():
        raise UsageError(f"there is no log in {place.log}", hint="name the folder that `fedloop server init` made")
    check = _Check(Report(str(path)), Path(place.blobs or ""))
    connection = _open(path)
    try:
        with connection:  # one transaction: what is appended meanwhile is for the next check
            damage = [str(row[0]) for row in connection.execute("PRAGMA integrity_check(20)")]
            if damage != ["ok"]:
                for line in damage:
                    check.wrong(f"the database is damaged: {line}")
            _check_schema(connection, check)
            for row in connection.execute(f"SELECT {_COLUMNS} FROM events ORDER BY position"):
                check.row(row)
    except apsw.Error as error:
        check.wrong(f"the database cannot be read on: {error}")
    finally:
        connection.close(force=True)
    return check.end()


def _open(path: Path) -> apsw.Connection:
    try:
        connection = apsw.Connection(str(path), flags=apsw.SQLITE_OPEN_READONLY)
        connection.set_busy_timeout(10_000)
        for pragma in ("trusted_schema=OFF", "cell_size_check=ON", "mmap_size=0", "query_only=ON"):
            connection.execute(f"PRAGMA {pragma}")
        found = connection.execute("PRAGMA application_id").get, connection.execute("PRAGMA user_version").get
    except apsw.Error as error:
        raise LogError(f"the log {path} cannot be opened", cause=str(error)) from None
    if found[0] != APPLICATION_ID or not 1 <= found[1] <= FORMAT:
        raise LogError(f"{path} is no Fedloop log of a format up to {FORMAT}")
    return connection


def _check_schema(connection: apsw.Connection, check: _Check) -> None:
    """Nothing may be there that computes or acts, but the two triggers that keep the log append-only. An index does neither."""
    known = {("table", "events"), ("trigger", "events_no_update"), ("trigger", "events_no_delete")}
    query = "SELECT type, name FROM sqlite_schema WHERE type != 'index'"
    found = {(str(kind), str(name)) for kind, name in connection.execute(query)}
    for kind, name in sorted(found ^ known):
        check.wrong(f"the database {'lacks the' if (kind, name) in known else 'has a foreign'} {kind} {name!r}")
    if ("table", "events") not in found:
        raise LogError("the database has no table of events")


class _Check:
    """Takes in the rows in order; finds what is wrong."""

    def __init__(self, report: Report, blobs: Path) -> None:
        self._report, self._blobs = report, blobs
        self._identities = Identities()
        self._topics: Counter[str] = Counter()
        self._ids: set[bytes] = set()
        self._seqs: dict[str, int] = {}
        self._epochs: dict[str, int] = {}
        self._refs: dict[types.BlobRef, Record] = {}
        self._offset = 0

    def wrong(self, what: str, record: Record | None = None, offset: int | None = None) -> None:
        report = self._report
        report.wrong += 1
        if len(report.findings) < MOST_FINDINGS:
            at = offset if record is None else record.offset
            report.findings.append(Finding(what, at, None if record is None else record.id))

    def row(self, row: tuple[Any, ...]) -> None:
        self._report.events += 1
        offset = row[0]
        if offset != self._offset + 1:
            first = self._offset + 1
            missing = f"offset {first} is" if offset == first + 1 else f"offsets {first} to {offset - 1} are"
            self.wrong(f"{missing} missing", offset=first)
        self._offset = offset
        if tuple(map(type, row)) != _TYPES or len(row[2]) != 16:
            self.wrong("the row does not hold an event", offset=offset)
            return
        record = Record(row[1], row[3], row[2].hex(), *row[4:9], stream=STREAM, offset=offset, appended_ms=row[9])
        if row[2] in self._ids:
            self.wrong("the event id stands in the log a second time", record)
        self._ids.add(row[2])
        self._topics[record.topic if record.topic in topics.ALL else "unknown"] += 1
        self._event(record)

    def _event(self, record: Record) -> None:
        try:
            payload = envelope.decode(record)
            if payload is None:
                self._report.unknown += 1
                return
            if record.topic == topics.CLIENTS:
                self._identities.apply(record, payload)
            else:
                self._identities.authenticate(record, payload)
        except InvalidEventError as error:
            self.wrong(error.message, record)
            return
        if isinstance(payload, types.ClientSaid):
            self._sequence(record, payload)
        elif isinstance(payload, types.ServerSaid):
            self._epoch(record, payload)
        for ref in _blobs(payload):
            self._refs.setdefault(ref, record)

    def _sequence(self, record: Record, payload: types.ClientSaid) -> None:
        expected = self._seqs.get(payload.client_id, -1) + 1
        if payload.seq > expected:
            self.wrong(f"{payload.seq - expected} events of {payload.client_id} before this one are missing", record)
        elif payload.seq < expected:
            self.wrong(f"{payload.client_id} used its sequence number {payload.seq} again, or events changed places", record)
        self._seqs[payload.client_id] = max(payload.seq, expected - 1)

    def _epoch(self, record: Record, payload: types.ServerSaid) -> None:
        latest = self._epochs.get(payload.run_id, 0)
        if isinstance(payload, types.EpochStarted):
            self._epochs[payload.run_id] = max(latest, payload.epoch)
            # Two servers may try for the same epoch: the second event has the same id, and is none.
            if payload.epoch <= latest:
                self._report.stale += 1
        elif payload.epoch > latest:
            self.wrong(f"the server decided in epoch {payload.epoch}, which nobody had started", record)
        elif payload.epoch < latest:
            self._report.stale += 1

    def end(self) -> Report:
        report = self._report
        report.by_topic = {topic: self._topics[topic] for topic in (*topics.ALL, "unknown") if topic in self._topics}
        report.clients = len(self._identities.clients)
        if not self._identities.origin:
            self.wrong("the log has no deployment: nothing in it can be checked")
        if self._refs and not self._blobs.is_dir():
            self.wrong(f"the folder of blobs is absent: {self._blobs}")
        elif self._refs:
            self._read_blobs(BlobStore(self._blobs))
        report.verified = report.wrong == 0
        return report

    def _read_blobs(self, store: BlobStore) -> None:
        for ref, record in self._refs.items():
            try:
                for _ in store.blocks(ref):
                    pass
            except BlobError as error:
                self.wrong(error.message, record)
            except FedloopError as error:
                self.wrong(f"{error.message}: {error.cause}", record)
            else:
                self._report.blobs += 1
                self._report.blob_bytes += ref.size_bytes


def _blobs(value: object) -> Iterator[types.BlobRef]:
    """Every blob that a payload names, wherever it stands."""
    if isinstance(value, types.BlobRef):
        yield value
    elif isinstance(value, Struct):
        for field in value.__struct_fields__:
            yield from _blobs(getattr(value, field))
    elif isinstance(value, dict):
        for each in value.values():
            yield from _blobs(each)
    elif isinstance(value, list) and value and not isinstance(value[0], (str, int, float)):
        for each in value:
            yield from _blobs(each)


def as_document(report: Report) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.to_builtins(report)
    return document
