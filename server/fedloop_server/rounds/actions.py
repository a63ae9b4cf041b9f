"""What the server does next: a pure function of what the log says.

A server that is killed at any point is started again with the same folds, and so goes on with the same action.
"""

from __future__ import annotations

from fedloop_events import types
from fedloop_events.folds.identities import Client
from fedloop_events.folds.releases import ReleaseState
from fedloop_events.folds.rounds import RoundState
from fedloop_tasks.task import Verdict
from msgspec import Struct

from fedloop_server import schedules
from fedloop_server.config import NONE
from fedloop_server.operations import registry
from fedloop_server.rounds import scheduler
from fedloop_server.rounds.planner import Planner
from fedloop_server.rounds.scheduler import Eligibility
from fedloop_server.state import ServerState


class StartEpoch(Struct, frozen=True):
    """Take over the run; every other server of it is fenced."""


class RefuseLate(Struct, frozen=True):
    """An update has come to a round that has ended without it."""

    update_id: str
    client_id: str
    round_id: str


class EvaluateRelease(Struct, frozen=True):
    release: str


class JudgeRelease(Struct, frozen=True):
    """Publish the candidate, or reject it, as the task's gate says of its evaluation and that of the release in force."""

    release: str
    incumbent: str


class RejectRelease(Struct, frozen=True):
    """Reject the candidate, whatever it is worth."""

    release: str
    verdict: Verdict


class CollectUpdates(Struct, frozen=True):
    """Send the instructions of the open round, and wait for the answers."""

    round_id: str


class ProposeRelease(Struct, frozen=True):
    """Merge what was accepted."""

    round_id: str


class AbortRound(Struct, frozen=True):
    round_id: str
    reason: str
    detail: str = ""
    excluded: list[types.Exclusion] = []


class OpenRound(Struct, frozen=True):
    request_id: str
    number: int
    program: str
    eligibility: Eligibility


class RequestRound(Struct, frozen=True):
    """A time of the schedule has come."""

    request_id: str
    reason: str


class Wait(Struct, frozen=True):
    """Nothing to do until something new is in the log, or time has passed."""

    reason: str
    excluded: list[types.Exclusion] = []
    """Who cannot take part now, if it is for too few clients."""


Action = (
    StartEpoch
    | RefuseLate
    | EvaluateRelease
    | JudgeRelease
    | RejectRelease
    | CollectUpdates
    | ProposeRelease
    | AbortRound
    | RequestRound
    | OpenRound
    | Wait
)


def next_action(state: ServerState, planner: Planner, *, model: str, epoch: int, now_ms: int, wall_s: float) -> Action:
    """What a server of `epoch` (0: it has none yet) does next; `now_ms` is the log's own clock, `wall_s` the one on the wall."""
    if epoch == 0:
        return StartEpoch()
    rounds, releases = state.rounds, state.releases
    current = registry.current(releases, model)
    if rounds.unanswered:
        update_id, (round_id, client_id) = next(iter(rounds.unanswered.items()))
        return RefuseLate(update_id, client_id, round_id)
    if (candidate := releases.candidate(model)) is not None:
        return _judge(candidate, current)
    if (last := rounds.last) is not None and last.state == "closed" and last.round_id not in releases.by_round:
        return _finish(last, current)
    if (opened := rounds.open_round) is not None:
        if opened.abort_requested is not None:
            return _abort(opened.round_id, opened.abort_requested)
        return CollectUpdates(opened.round_id)
    if current.evaluation is None:
        return EvaluateRelease(current.release)
    config = planner.config
    if config.schedule != NONE and (due := schedules.due(rounds, config.schedule, config.time_zone, wall_s)) is not None:
        return RequestRound(due.request_id, due.reason)
    return _open(state, planner, model, now_ms, wall_s)


def _judge(candidate: ReleaseState, current: ReleaseState) -> Action:
    if candidate.base_release != current.release:
        return RejectRelease(candidate.release, Verdict("stale-base", f"{current.release} is in force by now"))
    if candidate.evaluation is None:
        return EvaluateRelease(candidate.release)
    if candidate.evaluation.dataset_sha256 not in current.evaluations:
        return EvaluateRelease(current.release)
    return JudgeRelease(candidate.release, current.release)


def _finish(closed: RoundState, current: ReleaseState) -> Action:
    opened, accepted = closed.opened, len(closed.participants)
    assert opened is not None
    if closed.abort_requested is not None:
        return _abort(closed.round_id, closed.abort_requested)
    if accepted < opened.quorum:
        detail = f"{accepted} of {len(opened.cohort)} updates were accepted, and the quorum is {opened.quorum}"
        return AbortRound(closed.round_id, "quorum", detail)
    if opened.base_release != current.release:
        return AbortRound(closed.round_id, "stale-base", f"{current.release} is in force by now")
    return ProposeRelease(closed.round_id)


def _abort(round_id: str, requested: types.RoundAbortRequested) -> AbortRound:
    return AbortRound(round_id, "operator", requested.reason)


def _open(state: ServerState, planner: Planner, model: str, now_ms: int, wall_s: float) -> Action:
    request = state.rounds.pending
    if request is None:
        return Wait("no round is requested")
    hours, wait_s = planner.config.hours, planner.config.quorum_wait_s
    if hours is not None and not hours.contain(wall_s):
        return Wait(
            f"rounds open in the hours {planner.config.windows}, next at {hours.next_start(wall_s).isoformat(' ', 'minutes')}"
        )
    number = state.rounds.next_number
    program = planner.next_program(state.rounds, state.releases)
    if program is None:
        return AbortRound(round_id(number), "plan-exhausted", planner.config.plan.exhausted)
    mechanism, config = planner.terms(program).mechanism, planner.config

    def budget(client: Client, mechanism: types.Mechanism) -> str | None:
        refusal = state.ledger.check(client.client_id, mechanism, client.epsilon, client.delta)
        return None if refusal is None else refusal.reason

    clients, at_work = state.people.clients.values(), scheduler.at_work(state.rounds, now_ms)
    found = scheduler.eligible(clients, mechanism, config, now_ms=now_ms, budget=budget, at_work=at_work)
    if found.clients and len(found.clients) + found.at_work >= config.quorum:
        return OpenRound(request.request_id, number, program, found)
    wait_ms = wait_s * 1000
    since_ms = state.rounds.waits_since_ms(request, now_ms + wait_ms)
    detail = f"{len(found.clients)} clients can take part, and the quorum is {config.quorum}"
    # A request that has waited for the hours of rounds waits for clients from their beginning.
    if now_ms - since_ms < wait_ms or (hours is not None and hours.opened_within(wait_s, wall_s)):
        return Wait(detail, found.excluded)
    return AbortRound(round_id(number), "quorum", detail, found.excluded)


def round_id(number: int) -> str:
    return f"r{number:04d}"
