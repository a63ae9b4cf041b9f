"""The journal of a run: its steps as events, each decided once, replayed when the run is started again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypedDict, TypeVar

from fedloop_events import ids
from fedloop_events.errors import FedloopError, FencedError
from fedloop_events.logs.port import EventLog
from fedloop_events.types import InstructionSent, NodesListed, Payload, ResultRecorded, RoundClosed, StepCollected, UpdateRefused
from fedloop_events.writer import EventWriter

from fedloop_server.deciding import Draft, begin_epoch, decide
from fedloop_server.flower.admission import UpdateRefusal
from fedloop_server.flower.steps import Decision, ReadsRun, Reply, RunReader, RunStep

S = TypeVar("S", NodesListed, InstructionSent, StepCollected, RoundClosed, ResultRecorded)
_KINDS: Final[dict[type[RunStep], str]] = {
    NodesListed: "nodes",
    InstructionSent: "instruction",
    StepCollected: "closed",
    RoundClosed: "closed",
    ResultRecorded: "result",
}


class ReplayError(FedloopError):
    """A run that was started again decided otherwise than the log has it."""


class Common(TypedDict):
    """The fields that every event of a run has."""

    origin: str
    epoch: int
    run_id: str
    round_id: str | None


class Journal:
    """The steps of a run, or of one round of it, as the server of `epoch` reads and writes them.

    Every method that reads raises FencedError once a later epoch has begun.
    """

    def __init__(self, log: EventLog, writer: EventWriter, run: ReadsRun, *, epoch: int) -> None:
        self.steps, self.epoch = run.steps, epoch
        self.origin, self.run_id, self.round_id = run.identities.origin, run.steps.run_id, run.steps.round_id
        self._log, self._writer, self._read = log, writer, run.read
        self._next = 0
        self.catch_up()

    @property
    def common(self) -> Common:
        return {"origin": self.origin, "epoch": self.epoch, "run_id": self.run_id, "round_id": self.round_id}

    def next_step(self) -> int:
        """The number of the step that the run takes now."""
        self._next += 1
        return self._next - 1

    def replayed(self, step: int, kind: type[S]) -> S | None:
        """What the log has at `step`; None if the run has not come there yet. Raises ReplayError if it was of another kind."""
        decision = self.steps.decisions.get(step)
        if decision is None:
            return None
        if type(decision.payload) is not kind:
            raise ReplayError(f"the run would take another kind of step {step} than event {decision.id} records")
        return decision.payload

    def decide(self, payload: S) -> S:
        """Append one decision; the one that counts."""
        self.decide_all([payload])
        counts = self.replayed(payload.step, type(payload))
        assert counts is not None
        return counts

    def decide_all(self, payloads: Sequence[RunStep]) -> None:
        """Append decisions, all in one, and read back those that count, which another server may have made before."""
        self._decide([Draft(each, self._what(_KINDS[type(each)], each.step)) for each in payloads])

    def refuse(self, refusals: Sequence[tuple[Reply, UpdateRefusal]]) -> None:
        """Append why replies are not accepted."""
        drafts = []
        for reply, why in refusals:
            client_id = reply.payload.client_id
            payload = UpdateRefused(client_id=client_id, update_id=reply.id, **why._asdict(), **self.common)
            drafts.append(Draft(payload, self._what("refused", reply.id)))
        self._decide(drafts)

    def _decide(self, drafts: Sequence[Draft]) -> None:
        def missing(tried: Sequence[Draft]) -> list[Draft]:
            self.catch_up()
            return [each for each in tried if not self._is_decided(each.payload)]

        decide(self._log, self._writer, drafts, epoch=self.epoch, missing=missing)

    def _is_decided(self, payload: Payload) -> bool:
        if isinstance(payload, UpdateRefused):
            return payload.update_id in self.steps.refused
        return isinstance(payload, RunStep) and payload.step in self.steps.decisions

    def instructions(self) -> dict[str, Decision]:
        """All that were sent, by id."""
        decisions = self.steps.decisions.values()
        return {each.id: each for each in decisions if isinstance(each.payload, InstructionSent)}

    def catch_up(self, wait_s: float = 0.0) -> None:
        """Read what is new, waiting up to `wait_s` for the first event."""
        self._read(wait_s)
        if self.steps.epoch > self.epoch:
            raise FencedError(
                f"server {self.steps.server_id} has begun epoch {self.steps.epoch} of run {self.run_id}, after {self.epoch}",
                hint="stop this server: the other one goes on",
            )

    def id(self, kind: str, what: int | str) -> str:
        """The id of a decision, which is a function of what it decides."""
        return ids.derived_id(*self._what(kind, what))

    def _what(self, kind: str, what: int | str) -> tuple[str | int, ...]:
        return self.origin, self.run_id, self.round_id or "", what, kind


def start_epoch(log: EventLog, writer: EventWriter, *, run_id: str, server_id: str) -> int:
    """`begin_epoch`, for a server that has read nothing yet."""
    run = RunReader(log, run_id)

    def read() -> tuple[int, str]:
        run.read()
        return run.steps.epoch, run.steps.server_id

    return begin_epoch(log, writer, origin=run.identities.origin, run_id=run_id, server_id=server_id, read=read)
