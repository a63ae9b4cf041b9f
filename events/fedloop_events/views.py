"""What the rounds and the releases of a deployment are: folds over the topics `rounds` with `updates`, and `releases`.

What the server decided counts once: the first event of each decision, if its epoch is the latest one at its place in the log.
A fold changes its state in place; what it hands out is for reading only.
"""

from __future__ import annotations

from typing import ClassVar, Literal, Self

import msgspec
from msgspec import Struct

from fedloop_events import topics, types
from fedloop_events.envelope import Record

MAX_REPLIES_EACH = 4
"""Replies of one client to one round that are kept in view; what a client says beyond them changes nothing."""


class Request(Struct):
    """Somebody wants `rounds` rounds; `numbers` are those that were opened, or given up, for it."""

    request_id: str
    rounds: int
    requested_ms: int
    reason: str = ""
    numbers: list[int] = []
    given_up: bool = False

    @property
    def pending(self) -> bool:
        """Whether a further round is to be opened for it."""
        return not self.given_up and len(self.numbers) < self.rounds


class RoundState(Struct):
    """One round. `opened` is None only for a round that was given up before it opened. Times are the log's own, in ms."""

    round_id: str
    number: int
    request_id: str
    opened: types.RoundOpened | None = None
    closed: types.RoundClosed | None = None
    aborted: types.RoundAborted | None = None
    opened_ms: int = 0
    closed_ms: int = 0
    ended_ms: int = 0
    """When it was closed or aborted, whichever came last; 0 while it is open."""
    instructed: dict[str, str] = {}
    """Instruction by client."""
    bytes_down: int = 0
    """Tensor bytes that the instructions ask clients to load."""
    replies: dict[str, list[str]] = {}
    """Updates by client, in the order of the log."""
    declined: dict[str, str] = {}
    """Reason by client."""
    refused: dict[str, types.UpdateRefused] = {}
    """By update."""

    @property
    def state(self) -> Literal["open", "closed", "aborted"]:
        if self.aborted is not None:
            return "aborted"
        return "open" if self.closed is None else "closed"

    @property
    def participants(self) -> list[str]:
        """The clients whose updates count; none for a round that was aborted."""
        return [] if self.closed is None or self.aborted is not None else [update.client_id for update in self.closed.accepted]

    @property
    def excluded(self) -> dict[str, types.Exclusion]:
        """By client: why it did not count, the last reason that was given for it."""
        parts = (self.opened, self.closed, self.aborted)
        return {each.client_id: each for part in parts if part is not None for each in part.excluded}

    @property
    def bytes_up(self) -> int:
        """Tensor bytes of the updates that were accepted."""
        return sum(update.blob.size_bytes for update in self.closed.accepted if update.blob) if self.closed else 0


