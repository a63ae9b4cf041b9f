"""What a server knows: folds over the log, kept in one snapshot."""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

import msgspec
from fedloop_events import topics, types
from fedloop_events.envelope import Record
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.releases import ReleasesView
from fedloop_events.folds.rounds import RoundsView
from fedloop_events.logs.port import START, Position
from fedloop_privacy.dp.ledger import Ledger
from msgspec import Struct

from fedloop_server.flower.steps import RunSteps

STATE_FILE: Final = "server.snapshot"
IDENTITIES_FILE: Final = "identities.snapshot"
"""Where a server keeps its snapshots, in its folder."""

OnEvent = Callable[[Record, types.Payload], None]


class _Kept(Struct, frozen=True):
    """What a snapshot of the state holds."""

    rounds: bytes
    releases: bytes
    ledger: bytes
    decided_ms: int
    after: dict[str, dict[str, int]]
    epoch_after: dict[str, int]
    offsets: dict[str, int]


class ServerState:
    """The server's folds, and its clock. `people` are those whose events count; another reader keeps them up to date."""

    topics = (topics.ROUNDS, topics.UPDATES, topics.RELEASES, topics.AUDIT)
    version = 5

    def __init__(self, run_id: str, people: Identities, on_event: OnEvent | None = None) -> None:
        self.rounds, self.releases, self.ledger = RoundsView(run_id), ReleasesView(), Ledger()
        self.people = people
        self.decided_ms = 0
        """The log's own clock, as of the last event that the server has signed."""
        self.steps: list[RunSteps] = []
        """Those of the round that is being collected, and of the buffered ones before it: they are kept up to date too."""
        self._after: dict[str, dict[str, int]] = {}
        """Where the epoch began in which a round was opened, for each round that is not over."""
        self._epoch_after = START
        self._offsets: dict[str, int] = {}
        self._on_event = on_event

    def apply(self, record: Record, payload: types.Payload) -> None:
        if payload.author == "server":
            self.decided_ms = record.appended_ms
        if record.topic == topics.RELEASES:
            self.releases.apply(record, payload)
        elif record.topic == topics.AUDIT:
            self.ledger.apply(record, payload)
        else:
            epoch, open_round = self.rounds.epoch, self.rounds.open_round
            self.rounds.apply(record, payload)
            if self.rounds.epoch != epoch:
                self._epoch_after = Position({**self._offsets, record.stream: record.offset - 1})
            if (opened := self.rounds.open_round) is not open_round:
                if opened is not None:
                    self._after[opened.round_id] = dict(self._epoch_after.offsets)
                going_on = {each.round_id for each in (*self.rounds.buffered, opened) if each is not None}
                self._after = {round_id: after for round_id, after in self._after.items() if round_id in going_on}
            for steps in self.steps:
                steps.apply(record, payload)
        self._offsets[record.stream] = record.offset
        if self._on_event is not None:
            self._on_event(record, payload)

    @property
    def rounds_after(self) -> Position:
        """Before everything that the open round rests on, and the buffered ones before it."""
        return Position(next(iter(self._after.values()), {}))

    def to_state(self) -> bytes:
        kept = _Kept(
            self.rounds.to_state(),
            self.releases.to_state(),
            self.ledger.to_state(),
            self.decided_ms,
            self._after,
            dict(self._epoch_after.offsets),
            self._offsets,
        )
        return msgspec.msgpack.encode(kept)

    def from_state(self, state: bytes) -> ServerState:
        kept = msgspec.msgpack.decode(state, type=_Kept)
        restored = ServerState(self.rounds.run_id, self.people, self._on_event)
        restored.rounds, restored.releases = RoundsView.from_state(kept.rounds), ReleasesView.from_state(kept.releases)
        restored.ledger, restored.decided_ms = Ledger.from_state(kept.ledger), kept.decided_ms
        restored._after, restored._epoch_after = kept.after, Position(kept.epoch_after)
        restored._offsets = kept.offsets
        return restored
