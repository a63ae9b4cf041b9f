"""What the rounds and the releases of a deployment are: folds over the topics `rounds` with `updates`, and `releases`.

What the server decided counts once: the first event of each decision. A fold changes its state in place; what it hands out is
for reading only.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import islice
from typing import ClassVar, Literal, Self

import msgspec
from msgspec import Struct

from fedloop_events import topics, types
from fedloop_events.envelope import Record

MAX_REPLIES_EACH = 16
"""Replies of one client to one round that are kept in view; what a client sends beyond them changes nothing."""


class RoundRequest(Struct):
    """Somebody wants `rounds` rounds; `numbers` are those that were opened, or given up, for it."""

    request_id: str
    rounds: int
    requested_ms: int
    reason: str = ""
    numbers: list[int] = []
    given_up: bool = False
    withdrawn: bool = False

    @property
    def pending(self) -> bool:
        """Whether a further round is to be opened for it."""
        return not self.given_up and not self.withdrawn and len(self.numbers) < self.rounds


class RoundState(Struct):
    """One round. `opened` is None only for a round that was given up before it opened. Times are the log's own, in ms."""

    round_id: str
    number: int
    request_id: str
    opened: types.RoundOpened | None = None
    steps: dict[int, types.StepCollected] = {}
    """What was collected before the step that closed it, by step."""
    closed: types.RoundClosed | None = None
    aborted: types.RoundAborted | None = None
    abort_requested: types.RoundAbortRequested | None = None
    """The first request to abort it that came before it had been aborted."""
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
    replied_ms: dict[str, int] = {}
    """When the first of them came, by client."""
    declined: dict[str, str] = {}
    """Reason by client."""
    refused: dict[str, types.UpdateRefused] = {}
    """By update."""
    at_work: dict[str, None] = {}
    """Clients whose update may count in a later round, once a buffered round is closed."""
    counted_later: dict[str, str] = {}
    """Updates that did, by client."""

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
    def collected(self) -> list[types.StepCollected]:
        """All that was collected, in order."""
        return [*self.steps.values(), *([] if self.closed is None else [self.closed])]

    @property
    def excluded(self) -> dict[str, types.Exclusion]:
        """By client: why it did not count, the last reason that was given for it."""
        events, counts = (self.opened, *self.collected, self.aborted), set(self.participants)
        found = (each for event in events if event is not None for each in event.excluded)
        return {each.client_id: each for each in found if each.client_id not in counts}

    @property
    def counted(self) -> set[str]:
        """The updates that were accepted, here or in a later round."""
        return {*(update.update_id for each in self.collected for update in each.accepted), *self.counted_later.values()}

    @property
    def bytes_up(self) -> int:
        """Tensor bytes of the updates that were accepted."""
        return sum(update.blob.size_bytes for each in self.collected for update in each.accepted if update.blob)


def grace_after_quorum(opened: types.RoundOpened, asked_ms: int, came_ms: Iterable[int]) -> tuple[float, int] | None:
    """Seconds for which a round goes on after its quorum had answered, and when that was, by the log's clock. None if it has not,
    or the round has no such term.

    It is the round's `grace_s`, or as long as the quorum took, if it took longer: where the fast ones are slow, the others are
    waited for longer. `came_ms` are the times of the replies.
    """
    came = sorted(came_ms)
    if opened.grace_s is None or len(came) < opened.quorum:
        return None
    reached_ms = came[opened.quorum - 1]
    return max(opened.grace_s, (reached_ms - asked_ms) / 1000), reached_ms


