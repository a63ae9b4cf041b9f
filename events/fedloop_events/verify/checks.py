"""What is wrong with the events of a log, and with the blobs that they name.

There are two classes. What nobody but an enrolled client can have made, by its own signature, is the client's misconduct: the log
is intact, and the event counts for nothing. Everything else that is wrong may be tampering, and is called so.
"""

from __future__ import annotations

from collections import Counter
from contextlib import suppress
from typing import Final

from msgspec import Struct

from fedloop_events import envelope, signatures, topics, types
from fedloop_events.blobs.naming import named_blobs
from fedloop_events.blobs.store import BlobStore
from fedloop_events.envelope import Record
from fedloop_events.errors import BlobError, FedloopError, InvalidEventError
from fedloop_events.folds.admit import Admit
from fedloop_events.folds.identities import Identities
from fedloop_events.verify.sequences import At, Sequences

MOST_FINDINGS: Final = 100


class Fault(Struct, frozen=True):
    """One thing that is wrong, and where; None if it concerns no single event."""

    what: str
    offset: int | None = None
    event_id: str | None = None
    stream: str | None = None


class VerifyReport(Struct):
    """What was checked and found. `findings` and `misconduct` are the first `MOST_FINDINGS` each; `wrong` and `client_wrong`
    count all.

    `verified` says that the log is intact; a client's misconduct does not change that.
    """

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
    repeated: int = 0
    """Events that stand there again, byte for byte: they count once."""
    rivals: int = 0
    """Authentic events under the id of an earlier one, with other bytes: the first counts. Two servers that decide the same at
    once leave them behind."""
    wrong: int = 0
    findings: list[Fault] = []
    client_wrong: int = 0
    """What enrolled clients have signed that they may not: a matter for who may revoke them."""
    misconduct: list[Fault] = []
    not_seen: str = ""
    """What this check cannot see."""


