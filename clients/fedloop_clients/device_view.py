"""What the device knows of the log: a fold over what the server decides and over the device's own events.

Others' events are skipped unread. What is left counts only if its author signed it: the server with the key that the device
pinned when it enrolled, the device with its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import msgspec
from fedloop_events import topics, types
from fedloop_events.envelope import Record
from fedloop_events.errors import InvalidEventError, NotAllowedError, PolicyError
from fedloop_events.folds.admit import Admit, Standing
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.releases import ReleasesView
from fedloop_events.logs.port import Batch, EventLog, Position
from fedloop_privacy.dp.ledger import Ledger
from msgspec import Struct, field
from msgspec.structs import replace

from fedloop_clients.outbox import Mine

TOPICS: Final = (topics.CLIENTS, topics.ROUNDS, topics.RELEASES, topics.AUDIT, topics.UPDATES, topics.FEEDBACK)
_SPARED: Final = (topics.UPDATES, topics.FEEDBACK)
"""Topics of which a device reads back its own events alone. Where brokers let it read nobody's, it goes on without: then a store
that was restored from a backup appends again what it had appended to them, under new numbers."""
BATCH: Final = 5_000
MAX_PENDING: Final = 1_000
"""Unanswered instructions that are kept: the oldest give way."""


class LogChangedError(PolicyError):
    """The log is not the one that this device has read before: another server's, or cut short."""


class Instruction(Struct, frozen=True):
    """A message of a run to this device, as it stands in the log."""

    record: Record
    sent: types.InstructionSent

    @property
    def event_id(self) -> str:
        return self.record.id


class Spent(Struct, frozen=True):
    """What the log has as paid for one instruction. `appended_ms` is the log's own clock."""

    spend_seq: int
    event_id: str
    appended_ms: int


_VERSION: Final = 2


class _Version(Struct):
    version: int = 1


class _State(Struct):
    version: int = _VERSION
    offsets: dict[str, int] = {}
    identities: bytes = b""
    releases: bytes = b""
    ledger: bytes = b""
    standing: Standing = field(default_factory=Standing)
    rounds: dict[str, types.RoundOpened] = {}
    instructions: dict[str, Instruction] = {}
    spent: dict[str, Spent] = {}
    newest_ms: int = 0
    refused: int = 0


