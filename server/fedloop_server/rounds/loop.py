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
from collections.abc import Callable
from pathlib import Path
from typing import Final, NamedTuple

from fedloop_events import types
from fedloop_events.blobs.store import BlobStore
from fedloop_events.errors import FencedError
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.folds.snapshots import Snapshots
from fedloop_events.logs.port import EventLog
from fedloop_events.types import DEFAULT_MODEL
from fedloop_events.writer import EventWriter
from fedloop_tasks.task import UPDATE_BITS, Evaluate

from fedloop_server.config import ServerConfig
from fedloop_server.deciding import begin_epoch, decide
from fedloop_server.flower.admission import Admission
from fedloop_server.flower.grid import EarlierRound, LogGrid
from fedloop_server.flower.instructing import instructions
from fedloop_server.flower.steps import RunSteps
from fedloop_server.operations import awaiting
from fedloop_server.operations.rounds import OnWait
from fedloop_server.rounds import actions, scheduler
from fedloop_server.rounds.actions import Action
from fedloop_server.rounds.drafting import Decides, Drafting
from fedloop_server.rounds.planner import Planner
from fedloop_server.state import IDENTITIES_FILE, STATE_FILE, OnEvent, ServerState

POLL_S: Final = 1.0
"""How long one step waits for news when there is nothing to do."""


class StoppedError(Exception):
    """The server was told to stop while a round waited; the round goes on when a server is started again."""


class _AbortedError(Exception):
    """The operator wants the round that is being collected to be aborted."""


class _RunInHand(NamedTuple):
    """The run for the grid of one round: `steps` is fed by the server's own reader, which `read` reads on."""

    identities: Identities
    steps: RunSteps
    read: Callable[[float], None]


