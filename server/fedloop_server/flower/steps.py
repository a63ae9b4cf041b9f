"""What one run, or one round of it, has decided so far, step by step: the fold that `LogGrid` replays."""

from __future__ import annotations

from typing import Final, Protocol

from fedloop_events import topics
from fedloop_events.envelope import Record
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.logs.port import EventLog
from fedloop_events.types import (
    EpochStarted,
    InstructionSent,
    NodesListed,
    Payload,
    ResultRecorded,
    RoundDeclined,
    ServerEvent,
    StepCollected,
    UpdateRefused,
    UpdateSubmitted,
)
from msgspec import Struct

RunStep = NodesListed | InstructionSent | StepCollected | ResultRecorded
MAX_REPLIES_EACH: Final = 2
"""Replies of one client to one instruction that are kept: the first counts, the second is evidence."""


class Decision(Struct, frozen=True):
    """A step as it was recorded: the event's id, when the log took it, and its payload."""

    id: str
    appended_ms: int
    payload: RunStep


class Reply(Struct, frozen=True):
    """What a client answered; `id` is the event's, `appended_ms` when the log took it."""

    id: str
    appended_ms: int
    payload: UpdateSubmitted | RoundDeclined


class RunSteps:
    """Fold over `rounds` and `updates` of one run; with `round_id`, of that round alone.

    Of the decisions at one step the first holds.
    """

    topics = (topics.ROUNDS, topics.UPDATES)

    def __init__(self, run_id: str, round_id: str | None = None) -> None:
        self.run_id, self.round_id = run_id, round_id
        self.epoch = 0
        self.server_id = ""
        self.now_ms = 0
        """The log's own clock, as of the last event read that a server has signed: clients' clocks may be wrong."""
        self.decisions: dict[int, Decision] = {}
        self.replies: dict[str, list[Reply]] = {}
        """By instruction, in the order of the log."""
        self.refused: dict[str, UpdateRefused] = {}
        """By update."""
        self._sent: set[str] = set()

    def apply(self, record: Record, payload: Payload) -> None:
        if isinstance(payload, ServerEvent):
            self.now_ms = record.appended_ms
            if payload.run_id == self.run_id:
                self._decided(record, payload)
        elif isinstance(payload, UpdateSubmitted | RoundDeclined) and payload.run_id == self.run_id:
            self._replied(record, payload)

    def _decided(self, record: Record, payload: ServerEvent) -> None:
        if isinstance(payload, EpochStarted):
            self.epoch, self.server_id = payload.epoch, payload.server_id
        elif getattr(payload, "round_id", None) != self.round_id:
            return
        elif isinstance(payload, UpdateRefused):
            self.refused.setdefault(payload.update_id, payload)
        elif isinstance(payload, RunStep):
            self.decisions.setdefault(payload.step, Decision(record.id, record.appended_ms, payload))
            if isinstance(payload, InstructionSent):
                self._sent.add(record.id)

    def _replied(self, record: Record, payload: UpdateSubmitted | RoundDeclined) -> None:
        # In a round, what answers other rounds is not kept; whether the reply names the right round is for admission to check.
        if self.round_id is not None and payload.round_id != self.round_id and payload.instruction_id not in self._sent:
            return
        replies = self.replies.setdefault(payload.instruction_id, [])
        same_client = [each for each in replies if each.payload.client_id == payload.client_id]
        if len(same_client) < MAX_REPLIES_EACH and all(each.id != record.id for each in same_client):
            replies.append(Reply(record.id, record.appended_ms, payload))


class ReadsRun(Protocol):
    """What a grid knows of its run, and how it learns more."""

    @property
    def identities(self) -> Identities: ...

    @property
    def steps(self) -> RunSteps: ...

    def read(self, wait_s: float, /) -> None:
        """Bring both up to date, after waiting up to so many seconds for a first event."""


class RunReader:
    """Reads a run, or with `round_id` that round of it, for a grid that is alone with its log."""

    def __init__(self, log: EventLog, run_id: str, round_id: str | None = None) -> None:
        self.identities, self.steps = Identities(), RunSteps(run_id, round_id)
        self._people = Reader(log, self.identities)
        self._events = Reader(log, self.steps, identities=self._people)
        self.read()

    def read(self, wait_s: float = 0.0) -> None:
        self._people.catch_up()
        self._events.wait(wait_s)