class RoundsView(Struct):
    """The epochs, requests and rounds of one run.

    Rests on order within the topic `rounds` and one run alone. Requests are served in the order of the log, so a round that is
    aborted before it opens belongs to the oldest pending request, and ends it.
    """

    topics: ClassVar[tuple[str, ...]] = (topics.ROUNDS, topics.UPDATES)
    version: ClassVar[int] = 1

    run_id: str = "main"
    epoch: int = 0
    """0 until a server has started."""
    server_id: str = ""
    epoch_ms: int = 0
    """When the epoch started, by the log's own clock."""
    requests: dict[str, Request] = {}
    rounds: dict[str, RoundState] = {}
    unanswered: dict[str, tuple[str, str]] = {}
    """Updates to rounds that have ended, neither accepted nor refused yet: round and client by update."""
    stale: int = 0
    """How many decisions of fenced servers, which count for nothing, there are."""
    _open: str = ""
    _queue: dict[str, None] = {}  # the pending requests, oldest first

    @property
    def next_number(self) -> int:
        return len(self.rounds) + 1

    @property
    def pending(self) -> Request | None:
        """The oldest request that wants a further round."""
        return self.requests.get(next(iter(self._queue), ""))

    @property
    def open_round(self) -> RoundState | None:
        """The round that clients are working on."""
        return self.rounds.get(self._open)

    @property
    def last(self) -> RoundState | None:
        return next(reversed(self.rounds.values()), None)

    def apply(self, record: Record, payload: types.Payload) -> None:
        if isinstance(payload, types.ClientSaid):
            if getattr(payload, "run_id", None) == self.run_id:
                self._reply(record, payload)
        elif isinstance(payload, types.RoundRequested):
            if payload.run_id == self.run_id and payload.request_id not in self.requests:
                request = Request(payload.request_id, payload.rounds, record.appended_ms, payload.reason)
                self.requests[request.request_id], self._queue[request.request_id] = request, None
        elif isinstance(payload, types.ServerSaid) and payload.run_id == self.run_id:
            if isinstance(payload, types.EpochStarted):
                if payload.epoch > self.epoch:
                    self.epoch, self.server_id, self.epoch_ms = payload.epoch, payload.server_id, record.appended_ms
            elif payload.epoch == self.epoch:
                self._decided(record, payload)
            else:
                self.stale += 1

    def _decided(self, record: Record, payload: types.ServerSaid) -> None:
        match payload:
            case types.RoundOpened():
                self._opened(record, payload)
            case types.RoundAborted():
                self._aborted(record, payload)
            case types.InstructionSent(round_id=str(round_id)) if round_id in self.rounds:
                state = self.rounds[round_id]
                if state.instructed.get(payload.client_id) == record.id:
                    return
                state.instructed[payload.client_id] = record.id
                state.bytes_down += sum(blob.size_bytes for blob in payload.content.arrays.values())
            case types.RoundClosed(round_id=str(round_id)) if round_id in self.rounds:
                state = self.rounds[round_id]
                if state.state == "open":
                    state.closed, state.closed_ms = payload, record.appended_ms
                    self._ended(record, state)
            case types.UpdateRefused(round_id=str(round_id)) if round_id in self.rounds:
                self.rounds[round_id].refused.setdefault(payload.update_id, payload)
                self.unanswered.pop(payload.update_id, None)

    def _opened(self, record: Record, opened: types.RoundOpened) -> None:
        request = self.requests.get(opened.request_id)
        if opened.round_id in self.rounds or opened.number != self.next_number or request is None or not request.pending:
            return
        self.rounds[opened.round_id] = RoundState(
            opened.round_id, opened.number, opened.request_id, opened, opened_ms=record.appended_ms
        )
        self._open = opened.round_id
        self._serve(request, opened.number)

    def _aborted(self, record: Record, aborted: types.RoundAborted) -> None:
        state = self.rounds.get(aborted.round_id)
        if state is None and (request := self.pending) is not None:
            state = RoundState(aborted.round_id, self.next_number, request.request_id)
            self.rounds[aborted.round_id] = state
            request.given_up = True
            self._serve(request, state.number)
        if state is not None and state.aborted is None:
            state.aborted = aborted
            self._ended(record, state)

    def _serve(self, request: Request, number: int) -> None:
        request.numbers.append(number)
        if not request.pending:
            del self._queue[request.request_id]

    def _ended(self, record: Record, state: RoundState) -> None:
        state.ended_ms = record.appended_ms
        if self._open == state.round_id:
            self._open = ""
        accepted = {update.update_id for update in state.closed.accepted} if state.closed else set()
        for client_id, update_id in ((client, each) for client, replies in state.replies.items() for each in replies):
            if update_id not in accepted and update_id not in state.refused:
                self.unanswered[update_id] = state.round_id, client_id

    def _reply(self, record: Record, payload: types.ClientSaid) -> None:
        state = self.rounds.get(getattr(payload, "round_id", None) or "")
        if state is None:
            return
        if isinstance(payload, types.RoundDeclined):
            state.declined.setdefault(payload.client_id, payload.reason)
        elif isinstance(payload, types.UpdateSubmitted):
            replies = state.replies.setdefault(payload.client_id, [])
            if len(replies) >= MAX_REPLIES_EACH:
                return
            replies.append(record.id)
            accepted = state.closed is not None and any(each.update_id == record.id for each in state.closed.accepted)
            if state.state != "open" and not accepted and record.id not in state.refused:
                self.unanswered[record.id] = state.round_id, payload.client_id

    def to_state(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_state(cls, state: bytes) -> Self:
        return msgspec.msgpack.decode(state, type=cls)


class Evaluation(Struct, frozen=True):
    """Accuracy, from 0 to 1, on one held-out set. Raises ValueError for one that is not (NaN, above all)."""

    accuracy: float
    examples: int
    dataset_sha256: str

    def __post_init__(self) -> None:
        if not 0 <= self.accuracy <= 1:
            raise ValueError(f"an accuracy is from 0 to 1, not {self.accuracy!r}")


class ReleaseState(Struct):
    """One release, or a candidate for one. Times are the log's own, in ms."""

    release: str
    model: str
    number: int
    blob: types.BlobRef
    round_id: str | None = None
    base_release: str | None = None
    strategy: str | None = None
    updates: list[str] = []
    status: Literal["proposed", "published", "rejected"] = "proposed"
    reason: str = ""
    """Why it was rejected, or withdrawn."""
    withdrawn: bool = False
    """Published, and later rolled back."""
    evaluations: dict[str, Evaluation] = {}
    """By held-out set, oldest first; of two on one set the first holds."""
    proposed_ms: int = 0
    decided_ms: int = 0

    @property
    def evaluation(self) -> Evaluation | None:
        """The latest one."""
        return next(reversed(self.evaluations.values()), None)


class ReleasesView(Struct):
    """The models, their releases, and which release of each is in force.

    An event of an epoch below one that the model has seen is a fenced server's and counts for nothing. One round makes one
    release, and one decision holds for each.
    """

    topics: ClassVar[tuple[str, ...]] = (topics.RELEASES,)
    version: ClassVar[int] = 1

    models: dict[str, types.ModelSpec] = {}
    releases: dict[str, ReleaseState] = {}
    by_round: dict[str, str] = {}
    """Release by round."""
    _candidates: dict[str, str] = {}
    _current: dict[str, str] = {}
    _numbers: dict[str, int] = {}
    _epochs: dict[str, int] = {}

    def current(self, model: str) -> ReleaseState | None:
        """The release in force."""
        return self.releases.get(self._current.get(model, ""))

    def candidate(self, model: str) -> ReleaseState | None:
        """The release that is proposed and not decided."""
        return self.releases.get(self._candidates.get(model, ""))

    def next_number(self, model: str) -> int:
        return self._numbers.get(model, -1) + 1

    def apply(self, record: Record, payload: types.Payload) -> None:
        if not isinstance(payload, types.ReleaseSaid):
            return
        if isinstance(payload, types.ModelRegistered):
            self.models.setdefault(payload.model, payload.spec)
        elif isinstance(payload, types.ReleaseRolledBack):
            self._rolled_back(payload)
        elif (epoch := getattr(payload, "epoch", 0)) >= self._epochs.get(payload.model, 0):
            self._epochs[payload.model] = epoch
            self._decided(record, payload)

    def _decided(self, record: Record, payload: types.ReleaseSaid) -> None:
        if isinstance(payload, types.ReleaseProposed):
            self._proposed(record, payload)
            return
        state = self.releases.get(getattr(payload, "release", ""))
        if state is None or state.model != payload.model:
            return
        if isinstance(payload, types.ReleaseEvaluated):
            evaluated = Evaluation(payload.accuracy, payload.examples, payload.dataset_sha256)
            state.evaluations.setdefault(payload.dataset_sha256, evaluated)
        elif state.status == "proposed":
            if isinstance(payload, types.ReleasePublished) and payload.blob == state.blob:
                state.status = "published"
                self._current[payload.model] = state.release
            elif isinstance(payload, types.ReleaseRejected):
                state.status, state.reason = "rejected", payload.reason
            else:
                return
            state.decided_ms = record.appended_ms
            self._candidates.pop(payload.model, None)

    def _proposed(self, record: Record, proposed: types.ReleaseProposed) -> None:
        second = proposed.round_id is not None and proposed.round_id in self.by_round
        if second or proposed.release in self.releases or proposed.number != self.next_number(proposed.model):
            return
        self.releases[proposed.release] = ReleaseState(
            proposed.release,
            proposed.model,
            proposed.number,
            proposed.blob,
            proposed.round_id,
            proposed.base_release,
            proposed.strategy,
            list(proposed.updates),
            proposed_ms=record.appended_ms,
        )
        self._candidates[proposed.model] = proposed.release
        self._numbers[proposed.model] = proposed.number
        if proposed.round_id is not None:
            self.by_round[proposed.round_id] = proposed.release

    def _rolled_back(self, payload: types.ReleaseRolledBack) -> None:
        # Compare and set: an operator who has not seen the latest release withdraws nothing.
        target, current = self.releases.get(payload.release), self.current(payload.model)
        if target is None or current is None or target.model != payload.model or current.release != payload.withdrawn:
            return
        if target.status == "published" and target is not current:
            current.withdrawn, current.reason = True, payload.reason
            target.withdrawn, target.reason = False, ""
            self._current[payload.model] = target.release

    def to_state(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_state(cls, state: bytes) -> Self:
        return msgspec.msgpack.decode(state, type=cls)