class Server:
    """One server process of a deployment.

    `evaluate` is called with the tensors of a release, `on_event` with each event as it is read, `on_wait` each second or so with
    what is waited for: for a live view. `plan` is a file in which the planner keeps what takes seconds to find, `snapshots` a
    folder for the states of the folds: both save time, and know the log again. `source` decides who takes part; `wall` is the
    clock on the wall, for schedules and hours alone.

    Raises `LogChangedError` if the log has lost events that this server has read, unless told to `accept_loss`.
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
        on_wait: OnWait | None = None,
        plan: Path | None = None,
        snapshots: Path | None = None,
        model: str = DEFAULT_MODEL,
        run_id: str = types.DEFAULT_RUN,
        source: random.Random | None = None,
        wall: Callable[[], float] = time.time,
        accept_loss: bool = False,
    ) -> None:
        self.config, self.model, self.run_id = config, model, run_id
        self.server_id = f"{os.getpid()}.{secrets.token_hex(8)}"
        self.epoch = 0
        self.planner = Planner(config, cache=plan)
        self._log, self._blobs, self._writer, self._evaluate = log, blobs, writer, evaluate
        kept = [Snapshots(snapshots / name) if snapshots else None for name in (IDENTITIES_FILE, STATE_FILE)]
        self._people = Reader(log, Identities(), snapshots=kept[0], accept_loss=accept_loss)
        people = self._people.fold
        state = ServerState(run_id, people, on_event)
        self._events = Reader(log, state, identities=self._people, snapshots=kept[1], accept_loss=accept_loss)
        self.state = self._events.fold
        self._on_wait = on_wait
        self._source, self._wall = source or random.SystemRandom(), wall
        self._clock = (0, 0.0)
        self._stop = threading.Event()

    @property
    def refused(self) -> int:
        """Events that counted for nothing since it began: malformed, or not authentic."""
        return self._people.refused + self._events.refused

    @property
    def stale(self) -> int:
        """Decisions in the run by servers that another one had taken over from."""
        return self._events.standing.stale.get(self.run_id, 0)

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
        match action:
            case actions.Wait():
                self._show_awaited(action.excluded)
                self._log.read(after=seen, limit=1, wait_s=wait_s)
            case actions.StartEpoch():
                self._start()
            case actions.CollectUpdates():
                self._collect(action.round_id)
            case _:
                self._decide(action)
        return action

    # --- reading -----------------------------------------------------------------------------------------------------

    def _next(self) -> Action:
        self._read()
        return actions.next_action(
            self.state, self.planner, model=self.model, epoch=self.epoch, now_ms=self._now_ms(), wall_s=self._wall()
        )

    def _read(self, wait_s: float = 0.0) -> None:
        self._people.catch_up()
        self._events.wait(wait_s)
        rounds = self.state.rounds
        if self.epoch and (rounds.epoch, rounds.server_id) != (self.epoch, self.server_id):
            raise FencedError(
                f"server {rounds.server_id} has begun epoch {rounds.epoch} of run {self.run_id}, after {self.epoch}",
                hint="stop this server: the other one goes on",
            )

    def _read_unless_stopped(self, wait_s: float = 0.0) -> None:
        if self._stop.is_set():
            raise StoppedError
        self._read(wait_s)
        collected = self.state.rounds.open_round
        if collected is not None and collected.abort_requested is not None:
            raise _AbortedError
        self._show_awaited([])

    def _show_awaited(self, excluded: list[types.Exclusion]) -> None:
        if self._on_wait is None:
            return
        state, reasons = self.state, {each.client_id: each.reason for each in excluded}
        now_ms, clients = self._now_ms(), state.people.clients
        self._on_wait(awaiting.awaited(state.rounds, state.releases, clients, self.config, now_ms=now_ms, excluded=reasons))

    def _now_ms(self) -> int:
        """The log's own clock: what it showed when the server last decided, and what has passed on this machine since."""
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

    def _start(self) -> None:
        def read() -> tuple[int, str]:
            self._read()
            return self.state.rounds.epoch, self.state.rounds.server_id

        origin = self.state.people.origin
        self.epoch = begin_epoch(self._log, self._writer, origin=origin, run_id=self.run_id, server_id=self.server_id, read=read)

    def _decide(self, action: Decides) -> None:
        """Append the event that does it; it is done when something else comes next."""
        drafting = Drafting(
            self.state,
            self._blobs,
            self.planner,
            self._evaluate,
            self._source,
            key=self._writer.key,
            model=self.model,
            epoch=self.epoch,
        )
        draft = drafting.draft(action)
        decide(
            self._log,
            self._writer,
            [draft],
            epoch=self.epoch,
            missing=lambda drafts: drafts if self._next() == action else [],
        )

    def _collect(self, round_id: str) -> None:
        """Run the round on Flower: instructions out, answers in, until the round's terms or the operator end it."""
        opened = self.state.rounds.rounds[round_id].opened
        assert opened is not None
        earlier = self._earlier(opened)
        runs = [
            _RunInHand(self.state.people, RunSteps(self.run_id, each), self._read_unless_stopped) for each in (round_id, *earlier)
        ]
        # What there is of the rounds already; from there on, this server's own reader reads for all.
        for run in runs:
            Reader(self._log, run.steps, identities=self._people, after=self.state.rounds_after).catch_up()
        self.state.steps = [run.steps for run in runs]
        try:
            grid = LogGrid(
                self._log,
                self._blobs,
                self._writer,
                run_id=self.run_id,
                epoch=self.epoch,
                round=opened,
                admission=Admission(ledger_check=self._ledger_check, examples_at_least=self._examples_at_least),
                reads=runs[0],
                earlier=[EarlierRound(terms, run, who) for run, (terms, who) in zip(runs[1:], earlier.values(), strict=True)],
            )
            grid.close_round(instructions(grid, opened, self._blobs), timeout=opened.deadline_s)
        except _AbortedError:
            pass  # What is next is to abort it.
        finally:
            self.state.steps = []

    def _earlier(self, opened: types.RoundOpened) -> dict[str, tuple[types.RoundOpened, set[str]]]:
        """The rounds whose updates may count in this one, and who is at work for them: as long as they compute the same, and this
        one's base has come from theirs, which a rollback takes back."""
        found = {}
        for state in scheduler.in_time(self.state.rounds, self._now_ms()):
            terms, releases = state.opened, self.state.releases
            if terms is None or not opened.max_staleness or _computes(terms) != _computes(opened):
                continue
            if releases.comes_from(opened.base_release, terms.base_release):
                found[state.round_id] = terms, {*state.at_work}
        return found

    def _ledger_check(self, client_id: str, spend_seq: int, mechanism: types.Mechanism, instruction_id: str) -> str | None:
        client = self.state.people.clients[client_id]
        refusal = self.state.ledger.check_update(client_id, spend_seq, instruction_id, mechanism, client.epsilon, client.delta)
        return None if refusal is None else refusal.reason

    def _examples_at_least(self, client_id: str) -> int:
        return self.state.people.clients[client_id].examples_at_least


def _computes(opened: types.RoundOpened) -> tuple[object, ...]:
    """What a round's updates are; in how many bits they are sent, each says by its own terms."""
    settings = {name: value for name, value in opened.hyperparameters.items() if name != UPDATE_BITS}
    return opened.model, opened.strategy, opened.mechanism, opened.upload, settings
