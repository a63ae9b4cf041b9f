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
from fedloop_events.errors import InvalidEventError, LogChangedError, NotAllowedError
from fedloop_events.folds import marks as reading
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


class Instruction(Struct, frozen=True):
    """A message of a run to this device, as it stands in the log."""

    record: Record
    sent: types.InstructionSent

    @property
    def event_id(self) -> str:
        return self.record.id


class Spent(Struct, frozen=True):
    """What the log has as paid for one instruction. `spent_ms` is what `DeviceView.now_ms` was then; `answered`: the log, as far
    as this device may read it, has the update."""

    spend_seq: int
    event_id: str
    spent_ms: int
    round_id: str | None = None
    answered: bool = False


_VERSION: Final = 5


class _Version(Struct):
    version: int = 1


class _State(Struct):
    version: int = _VERSION
    offsets: dict[str, int] = {}
    marks: reading.Marks = {}
    """None in a state that was kept before there were any."""
    identities: bytes = b""
    releases: bytes = b""
    ledger: bytes = b""
    standing: Standing = field(default_factory=Standing)
    rounds: dict[str, types.RoundOpened] = {}
    instructions: dict[str, Instruction] = {}
    spent: dict[str, Spent] = {}
    now_ms: int = 0
    decided_ms: int = 0
    refused: int = 0


class DeviceView:
    """The state of the log as far as it concerns the device `client_id` under the server key `server_key`.

    `rounds` are those in which an answer may count, of whose cohorts it knows whether this device is in them; `instructions` are
    those for this device that no round which is over and no collected step has made moot, `spent` what was paid for each
    instruction, `refused` how many events were malformed or not by whom they name.
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
        self._known = not kept.offsets
        """Whether the log was seen to be the one that was read."""
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
    def now_ms(self) -> int:
        """What time it is at least, by the last two decisions of the server: the earlier of their stamps.

        A stamp may be the appender's clock, which may be wrong. So no other author's stamp counts, one of the server's that is
        of the future moves nothing, and none is believed for longer than until the next decisions.
        """
        return self._state.now_ms

    @property
    def refused(self) -> int:
        return self._state.refused

    def check_end(self, log: EventLog) -> None:
        """Raise `LogChangedError` if the log is not the one that this device has read: if it ends before the place up to which
        that was, or has other events there.

        There is no way on but the whole log: what the log has lost of the device's spends would count as never spent.
        """
        if not self._state.offsets:
            return
        try:
            self._read(log, 1, 0.0)  # after this it is known which topics may be read
            known = {stream: [each for each in kept if each.topic in self.topics] for stream, kept in self._state.marks.items()}
            reading.check(log.end(), lambda after: self._read(log, 1, 0.0, after), self.position, known)
        except LogChangedError as error:
            error.hint = (
                "restore the whole log: until then this device takes no part; if it is lost, enrol the device under a new name, "
                "with a new store"
            )
            raise
        self._known = True

    def catch_up(self, log: EventLog, wait_s: float = 0.0) -> int:
        """Read to the end, after waiting up to `wait_s` for a first event; how many events of its topics there were.

        The first time, the log is checked (`check_end`).
        """
        if not self._known:
            self.check_end(log)
        count = 0
        while True:
            batch = self._read(log, BATCH, 0.0 if count else wait_s)
            for record in batch.records:
                self.apply(record)
            reading.remember(self._state.marks, batch.records, self._lasting)
            self._state.offsets = dict(batch.position.offsets)
            count += len(batch.records)
            if not batch.records:
                return count

    def wait(self, log: EventLog, timeout_s: float) -> bool:
        """Wait up to so long for an event that was not read yet; whether there is one."""
        return bool(self._read(log, 1, timeout_s).records)

    def _lasting(self, record: Record) -> bool:
        """Whether this device can read it for ever: of others' events a gateway shows no more than it remembers to be for it."""
        stated = types.newest(record.type)
        everyone = stated is not None and stated.audience is types.Audience.EVERYONE
        return reading.kept_for_ever(record) and (everyone or (record.key == self.client_id and stated is not None))

    def _read(self, log: EventLog, limit: int, wait_s: float, after: Position | None = None) -> Batch:
        while True:
            try:
                return log.read(self.topics, self.position if after is None else after, limit=limit, wait_s=wait_s)
            except NotAllowedError as error:
                spared = next((name for name in _SPARED if name in self.topics and error.topic.endswith(name)), None)
                if spared is None:
                    raise
                self.topics = tuple(name for name in self.topics if name != spared)

    def apply(self, record: Record) -> None:
        """Take in one event. What is malformed, or not signed by whom it names, is counted and changes nothing."""
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
        self.changed, kept = True, self._state
        if payload.author == "server":
            kept.now_ms, kept.decided_ms = min(kept.decided_ms, record.appended_ms), record.appended_ms
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
                paid = self._state.spent.get(payload.instruction_id)
                if paid is not None and isinstance(payload, types.UpdateSubmitted):
                    self._state.spent[payload.instruction_id] = replace(paid, answered=True)
            case types.BudgetSpent():
                self.ledger.apply(record, payload)
                spent = Spent(payload.spend_seq, record.id, self.now_ms, payload.round_id)
                self._state.spent.setdefault(payload.instruction_id, spent)
            case _:
                pass

    def _decided(self, record: Record, payload: types.ServerEvent) -> None:
        kept = self._state
        match payload:
            case types.RoundOpened():
                me = [self.client_id] if self.client_id in payload.cohort else []
                for each in [each for each in kept.rounds.values() if _stale(each, payload)]:
                    self._over(each.round_id)
                kept.rounds.setdefault(payload.round_id, replace(payload, cohort=me, excluded=[]))
            case types.InstructionSent(client_id=self.client_id):
                kept.instructions.setdefault(record.id, Instruction(record, payload))
                if len(kept.instructions) > MAX_PENDING:
                    del kept.instructions[next(iter(kept.instructions))]
            case types.RoundClosed(round_id=str(round_id)) | types.RoundAborted(round_id=round_id):
                # Whoever is at work for a buffered round goes on: its update counts in a later one.
                if types.Exclusion(self.client_id, types.AT_WORK) not in payload.excluded:
                    self._over(round_id)
            case types.StepCollected(round_id=str(round_id)):
                self._let_go(round_id, payload.step)
            case _:
                pass

    def _over(self, round_id: str) -> None:
        self._state.rounds.pop(round_id, None)
        self._let_go(round_id)

    def _let_go(self, round_id: str, step: int | None = None) -> None:
        """Nobody waits any more for an answer to the instructions of a round, or to those before one of its steps."""
        kept = self._state
        kept.instructions = {
            event_id: each
            for event_id, each in kept.instructions.items()
            if each.sent.round_id != round_id or (step is not None and each.sent.step > step)
        }


def _stale(buffered: types.RoundOpened, opened: types.RoundOpened) -> bool:
    """Whether an answer to a buffered round cannot count in the one that is opened, nor in later ones."""
    same = buffered.run_id == opened.run_id and buffered.max_staleness > 0
    return same and buffered.number + buffered.max_staleness < opened.number


def _restored(state: bytes | None) -> _State:
    """A state as it was kept; a new one, for which the log is read again, in place of one of another version."""
    if not state or msgspec.msgpack.decode(state, type=_Version).version != _VERSION:
        return _State()
    return msgspec.msgpack.decode(state, type=_State)
