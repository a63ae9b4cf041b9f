"""The outbox under crashes, lost acknowledgements, and stores restored from a backup: every event once, every number once."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Collection, Sequence
from pathlib import Path

import pytest
from fedloop_clients.outbox import BATCH, Mine, Outbox, SuspendedError
from fedloop_clients.store import Store
from fedloop_events import topics as all_topics
from fedloop_events.envelope import Event, decode
from fedloop_events.errors import InvalidEventError, UnreachableError
from fedloop_events.logs.port import START, Batch, Position
from fedloop_events.signatures import SigningKey
from fedloop_events.types import ClientEvent, TextMasked
from fedloop_events.writer import EventWriter
from hypothesis import HealthCheck, settings
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule


class ListLog:
    """A log that can lose the request or the acknowledgement."""

    def __init__(self) -> None:
        self.events: dict[str, Event] = {}
        self.fails = ""

    def append(self, events: Sequence[Event]) -> None:
        if self.fails != "request":
            for event in events:
                self.events.setdefault(event.id, event)
        if self.fails:
            raise UnreachableError("away")

    def read(
        self, topics: Collection[str] = all_topics.ALL, after: Position = START, *, limit: int = 1000, wait_s: float = 0.0
    ) -> Batch:
        raise NotImplementedError

    def end(self) -> Position:
        raise NotImplementedError

    def close(self) -> None:
        pass

    def mine(self) -> list[Mine]:
        found = []
        for event in self.events.values():
            payload = decode(event)
            assert isinstance(payload, ClientEvent)
            found.append(Mine(payload.seq, event.id))
        return found


def something(seq: int) -> TextMasked:
    return TextMasked(origin="o", client_id="c", seq=seq, feedback_id="f")


class OutboxMachine(RuleBasedStateMachine):
    """One device whose process dies, whose log is away, and whose store is put back to a backup: the log never shows it."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = Path(tempfile.mkdtemp())
        self.log, self.key = ListLog(), SigningKey.generate()
        self.added = 0

    @initialize()
    def enrol(self) -> None:
        self.start()
        self.back_up()

    def start(self) -> None:
        self.store = Store.create(self.folder / "store.db", bytes(32))
        self.outbox = Outbox(self.store, EventWriter(self.log, self.key))
        self.outbox.reconcile(self.log.mine())

    @rule()
    def add(self) -> None:
        self.outbox.add(something)
        self.added += 1

    @rule()
    def flush(self) -> None:
        self.outbox.flush(self.log)
        assert self.outbox.unsent() == 0

    @rule()
    def lose_the_request(self) -> None:
        self._fail("request")

    @rule()
    def lose_the_acknowledgement(self) -> None:
        self._fail("acknowledgement")

    @rule()
    def die_and_start_again(self) -> None:
        self.store.close()
        self.start()

    @precondition(lambda self: self.outbox.unsent() == 0)
    @rule()
    def back_up(self) -> None:
        self.store.close()
        shutil.copy(self.folder / "store.db", self.folder / "backup.db")
        self.start()

    @rule()
    def restore(self) -> None:
        self.added = len(self.log.events)  # what was only due in the newer store is lost with it
        self.store.close()
        shutil.copy(self.folder / "backup.db", self.folder / "store.db")
        self.start()

    @invariant()
    def numbers_are_dense_and_used_once(self) -> None:
        numbers = [each.seq for each in self.log.mine()]
        assert numbers == list(range(len(numbers)))

    @invariant()
    def nothing_is_lost(self) -> None:
        if hasattr(self, "outbox"):
            due = {row[0] for row in self.store.rows("SELECT event_id FROM outbox WHERE event IS NOT NULL")}
            assert len(due | set(self.log.events)) == self.added

    def _fail(self, how: str) -> None:
        due = self.outbox.unsent()
        self.log.fails = how
        if due:
            with pytest.raises(UnreachableError):
                self.outbox.flush(self.log)
        assert self.outbox.unsent() == due
        self.log.fails = ""

    def teardown(self) -> None:
        self.store.close()
        shutil.rmtree(self.folder)


OutboxMachine.TestCase.settings = settings(
    max_examples=30, stateful_step_count=12, deadline=None, suppress_health_check=list(HealthCheck)
)
test_every_event_is_in_the_log_once = OutboxMachine.TestCase


def outbox_at(path: Path, log: ListLog, key: SigningKey) -> Outbox:
    return Outbox(Store.create(path, bytes(32)), EventWriter(log, key))


def test_a_store_from_a_backup_takes_its_numbers_from_the_log(tmp_path: Path) -> None:
    log, key = ListLog(), SigningKey.generate()
    one, backup = outbox_at(tmp_path / "one.db", log, key), outbox_at(tmp_path / "backup.db", log, key)
    for _ in range(3):
        one.add(something)
    one.flush(log)
    backup.reconcile(log.mine())
    backup.add(something)
    backup.flush(log)
    assert [each.seq for each in log.mine()] == [0, 1, 2, 3]


def test_what_the_log_has_already_is_not_due(tmp_path: Path) -> None:
    log = ListLog()
    outbox = outbox_at(tmp_path / "store.db", log, SigningKey.generate())
    outbox.add(something)
    log.fails = "acknowledgement"
    with pytest.raises(UnreachableError):
        outbox.flush(log)
    outbox.reconcile(log.mine())
    assert outbox.unsent() == 0


def test_two_copies_of_a_store_are_found_out(tmp_path: Path) -> None:
    log, key = ListLog(), SigningKey.generate()
    one, other = outbox_at(tmp_path / "one.db", log, key), outbox_at(tmp_path / "other.db", log, key)
    for outbox in (one, other):
        outbox.add(something)
        outbox.flush(log)
    for outbox in (one, other):
        with pytest.raises(SuspendedError, match="number 0 of this device"):
            outbox.reconcile(log.mine())


def test_an_event_that_is_too_large_is_not_in_the_outbox(tmp_path: Path) -> None:
    outbox = outbox_at(tmp_path / "store.db", ListLog(), SigningKey.generate())
    huge = {f"TYPE_{number}": 1 for number in range(10_000)}
    with pytest.raises(InvalidEventError):
        outbox.add(lambda seq: TextMasked(origin="o", client_id="c", seq=seq, feedback_id="f", counts=huge))
    outbox.add(something)
    assert outbox.unsent() == 1


def test_a_long_outbox_is_sent_in_batches(tmp_path: Path) -> None:
    log = ListLog()
    outbox = outbox_at(tmp_path / "store.db", log, SigningKey.generate())
    with outbox._store.transaction():
        for _ in range(BATCH + 5):
            outbox.add(something)
    assert outbox.flush(log) == BATCH + 5 == len(log.events)
