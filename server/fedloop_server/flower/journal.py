"""The journal of a run: its steps as events, each decided once, replayed when the run is started again."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final, TypedDict, TypeVar

from fedloop_events import ids
from fedloop_events.errors import FedloopError, FencedError, LogError
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.logs.port import START, EventLog, Position
from fedloop_events.types import EpochStarted, InstructionSent, NodesListed, ResultRecorded, RoundClosed, UpdateRefused
from fedloop_events.writer import EventWriter

from fedloop_server.flower.admission import UpdateRefusal
from fedloop_server.flower.steps import Decision, Reply, RunStep, RunSteps

S = TypeVar("S", NodesListed, InstructionSent, RoundClosed, ResultRecorded)
_KINDS: Final[dict[type[RunStep], str]] = {
    NodesListed: "nodes",
    InstructionSent: "instruction",
    RoundClosed: "closed",
    ResultRecorded: "result",
}


class ReplayError(FedloopError):
    """A run that was started again decided otherwise than the log says it did."""


class Common(TypedDict):
    """The fields that every event of a run has."""

    origin: str
    epoch: int
    run_id: str
    round_id: str | None


class Journal:
    """The steps of one run, or with `round_id` of that round of it, as the server of `epoch` reads and writes them.

    Every method that reads raises FencedError once a later epoch has begun.
    """

    def __init__(
        self,
        log: EventLog,
        writer: EventWriter,
        identities: Identities,
        *,
        run_id: str,
        round_id: str | None,
        epoch: int,
        after: Position = START,
    ) -> None:
        self.steps = RunSteps(run_id, round_id)
        self.origin, self.run_id, self.round_id, self.epoch = identities.origin, run_id, round_id, epoch
        self._log, self._writer = log, writer
        self._events = Reader(log, self.steps, identities=identities)
        self._events.position = after
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
        """What the log says of `step`; None if the run has not come there yet. Raises ReplayError if it was of another kind."""
        decision = self.steps.decisions.get(step)
        if decision is None:
            return None
        if not isinstance(decision.payload, kind):
            raise ReplayError(f"the run would take another kind of step {step} than event {decision.id} says it did")
        return decision.payload

    def decide(self, payload: S) -> S:
        """Append one decision; the one that counts."""
        self.decide_all([payload])
        counts = self.replayed(payload.step, type(payload))
        assert counts is not None
        return counts

    def decide_all(self, payloads: Sequence[RunStep]) -> None:
        """Append decisions, all in one, and read back those that count, which another server may have made before.

        An id may be taken by a fenced server's event, which counts for nothing: then the decision is made under an id of this
        epoch's own.
        """
        missing = list(payloads)
        for suffix in ("", f"-{self.epoch}"):
            if not missing:
                return
            self._log.append([self._writer.event(each, id=self.id(_KINDS[type(each)] + suffix, each.step)) for each in missing])
            self.catch_up()
            missing = [each for each in missing if each.step not in self.steps.decisions]
        if missing:
            raise LogError(f"step {missing[0].step} of run {self.run_id} was appended and cannot be read back")

    def refuse(self, refusals: Sequence[tuple[Reply, UpdateRefusal]]) -> None:
        """Append why replies are not accepted."""
        events = []
        for reply, why in refusals:
            client_id = reply.payload.client_id
            payload = UpdateRefused(client_id=client_id, update_id=reply.id, **why._asdict(), **self.common)
            events.append(self._writer.event(payload, id=self.id("refused", reply.id)))
        if events:
            self._log.append(events)

    def instructions(self) -> dict[str, Decision]:
        """All that were sent, by id."""
        decisions = self.steps.decisions.values()
        return {each.id: each for each in decisions if isinstance(each.payload, InstructionSent)}

    def catch_up(self, wait_s: float = 0.0) -> None:
        """Read what is new, waiting up to `wait_s` for the first event."""
        self._events.wait(wait_s)
        if self.steps.epoch > self.epoch:
            raise FencedError(
                f"server {self.steps.server_id} has begun epoch {self.steps.epoch} of run {self.run_id}, after {self.epoch}",
                hint="stop this server: the other one goes on",
            )

    def id(self, kind: str, what: int | str) -> str:
        """The id of a decision, which is a function of what it decides."""
        return ids.derived_id(self.origin, self.run_id, self.round_id or "", what, kind)


def start_epoch(log: EventLog, writer: EventWriter, *, run_id: str, server_id: str) -> int:
    """Take over a run: every server of an earlier epoch is fenced from here on. The new epoch.

    Two servers that start at once get an epoch each, and the later one goes on. `server_id` is one process's own.
    """
    steps, identities = RunSteps(run_id), Identities()
    reader = Reader(log, steps, identities=identities)
    Reader(log, identities).catch_up()
    while True:
        reader.catch_up()
        epoch = steps.epoch + 1
        started = EpochStarted(origin=identities.origin, epoch=epoch, run_id=run_id, server_id=server_id)
        log.append([writer.event(started, id=ids.derived_id(identities.origin, run_id, "epoch", epoch))])
        reader.catch_up()
        if (steps.epoch, steps.server_id) == (epoch, server_id):
            return epoch
