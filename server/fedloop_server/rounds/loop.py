"""The server's loop: do what is next, in one event that decides it, until told to stop.

No state is kept but the log and the blobs; a server that is killed and started again goes on where it was. A server that reads a
later epoch than its own stops.
"""

from __future__ import annotations

import os
import random
import secrets
import threading
import time
from pathlib import Path
from typing import Final, TypedDict

from fedloop_events import ids, types
from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_events.blobs.tensors import Array
from fedloop_events.errors import BlobError, FencedError, LogError, TensorError
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.folds.snapshots import Snapshots
from fedloop_events.logs.port import EventLog
from fedloop_events.types import DEFAULT_MODEL
from fedloop_events.writer import EventWriter
from fedloop_tasks.table import program_of
from fedloop_tasks.task import Evaluate, Verdict
from flwr.app import ConfigRecord

from fedloop_server.aggregation.merging import MergeError, merge
from fedloop_server.config import ServerConfig
from fedloop_server.deployment import release_id
from fedloop_server.flower.admission import Admission
from fedloop_server.flower.grid import LogGrid
from fedloop_server.flower.strategies import FederatedLora
from fedloop_server.rounds import actions, registry, scheduler
from fedloop_server.rounds.actions import Action, OnEvent, ServerState
from fedloop_server.rounds.planner import Planner
from fedloop_server.rounds.watched import StoppedError, WatchedLog

STATE_FILE: Final = "server.snapshot"
IDENTITIES_FILE: Final = "identities.snapshot"
POLL_S: Final = 1.0
"""How long one step waits for news when there is nothing to do."""
_Decided = types.ReleasePublished | types.ReleaseRejected


class _Run(TypedDict):
    """The fields that every event of the run has."""

    origin: str
    epoch: int
    run_id: str


class _Release(TypedDict):
    """The fields that every event about a release has."""

    origin: str
    model: str
    epoch: int
    release: str