class RoundsView(Struct):
    """The epochs, requests and rounds of one run.

    Rests on order within the topic `rounds` and one run alone. Requests are served in the order of the log, so a round that is
    aborted before it opens belongs to the oldest pending request, and ends it.
    """

    topics: ClassVar[tuple[str, ...]] = (topics.ROUNDS, topics.UPDATES)
    version: ClassVar[int] = 4

    run_id: str = types.DEFAULT_RUN
    epoch: int = 0
    """0 until a server has started."""
    server_id: str = ""
    epoch_ms: int = 0
    """When the epoch started, by the log's own clock."""
    requests: dict[str, RoundRequest] = {}
    rounds: dict[str, RoundState] = {}
    unanswered: dict[str, tuple[str, str]] = {}
    """Updates to rounds that have ended, neither accepted nor refused yet, that can count no more: round and client by update."""
    _open: str = ""
    _buffered: dict[str, None] = {}  # the closed rounds that clients are at work for, oldest first
    _queue: dict[str, None] = {}  # the pending requests, oldest first

    @property
    def next_number(self) -> int:
        return len(self.rounds) + 1

    @property
    def pending(self) -> RoundRequest | None:
        """The oldest request that wants a further round."""
        return self.requests.get(next(iter(self._queue), ""))

    @property
    def queued(self) -> list[RoundRequest]:
        """All requests that want a further round, oldest first."""
        return [self.requests[request_id] for request_id in self._queue]

    def waits_since_ms(self, request: RoundRequest, latest_ms: float) -> int:
        """Since when a request waits for clients: nothing else has stood in its way since. A stamp after `latest_ms` is by a
        clock that is wrong, and counts for nothing."""
        begun = request.requested_ms, self.epoch_ms, self.last.ended_ms if self.last else 0
        return max(each for each in (0, *begun) if each <= latest_ms)

    @property
    def open_round(self) -> RoundState | None:
        """The round that clients are working on."""
        return self.rounds.get(self._open)

    @property
    def buffered(self) -> list[RoundState]:
        """The closed rounds that clients are at work for, oldest first."""
        return [self.rounds[round_id] for round_id in self._buffered]

    def earlier(self, closed: RoundState) -> dict[str, RoundState]:
        """Of the updates that a round accepted, those of earlier rounds: their round, by update."""
        found: dict[str, RoundState] = {}
        for update in closed.closed.accepted if closed.closed is not None else []:
            if closed.instructed.get(update.client_id) != update.instruction_id:
                first = closed.number - 1 - (closed.opened.max_staleness if closed.opened is not None else 0)
                for state in islice(self.rounds.values(), max(first, 0), closed.number - 1):
                    if state.instructed.get(update.client_id) == update.instruction_id:
                        found[update.update_id] = state
        return found

    def stale(self, closed: RoundState) -> dict[str, types.RoundOpened]:
        """The terms that those updates were made under, by update."""
        return {update_id: each.opened for update_id, each in self.earlier(closed).items() if each.opened is not None}

    @property
    def last(self) -> RoundState | None:
        return next(reversed(self.rounds.values()), None)

    def apply(self, record: Record, payload: types.Payload) -> None:
        if isinstance(payload, types.ClientEvent):
            if getattr(payload, "run_id", None) == self.run_id:
                self._reply(record, payload)
        elif isinstance(payload, types.RoundRequested):
            if payload.run_id == self.run_id and payload.request_id not in self.requests:
                request = RoundRequest(payload.request_id, payload.rounds, record.appended_ms, payload.reason)
                self.requests[request.request_id], self._queue[request.request_id] = request, None
        elif isinstance(payload, types.RoundRequestWithdrawn):
            if payload.run_id == self.run_id and payload.request_id in self._queue:
                del self._queue[payload.request_id]
                self.requests[payload.request_id].withdrawn = True
        elif isinstance(payload, types.RoundAbortRequested):
            state = self.rounds.get(payload.round_id) if payload.run_id == self.run_id else None
            if state is not None and state.aborted is None and state.abort_requested is None:
                state.abort_requested = payload
        elif isinstance(payload, types.ServerEvent) and payload.run_id == self.run_id:
            self._decided(record, payload)

    def _decided(self, record: Record, payload: types.ServerEvent) -> None:
        match payload:
            case types.EpochStarted():
                self.epoch, self.server_id, self.epoch_ms = payload.epoch, payload.server_id, record.appended_ms
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
            case types.StepCollected(round_id=str(round_id)) if round_id in self.rounds:
                self._collected(record, payload, self.rounds[round_id])
            case types.UpdateRefused(round_id=str(round_id)) if round_id in self.rounds:
                self._refused(payload, self.rounds[round_id])

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

    def _collected(self, record: Record, collected: types.StepCollected, state: RoundState) -> None:
        if state.state != "open":
            return
        if isinstance(collected, types.RoundClosed):
            state.closed, state.closed_ms = collected, record.appended_ms
            if state.opened is not None and state.opened.max_staleness:
                self._counted_late(state)
                state.at_work = {each.client_id: None for each in collected.excluded if each.reason == types.AT_WORK}
                if state.at_work:
                    self._buffered[state.round_id] = None
            self._ended(record, state)
        else:
            state.steps.setdefault(collected.step, collected)

    def _serve(self, request: RoundRequest, number: int) -> None:
        request.numbers.append(number)
        if not request.pending:
            del self._queue[request.request_id]

    def _counted_late(self, closed: RoundState) -> None:
        accepted = {update.update_id: update.client_id for update in closed.closed.accepted} if closed.closed else {}
        for update_id, state in self.earlier(closed).items():
            state.counted_later[accepted[update_id]] = update_id
            self._back(state, accepted[update_id])

    def _refused(self, refused: types.UpdateRefused, state: RoundState) -> None:
        state.refused.setdefault(refused.update_id, refused)
        self.unanswered.pop(refused.update_id, None)
        if state.replies.get(refused.client_id, [])[:1] == [refused.update_id]:
            self._back(state, refused.client_id)

    def _ended(self, record: Record, state: RoundState) -> None:
        state.ended_ms = record.appended_ms
        if self._open == state.round_id:
            self._open = ""
        if state.aborted is not None:
            self._let_go(state)
        self._leave(state, state.replies)
        for each in self.buffered:
            if each.opened is not None and each.number + each.opened.max_staleness <= state.number:
                self._let_go(each)

    def _let_go(self, state: RoundState) -> None:
        """Nobody's update counts for it any more."""
        self._back(state, *state.at_work)

    def _back(self, state: RoundState, *clients: str) -> None:
        """Clients that were at work for a buffered round are no longer."""
        back = [each for each in clients if each in state.at_work]
        if not back:
            return
        for client_id in back:
            del state.at_work[client_id]
        self._leave(state, back)
        if not state.at_work:
            self._buffered.pop(state.round_id, None)

    def _leave(self, state: RoundState, clients: Iterable[str]) -> None:
        """A round has ended: what clients that are not at work for it have sent, and nobody has judged, is to be refused."""
        counted = state.counted
        for client_id in clients:
            if client_id not in state.at_work:
                for update_id in state.replies.get(client_id, []):
                    if update_id not in counted and update_id not in state.refused:
                        self.unanswered[update_id] = state.round_id, client_id

    def _reply(self, record: Record, payload: types.ClientEvent) -> None:
        state = self.rounds.get(getattr(payload, "round_id", None) or "")
        if state is None:
            return
        if isinstance(payload, types.RoundDeclined):
            state.declined.setdefault(payload.client_id, payload.reason)
            self._back(state, payload.client_id)
        elif isinstance(payload, types.UpdateSubmitted):
            replies = state.replies.setdefault(payload.client_id, [])
            if len(replies) >= MAX_REPLIES_EACH:
                return
            replies.append(record.id)
            state.replied_ms.setdefault(payload.client_id, record.appended_ms)
            if state.state != "open":
                self._leave(state, [payload.client_id])

    def to_state(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_state(cls, state: bytes) -> Self:
        return msgspec.msgpack.decode(state, type=cls)