class DeviceView:
    """The state of the log as far as it concerns the device `client_id` under the server key `server_key`.

    `rounds` are the open ones, of whose cohorts it knows whether this device is in them; `instructions` are those for this device
    that no closed round and no collected step has made moot, `spent` what was paid for each instruction, `newest_ms` the latest
    time on the log's clock, `refused` how many events were malformed or not by whom they name.
    """

    def __init__(self, client_id: str, server_key: str, state: bytes | None = None) -> None:
        self.client_id, self._server_key = client_id, server_key
        self.topics: tuple[str, ...] = TOPICS
        """What is read: less than `TOPICS` where the log does not allow it."""
        kept = self._state = _restored(state)
        self.identities = Identities.from_state(kept.identities) if kept.identities else Identities()
        self.releases = ReleasesView.from_state(kept.releases) if kept.releases else ReleasesView()
        self.ledger = Ledger.from_state(kept.ledger) if kept.ledger else Ledger()
        self._admit = Admit(self.identities, partly=True)
        self._admit.standing = kept.standing
        self.mine: list[Mine] = []
        """The device's own events, as they were read since somebody emptied this list."""
        self.published: list[str] = []
        """Feedback ids among them, the same way."""
        self.retracted: list[str] = []
        """Feedback ids that were taken back, the same way."""
        self.changed = False
        """Whether anything that counts was read since somebody cleared this."""

    def to_state(self) -> bytes:
        """What the constructor takes: the state and the position that belongs to it. One of another version is read again."""
        kept = self._state
        kept.identities, kept.releases = self.identities.to_state(), self.releases.to_state()
        kept.ledger = self.ledger.to_state()
        return msgspec.msgpack.encode(kept)

    @property
    def position(self) -> Position:
        return Position(MappingProxyType(self._state.offsets))

    @property
    def rounds(self) -> Mapping[str, types.RoundOpened]:
        return MappingProxyType(self._state.rounds)

    @property
    def instructions(self) -> Mapping[str, Instruction]:
        return MappingProxyType(self._state.instructions)

    @property
    def spent(self) -> Mapping[str, Spent]:
        return MappingProxyType(self._state.spent)

    @property
    def newest_ms(self) -> int:
        return self._state.newest_ms

    @property
    def refused(self) -> int:
        return self._state.refused

    def check_end(self, log: EventLog) -> None:
        """Raise `LogChangedError` if the log ends before the place up to which this device has read it."""
        end = log.end()
        for stream, offset in self._state.offsets.items():
            if not end.covers(stream, offset):
                raise LogChangedError(
                    f"the log ends before event {offset} of stream {stream!r}, which this device has read",
                    cause="it was cut short, restored from a backup, or replaced",
                    hint="restore the whole log; until then this device takes no part",
                )

    def catch_up(self, log: EventLog, wait_s: float = 0.0) -> int:
        """Read to the end, after waiting up to `wait_s` for a first event; how many events of its topics there were."""
        count = 0
        while True:
            batch = self._read(log, BATCH, 0.0 if count else wait_s)
            for record in batch.records:
                self.apply(record)
            self._state.offsets = dict(batch.position.offsets)
            count += len(batch.records)
            if not batch.records:
                return count

    def wait(self, log: EventLog, timeout_s: float) -> bool:
        """Wait up to so long for an event that was not read yet; whether there is one."""
        return bool(self._read(log, 1, timeout_s).records)

    def _read(self, log: EventLog, limit: int, wait_s: float) -> Batch:
        while True:
            try:
                return log.read(self.topics, self.position, limit=limit, wait_s=wait_s)
            except NotAllowedError as error:
                spared = next((name for name in _SPARED if name in self.topics and error.topic.endswith(name)), None)
                if spared is None:
                    raise
                self.topics = tuple(name for name in self.topics if name != spared)

    def apply(self, record: Record) -> None:
        """Take in one event. What is malformed, or not signed by whom it names, is counted and changes nothing."""
        self._state.newest_ms = max(self._state.newest_ms, record.appended_ms)
        own = record.key == self.client_id
        if record.topic not in (topics.ROUNDS, topics.RELEASES) and not own and record.type != types.DeploymentCreated.type_name:
            return
        try:
            payload = self._admit(record)
        except InvalidEventError:
            self._state.refused += 1
            return
        if self.identities.origin and self.identities.server_key != self._server_key:
            raise LogChangedError("the log's server key is not the one that this device pinned", hint="check the location")
        if payload is not None:
            self._take(record, payload)

    def _take(self, record: Record, payload: types.Payload) -> None:
        self.changed = True
        if isinstance(payload, types.ClientEvent):
            self.mine.append(Mine(payload.seq, record.id))
            self._own(record, payload)
        elif isinstance(payload, types.ReleaseEvent):
            self.releases.apply(record, payload)
        elif isinstance(payload, types.ServerEvent):
            self._decided(record, payload)

    def _own(self, record: Record, payload: types.ClientEvent) -> None:
        match payload:
            case types.FeedbackRecorded():
                self.published.append(payload.feedback_id)
            case types.FeedbackRetracted():
                self.retracted.append(payload.feedback_id)
            case types.UpdateSubmitted() | types.RoundDeclined():
                self._state.instructions.pop(payload.instruction_id, None)
            case types.BudgetSpent():
                self.ledger.apply(record, payload)
                self._state.spent.setdefault(payload.instruction_id, Spent(payload.spend_seq, record.id, record.appended_ms))
            case _:
                pass

    def _decided(self, record: Record, payload: types.ServerEvent) -> None:
        kept = self._state
        match payload:
            case types.RoundOpened():
                me = [self.client_id] if self.client_id in payload.cohort else []
                kept.rounds.setdefault(payload.round_id, replace(payload, cohort=me, excluded=[]))
            case types.InstructionSent(client_id=self.client_id):
                kept.instructions.setdefault(record.id, Instruction(record, payload))
                if len(kept.instructions) > MAX_PENDING:
                    del kept.instructions[next(iter(kept.instructions))]
            case types.RoundClosed(round_id=str(round_id)) | types.RoundAborted(round_id=round_id):
                kept.rounds.pop(round_id, None)
                self._let_go(round_id)
            case types.StepCollected(round_id=str(round_id)):
                self._let_go(round_id, payload.step)
            case _:
                pass

    def _let_go(self, round_id: str, step: int | None = None) -> None:
        """Nobody waits any more for an answer to the instructions of a round, or to those before one of its steps."""
        kept = self._state
        kept.instructions = {
            event_id: each
            for event_id, each in kept.instructions.items()
            if each.sent.round_id != round_id or (step is not None and each.sent.step > step)
        }


def _restored(state: bytes | None) -> _State:
    """A state as it was kept; a new one, for which the log is read again, in place of one of another version."""
    if not state or msgspec.msgpack.decode(state, type=_Version).version != _VERSION:
        return _State()
    return msgspec.msgpack.decode(state, type=_State)