class LogCheck:
    """Takes in events, those of each stream in their order and topic `clients` before what rests on it; finds what is wrong.

    With `unique_ids` an id that stands there twice is wrong; `held_back` says that the server's own blobs cannot be read here.
    """

    def __init__(self, report: VerifyReport, *, unique_ids: bool, held_back: bool = False) -> None:
        self.report, self._unique_ids, self._held_back = report, unique_ids, held_back
        self._identities = Identities()
        self._admit = Admit(self._identities)
        self._topics: Counter[str] = Counter()
        self._marks: dict[str, int] = {}
        self._begun: set[str] = set()
        self._ends: dict[str, int] = {}
        self._sequences = Sequences(self.wrong, self.client_wrong)
        self.blobs: dict[types.BlobRef, At] = {}
        """Every blob that an authentic event names, and the first one that does."""
        self._decided: set[types.BlobRef] = set()
        """Those of them that the server names."""

    def wrong(self, what: str, at: At | None = None) -> None:
        self.report.wrong += 1
        _keep(self.report.findings, what, at)

    def client_wrong(self, what: str, at: At) -> None:
        """A client, and nobody else, has made this."""
        self.report.client_wrong += 1
        _keep(self.report.misconduct, what, at)

    def event(self, record: Record) -> None:
        self.report.events += 1
        self._topics[record.topic if record.topic in topics.ALL else "unknown"] += 1
        at = At(record.stream, record.offset, record.id)
        order = self._order(record)
        if record.offset <= self._ends.get(order, 0):
            self.wrong("the offsets of the stream do not rise", at)
        elif record.stream not in self._begun and record.offset > 1:
            self._sequences.begins_late(record.appended_ms)
        self._begun.add(record.stream)
        self._ends[order] = record.offset
        payload: types.Payload | None = None
        try:
            payload = envelope.decode(record)
            if payload is None:
                self.report.unknown += 1
            elif self._counts(record, payload, at):
                self._take(record, payload, at)
        except InvalidEventError as error:
            (self.client_wrong if self._is_by_a_client(record, payload) else self.wrong)(error.message, at)

    def _is_by_a_client(self, record: Record, payload: types.Payload | None) -> bool:
        """Whether the client under whose name the record stands, or would enrol itself, has signed it as it is."""
        client = self._identities.clients.get(record.key)
        keys = [] if client is None else [client.public_key]
        if isinstance(payload, types.ClientEnrolled):
            keys.append(payload.public_key)
        for key in keys:
            with suppress(InvalidEventError):
                signatures.verify(record, key)
                return True
        return False

    def _order(self, record: Record) -> str:
        """Within what events are read in their order: a stream or, where topics are read one after the other, a topic of one."""
        return record.stream if self._unique_ids else f"{record.stream}/{record.topic}"

    def _counts(self, record: Record, payload: types.Payload, at: At) -> bool:
        """Whether it is the first authentic event under its id. Raises `InvalidEventError` if it is not authentic."""
        mark, known = hash((record.key, record.data, record.signature)), self._marks.get(record.id)
        if known is None:
            self._admit.authenticate(record, payload)
            self._marks[record.id] = mark
            return True
        if self._unique_ids:
            self.wrong("the event id stands in the log a second time", at)
        elif known == mark:
            self.report.repeated += 1
        else:
            self._admit.authenticate(record, payload)
            self.report.rivals += 1
        return False

    def _take(self, record: Record, payload: types.Payload, at: At) -> None:
        if isinstance(payload, types.ClientEvent):
            self._sequences.take(payload.client_id, payload.seq, record.appended_ms, at, self._order(record))
        elif isinstance(payload, types.ServerEvent) and self._is_ahead(payload):
            self.wrong(f"the server decided in epoch {payload.epoch}, which nobody had started", at)
        elif not self._admit.standing.counts(payload):
            self.report.stale += 1
        hidden = {*payload.kept_back} if self._held_back else ()
        for ref in named_blobs(payload):
            if ref in hidden:
                continue
            self.blobs.setdefault(ref, at)
            if not isinstance(payload, types.ClientEvent):
                self._decided.add(ref)

    def _is_ahead(self, payload: types.ServerEvent) -> bool:
        latest = self._admit.standing.epochs.get(payload.run_id, 0)
        return payload.epoch > latest and not isinstance(payload, types.EpochStarted)

    def end(self) -> None:
        """Every event has been taken in: say what is missing."""
        report = self.report
        self._sequences.end()
        report.by_topic = {topic: self._topics[topic] for topic in (*topics.ALL, "unknown") if topic in self._topics}
        report.clients = len(self._identities.clients)
        if not self._identities.origin:
            self.wrong("the log has no deployment: nothing in it can be checked")

    def read_blobs(self, store: BlobStore) -> None:
        """Read and hash every blob that an event names."""
        for ref, at in self.blobs.items():
            try:
                for _ in store.blocks(ref):
                    pass
            except BlobError as error:
                is_clients = ref not in self._decided and _never_was(store, ref)
                (self.client_wrong if is_clients else self.wrong)(error.message, at)
            except FedloopError as error:
                self.wrong(f"{error.message}: {error.cause}", at)
            else:
                self.report.blobs += 1
                self.report.blob_bytes += ref.size_bytes


def _keep(findings: list[Fault], what: str, at: At | None) -> None:
    if len(findings) < MOST_FINDINGS:
        findings.append(Fault(what) if at is None else Fault(what, at.offset, at.event_id, at.stream))


def _never_was(store: BlobStore, ref: types.BlobRef) -> bool:
    """Whether the blob of a client's event is absent, or sound and of another size: nothing that counts rests on it."""
    size_bytes = store.size_bytes(ref.sha256)
    if size_bytes is None:
        return True
    if size_bytes == ref.size_bytes:
        return False
    with suppress(BlobError):
        for _ in store.blocks(types.BlobRef(ref.sha256, size_bytes)):
            pass
        return True
    return False