class Server:
    """One server process of a deployment.

    `evaluate` is called with the tensors of a release. `on_event` is told of each event as it is read, for a live view. `plan`
    is a file in which the planner keeps what takes seconds to find, `snapshots` a folder for the states of the folds: both save
    time and nothing else. `source` decides who takes part.
    """

    def __init__(
        self,
        log: EventLog,
        blobs: BlobStore,
        writer: EventWriter,
        config: ServerConfig,
        *,
        evaluate: Evaluate,
        on_event: OnEvent | None = None,
        plan: Path | None = None,
        snapshots: Path | None = None,
        model: str = DEFAULT_MODEL,
        run_id: str = types.DEFAULT_RUN,
        source: random.Random | None = None,
    ) -> None:
        self.config, self.model, self.run_id = config, model, run_id
        self.server_id = f"{os.getpid()}.{secrets.token_hex(8)}"
        self.epoch = 0
        self.planner = Planner(config, cache=plan)
        self._log, self._blobs, self._writer, self._evaluate = log, blobs, writer, evaluate
        kept = [Snapshots(snapshots / name) if snapshots else None for name in (IDENTITIES_FILE, STATE_FILE)]
        self._people = Reader(log, Identities(), snapshots=kept[0])
        people = self._people.fold
        self._events = Reader(log, ServerState(run_id, people, on_event), identities=people, snapshots=kept[1])
        self.state = self._events.fold
        self._source = source or random.SystemRandom()
        self._clock = (0, 0.0)
        self._stop = threading.Event()

    @property
    def refused(self) -> int:
        """Events that counted for nothing since it began: malformed, or not said by whom they name."""
        return self._people.refused + self._events.refused

    def run(self, stop: threading.Event | None = None, rounds: int | None = None, *, until_idle: bool = False) -> int:
        """Go on until `stop` is set, `rounds` rounds have ended from now on, or (`until_idle`) none is requested; how many have.

        A round ends when its release is published or rejected, or when it is aborted. Raises FencedError when another server has
        taken over.
        """
        self._stop = stop or self._stop
        self._read()
        before, ended = self._ended(), 0
        try:
            while not self._stop.is_set() and (rounds is None or ended < rounds):
                action = self.step()
                ended = self._ended() - before
                if until_idle and isinstance(action, actions.Wait) and self.state.rounds.pending is None:
                    break
        except StoppedError:
            pass
        self._people.save()
        self._events.save()
        return ended

    def step(self, wait_s: float = POLL_S) -> Action:
        """Do what is next, and say what it was. With nothing to do, wait up to `wait_s` for news.

        Raises FencedError when another server has taken over, LogError if the log does not show what was decided.
        """
        seen = self._log.end()
        action = self._next()
        if isinstance(action, actions.Wait):
            self._log.read(after=seen, limit=1, wait_s=wait_s)
            return action
        self._do(action, "")
        if self._next() == action:
            # The id may be taken by a fenced server's event, which counts for nothing.
            self._do(action, f"-{self.epoch}")
            if self._next() == action:
                raise LogError("the log does not show what this server has just decided", hint="is it a copy, or being restored?")
        return action

    # --- reading -----------------------------------------------------------------------------------------------------

    def _next(self) -> Action:
        self._read()
        return actions.next_action(self.state, self.planner, model=self.model, epoch=self.epoch, now_ms=self._now_ms())

    def _read(self) -> None:
        self._people.catch_up()
        self._events.catch_up()
        rounds = self.state.rounds
        if self.epoch and (rounds.epoch, rounds.server_id) != (self.epoch, self.server_id):
            raise FencedError(
                f"server {rounds.server_id} has begun epoch {rounds.epoch} of run {self.run_id}, after {self.epoch}",
                hint="stop this server: the other one goes on",
            )

    def _now_ms(self) -> int:
        """The log's own clock: what it showed when the server last spoke, and what has passed on this machine since."""
        if self._clock[0] != self.state.decided_ms:
            self._clock = self.state.decided_ms, time.monotonic()
        decided_ms, at = self._clock
        return decided_ms + int((time.monotonic() - at) * 1000)

    def _ended(self) -> int:
        """Rounds that are over."""
        releases = self.state.releases
        made = (releases.releases.get(releases.by_round.get(each, "")) for each in self.state.rounds.rounds)
        decided = sum(release is not None and release.status != "proposed" for release in made)
        return decided + sum(each.aborted is not None for each in self.state.rounds.rounds.values())

    # --- doing -------------------------------------------------------------------------------------------------------

    def _do(self, action: Action, again: str) -> None:
        """`again` marks the ids of a second attempt."""
        match action:
            case actions.StartEpoch():
                self._start()
            case actions.RefuseLate():
                self._refuse_late(action, again)
            case actions.OpenRound():
                self._open(action, again)
            case actions.CollectUpdates():
                self._collect(action.round_id)
            case actions.AbortRound():
                self._abort(action, again)
            case actions.ProposeRelease():
                self._propose(action.round_id, again)
            case actions.EvaluateRelease():
                self._measure(action.release, again)
            case actions.DecideRelease():
                self._decide(action.release, action.verdict, again)
            case actions.Wait():
                pass

    def _start(self) -> None:
        """Two servers that start at once get an epoch each, and the later one goes on."""
        while not self.epoch:
            epoch = self.state.rounds.epoch + 1
            self._append_round(types.EpochStarted(**self._run() | {"epoch": epoch}, server_id=self.server_id), "epoch", epoch)
            self._read()
            if self.state.rounds.server_id == self.server_id:
                self.epoch = epoch

    def _refuse_late(self, action: actions.RefuseLate, again: str) -> None:
        refused = types.UpdateRefused(
            **self._run(),
            client_id=action.client_id,
            update_id=action.update_id,
            round_id=action.round_id,
            reason="late",
            detail="the round had ended without it",
        )
        self._append_round(refused, action.round_id, action.update_id, f"refused{again}")

    def _abort(self, action: actions.AbortRound, again: str) -> None:
        excluded = scheduler.bounded(action.excluded)
        aborted = types.RoundAborted(
            **self._run(), round_id=action.round_id, reason=action.reason, detail=action.detail, excluded=excluded
        )
        self._append_round(aborted, action.round_id, f"aborted{again}")

    def _open(self, action: actions.OpenRound, again: str) -> None:
        """Draw the cohort, once: the event that records it decides."""
        current = registry.current(self.state.releases, self.model)
        drawn = scheduler.draw(action.eligibility, self.config.cohort_size, self._source)
        terms = self.planner.terms(action.program)
        opened = types.RoundOpened(
            **self._run(),
            round_id=actions.round_id(action.number),
            request_id=action.request_id,
            number=action.number,
            model=self.model,
            base_release=current.release,
            base=current.blob,
            strategy=terms.program,
            cohort=drawn.clients,
            quorum=self.config.quorum,
            deadline_s=self.config.deadline_s,
            upload=program_of(terms.program).upload(list(self._arrays(current.blob))),
            max_upload_bytes=self.config.max_upload_bytes,
            max_update_norm=max(self.config.max_update_norm, terms.least_norm),
            mechanism=terms.mechanism,
            hyperparameters=terms.hyperparameters,
            excluded=scheduler.bounded(drawn.excluded),
        )
        self._append_round(opened, f"round{again}", action.number)

    def _collect(self, round_id: str) -> None:
        """Run the round on Flower: instructions out, answers in, until all have come or the deadline is over."""
        opened = self.state.rounds.rounds[round_id].opened
        assert opened is not None
        log = WatchedLog(self._log, self._stop, self._read)
        grid = LogGrid(
            log,
            self._blobs,
            self._writer,
            run_id=self.run_id,
            epoch=self.epoch,
            round=opened,
            admission=Admission(ledger_check=self._ledger_check),
            identities=self.state.people,
            after=self.state.round_after,
        )
        strategy = FederatedLora(opened, self._blobs)
        messages = strategy.configure_train(opened.number, strategy.base(), ConfigRecord(), grid)
        grid.send_and_receive(messages, timeout=opened.deadline_s)

    def _ledger_check(self, client_id: str, spend_seq: int, mechanism: types.Mechanism, instruction_id: str) -> str | None:
        client = self.state.people.clients[client_id]
        refusal = self.state.ledger.check_update(client_id, spend_seq, instruction_id, mechanism, client.epsilon, client.delta)
        return None if refusal is None else refusal.reason

    def _propose(self, round_id: str, again: str) -> None:
        """Merge what was accepted; blob first, then the event that names it."""
        state = self.state.rounds.rounds[round_id]
        opened, closed = state.opened, state.closed
        assert opened is not None
        assert closed is not None
        try:
            blob = self._blobs.put(tensors.encode(merge(self._blobs, opened, self._arrays(opened.base), closed.accepted)))
        except (BlobError, TensorError, MergeError) as error:
            failed = actions.AbortRound(round_id, "unmergeable", type(error).__name__)
            self._do(failed, again)
            return
        number = self.state.releases.next_number(self.model)
        proposed = types.ReleaseProposed(
            **self._release(release_id(number, blob)),
            number=number,
            blob=blob,
            round_id=round_id,
            base_release=opened.base_release,
            strategy=opened.strategy,
            updates=[update.update_id for update in closed.accepted],
        )
        self._append_release(proposed, f"proposed{again}")

    def _measure(self, release: str, again: str) -> None:
        state = self.state.releases.releases[release]
        found = self._evaluate(self._arrays(state.blob))
        evaluated = types.ReleaseEvaluated(
            **self._release(release),
            metrics=found.metrics,
            leading=found.leading,
            examples=found.examples,
            dataset_sha256=found.dataset_sha256,
        )
        first = not state.evaluations
        self._append_release(evaluated, f"evaluated{'' if first else found.dataset_sha256}{again}")

    def _decide(self, release: str, verdict: Verdict, again: str) -> None:
        state = self.state.releases.releases[release]
        common = self._release(release)
        decided: types.ReleasePublished | types.ReleaseRejected
        if verdict.reason:
            decided = types.ReleaseRejected(**common, reason=verdict.reason, detail=verdict.detail)
        else:
            decided = types.ReleasePublished(**common, number=state.number, blob=state.blob)
        self._append_release(decided, f"decided{again}")

    # --- saying ------------------------------------------------------------------------------------------------------

    def _run(self) -> _Run:
        return {"origin": self.state.people.origin, "epoch": self.epoch, "run_id": self.run_id}

    def _release(self, release: str) -> _Release:
        return {"origin": self.state.people.origin, "model": self.model, "epoch": self.epoch, "release": release}

    def _append_round(self, payload: types.ServerEvent, *what: str | int) -> None:
        self._append(payload, self.run_id, *what)

    def _append_release(self, payload: types.ReleaseProposed | types.ReleaseEvaluated | _Decided, verb: str) -> None:
        self._append(payload, self.model, payload.release, verb)

    def _append(self, payload: types.Payload, *what: str | int) -> None:
        """Under an id that is a function of what is decided: a second attempt after a crash says nothing new."""
        self._log.append([self._writer.event(payload, id=ids.derived_id(self.state.people.origin, *what))])

    def _arrays(self, blob: types.BlobRef) -> dict[str, Array]:
        return tensors.decode(self._blobs.get(blob))
