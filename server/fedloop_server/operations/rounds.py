"""Rounds: what became of each, what is still to come, and asking for more."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Final

from fedloop_events import ids, types
from fedloop_events.errors import FedloopError, UnreachableError, UsageError
from fedloop_events.folds.releases import Evaluation
from fedloop_events.folds.rounds import RoundState, RoundsView
from fedloop_events.types import Exclusion
from fedloop_events.writer import EventWriter
from fedloop_tasks.table import kind_of
from msgspec import Struct

from fedloop_server import schedules, triggers
from fedloop_server.config import ServerConfig
from fedloop_server.operations import awaiting, commands
from fedloop_server.operations.awaiting import Awaited
from fedloop_server.operations.followed import Followed

OVER: Final = frozenset({"aborted", "published", "rejected"})
"""States of a round in which nothing more happens."""
OnWait = Callable[[Awaited], None]
_WAIT_S: Final = 1.0
"""At a time, so that a deadline is kept."""


class RoundSummary(Struct, frozen=True):
    """One round, with what became of its release. Times are the log's own, in ms; 0 for what has not happened."""

    round_id: str
    number: int
    state: str
    """open, closed, aborted; when its release was decided, published or rejected."""
    kind: str | None
    strategy: str | None
    base_release: str | None
    release: str | None
    """What it made, once that is published."""
    decision: str | None
    """Why its release was rejected, or withdrawn."""
    evaluation: Evaluation | None
    """Of its release."""
    cohort: list[str]
    participants: list[str]
    excluded: list[Exclusion]
    """By client."""
    replies: int
    """Clients that have submitted an update."""
    opened_ms: int
    ended_ms: int
    """When its release was decided, or it was aborted."""
    bytes_up: int
    bytes_down: int
    aborted: str
    """Why it was aborted."""
    request_id: str
    reason: str
    """Why it was requested."""

    @property
    def over(self) -> bool:
        return self.state in OVER

    @property
    def took_ms(self) -> int | None:
        """From the opening to the end; None without both."""
        return self.ended_ms - self.opened_ms if self.ended_ms and self.opened_ms else None


class RefusedUpdate(Struct, frozen=True):
    """An update that the server refused."""

    client_id: str
    update_id: str
    reason: str


class RoundDetail(Struct, frozen=True):
    """What a summary leaves out: the terms, and who declined them or was refused. A round that was given up before it opened has
    none."""

    mechanism: types.Mechanism | None
    hyperparameters: dict[str, float]
    quorum: int | None
    deadline_s: float | None
    enough: int | None
    grace_s: float | None
    max_staleness: int
    stale: dict[str, int]
    """How many rounds before this one an update was asked for, by participant, where that was not in this one."""
    declined: dict[str, str]
    """Reason by client."""
    refused: list[RefusedUpdate]


def find(rounds: RoundsView, round_id: str) -> RoundState:
    """The round of that id. Raises `UsageError` if there is none."""
    state = rounds.rounds.get(round_id)
    if state is None:
        known = ", ".join(list(rounds.rounds)[-5:])
        raise UsageError(f"there is no round {round_id!r}", hint=f"the latest are {known}" if known else "none was opened yet")
    return state


def summarise(state: RoundState, followed: Followed) -> RoundSummary:
    releases, request = followed.releases, followed.rounds.requests.get(state.request_id)
    opened, release = state.opened, releases.releases.get(releases.by_round.get(state.round_id, ""))
    decided = release is not None and release.status != "proposed"
    return RoundSummary(
        state.round_id,
        state.number,
        state.state if not decided or release is None else release.status,
        kind_of(opened.strategy) if opened is not None else None,
        opened.strategy if opened is not None else None,
        opened.base_release if opened is not None else None,
        release.release if release is not None and release.status == "published" else None,
        release.reason or None if release is not None else None,
        release.evaluation if release is not None else None,
        opened.cohort if opened is not None else [],
        state.participants,
        sorted(state.excluded.values(), key=lambda each: each.client_id),
        len(state.replies),
        state.opened_ms,
        state.ended_ms if state.state == "aborted" else release.decided_ms if release is not None else 0,
        state.bytes_up,
        state.bytes_down,
        state.aborted.reason if state.aborted is not None else "",
        state.request_id,
        request.reason if request is not None else "",
    )


def summaries(followed: Followed) -> list[RoundSummary]:
    """Every round, oldest first."""
    return [summarise(each, followed) for each in followed.rounds.rounds.values()]


def detail(state: RoundState, rounds: RoundsView) -> RoundDetail:
    opened, stale = state.opened, rounds.stale(state)
    accepted = state.closed.accepted if state.closed is not None else []
    return RoundDetail(
        opened.mechanism if opened is not None else None,
        opened.hyperparameters if opened is not None else {},
        opened.quorum if opened is not None else None,
        opened.deadline_s if opened is not None else None,
        opened.enough if opened is not None else None,
        opened.grace_s if opened is not None else None,
        opened.max_staleness if opened is not None else 0,
        {each.client_id: state.number - stale[each.update_id].number for each in accepted if each.update_id in stale},
        state.declined,
        [RefusedUpdate(each.client_id, each.update_id, each.reason) for each in state.refused.values()],
    )


def asked_by(request_id: str) -> str:
    """Who asked for rounds: a trigger, the schedule, or a person."""
    prefixes = {triggers.REQUEST: "trigger", schedules.REQUEST: "schedule"}
    return next((name for prefix, name in prefixes.items() if request_id.startswith(prefix)), "person")


def waiting(rounds: RoundsView) -> int:
    """Rounds that were requested and have not been opened."""
    return sum(request.rounds - len(request.numbers) for request in list(rounds.requests.values()) if request.pending)


def watch(
    followed: Followed,
    rounds: int = 0,
    timeout_s: float | None = None,
    *,
    config: ServerConfig | None = None,
    on_wait: OnWait | None = None,
) -> Iterator[RoundSummary]:
    """Each round that is not over, and again whenever something in it has changed, until `rounds` of them are over; 0: never.

    `on_wait` is called each second or so with what is waited for, which `config` makes exact. Raises UnreachableError if they are
    not over in `timeout_s`.
    """
    before = {each.round_id for each in summaries(followed) if each.over}
    known: dict[str, RoundSummary] = {}
    deadline = _deadline(timeout_s)
    while True:
        for each in summaries(followed):
            if each.round_id not in before and each != known.get(each.round_id):
                known[each.round_id] = each
                yield each
        if rounds and sum(each.over for each in known.values()) >= rounds:
            return
        _wait(followed, deadline, config, on_wait)


def until_ended(
    followed: Followed,
    request_id: str,
    timeout_s: float | None = None,
    *,
    config: ServerConfig | None = None,
    on_wait: OnWait | None = None,
) -> list[RoundSummary]:
    """Wait until nothing more comes of a request; its rounds, which are fewer than requested if the server gave it up.

    `on_wait` is called as by `watch`. Raises UnreachableError, which says what was waited for, after `timeout_s`.
    """
    deadline = _deadline(timeout_s)
    while True:
        request = followed.rounds.requests.get(request_id)
        found = [] if request is None else [each for each in summaries(followed) if each.number in request.numbers]
        if request is not None and not request.pending and all(each.over for each in found):
            return found
        _wait(followed, deadline, config, on_wait)


def request(writer: EventWriter, rounds: int, reason: str) -> str:
    """Ask the server for `rounds` rounds; the request's id. Raises `UsageError` for a reason that no log should hold."""
    requested = types.RoundRequested(
        origin=commands.identities(writer).origin,
        run_id=types.DEFAULT_RUN,
        request_id=f"q-{ids.new_id()}",
        rounds=rounds,
        reason=commands.check_reason(reason),
    )
    writer.append(requested)
    return requested.request_id


def withdraw(writer: EventWriter, request_id: str, reason: str) -> int:
    """Take a request back: the rounds of it that have not been opened are not opened any more; how many those are. A round that
    is open goes on.

    Raises `UsageError` if there is no such request, `FedloopError` if nothing more was to come of it.
    """
    reason = commands.check_reason(reason)
    rounds = Followed(writer.log).rounds
    request = rounds.requests.get(request_id)
    if request is None:
        pending = ", ".join(each.request_id for each in rounds.requests.values() if each.pending)
        raise UsageError(f"there is no request {request_id!r}", hint=f"pending are {pending}" if pending else "none is pending")
    if not request.pending:
        why = (
            "it is withdrawn" if request.withdrawn else "the server gave it up" if request.given_up else "its rounds were opened"
        )
        raise FedloopError(f"nothing more is to come of request {request_id}: {why}")
    origin = commands.identities(writer).origin
    writer.append(types.RoundRequestWithdrawn(origin, types.DEFAULT_RUN, request_id, reason))
    return request.rounds - len(request.numbers)


def abort(writer: EventWriter, round_id: str, reason: str) -> None:
    """Ask the server to end a round without a release, also while it collects; one that does not run does it when it starts.
    Asked for again, it changes nothing.

    Raises `UsageError` if there is no such round, `FedloopError` if it is over, or its release is proposed.
    """
    reason = commands.check_reason(reason)
    followed = Followed(writer.log)
    state = find(followed.rounds, round_id)
    release = followed.releases.by_round.get(round_id)
    if state.aborted is not None:
        raise FedloopError(f"{round_id} is over: it was aborted ({state.aborted.reason})")
    if release is not None:
        status = followed.releases.releases[release].status
        hint = "put an earlier release in force again: `fedloop release rollback`" if status == "published" else ""
        raise FedloopError(f"{round_id} cannot be aborted any more: its release {release} is {status}", hint=hint)
    if state.abort_requested is None:
        origin = commands.identities(writer).origin
        writer.append(types.RoundAbortRequested(origin, types.DEFAULT_RUN, round_id, reason))


def _deadline(timeout_s: float | None) -> float | None:
    return None if timeout_s is None else time.monotonic() + timeout_s


def _wait(followed: Followed, deadline: float | None, config: ServerConfig | None, on_wait: OnWait | None) -> None:
    left_s = _WAIT_S if deadline is None else deadline - time.monotonic()
    if on_wait is not None or left_s < 0:
        awaited = awaiting.now(followed, config)
        if left_s < 0:
            raise UnreachableError("the rounds have not ended in time", cause=awaited.line, hint=awaited.hint)
        if on_wait is not None:
            on_wait(awaited)
    followed.wait(min(_WAIT_S, left_s))
