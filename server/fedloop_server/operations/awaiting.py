"""What the rounds of a deployment wait for: the one answer to "why does nothing happen?"."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Final, Literal

from fedloop_events import types
from fedloop_events.folds.identities import Client
from fedloop_events.folds.releases import ReleasesView
from fedloop_events.folds.rounds import RoundRequest, RoundState, RoundsView, grace_after_quorum
from fedloop_events.types import DEFAULT_MODEL
from fedloop_tasks.table import task_of
from msgspec import Struct, structs

from fedloop_server.config import COHORT, ServerConfig
from fedloop_server.operations.clients import absence
from fedloop_server.operations.followed import Followed

PATIENCE_S: Final = 30.0
"""Whoever waits for the server for longer asks whether it runs: most decisions take it less."""
_MAX_NAMES: Final = 5
_TOO_FEW: Final = "too-few-clients"
_ADVICE: Final = {
    "unavailable": "start devices that do not run (`fedloop agent run`)",
    "too-few-examples": "have users of devices with too few examples give feedback (`fedloop agent feedback`)",
    "budget-exceeded": "enrol devices with a larger budget: `fedloop audit budget` says who has none left",
    _TOO_FEW: "enrol more devices (`fedloop agent enrol`)",
}
"""By reason why a client cannot be asked; nothing helps who is revoked."""


class Awaited(Struct, frozen=True):
    """What comes next cannot come before this."""

    what: Literal["nothing", "clients", "updates", "server"]
    """"clients" to open a round of `request_id`, "updates" in `round_id`, or it is the "server" that has to decide about them."""
    request_id: str = ""
    round_id: str = ""
    quorum: int = 0
    """Clients that a round needs to open, and updates that it needs to make a release."""
    there: int = 0
    """Clients that can be asked, or that have answered."""
    asked: int = 0
    """Clients that the round has asked, or that are at work for an earlier one."""
    missing: list[str] = []
    """Who has not answered."""
    excluded: dict[str, int] = {}
    """Enrolled clients that cannot be asked now, by reason."""
    left_s: float | None = None
    """Until the request is given up, or the round is closed without whoever is missing."""
    epoch: int = 0
    """0: no server has ever started."""
    decided_s: float | None = None
    """How long ago a server has last decided anything."""

    @property
    def subject(self) -> tuple[object, ...]:
        """All but the seconds: what is waited for is the same as long as this is."""
        return structs.astuple(structs.replace(self, left_s=None, decided_s=None))

    @property
    def line(self) -> str:
        """One sentence for a person."""
        match self.what:
            case "nothing":
                found = "no round is requested"
            case "clients":
                found = f"request {self.request_id} waits for clients: {self.there} of the {self.quorum} needed can be asked"
                if self.excluded:
                    found += f" ({', '.join(f'{count} {reason}' for reason, count in self.excluded.items())})"
                found += f"; it is given up in {self.left_s:.0f} s" if self.left_s is not None else ""
            case "updates":
                names = [*self.missing[:_MAX_NAMES], *([f"{more} more"] if (more := len(self.missing) - _MAX_NAMES) > 0 else [])]
                found = f"{self.round_id} waits for {', '.join(names)}: {self.there} of {self.asked} have answered"
                found += f", the quorum is {self.quorum}"
                found += f"; it ends in {self.left_s:.0f} s at the latest" if self.left_s is not None else ""
            case "server":
                found = f"{self.round_id or f'request {self.request_id}'} waits for the server"
        return f"{found}; {self.server}"

    @property
    def server(self) -> str:
        """Whether a server runs, as far as the log says."""
        if self.decided_s is None:
            return "no server has ever started"
        return f"the server of epoch {self.epoch} has last decided {self.decided_s:.0f} s ago"

    @property
    def hint(self) -> str:
        """What to do about it; "" for nothing."""
        match self.what:
            case "clients":
                return self._clients_hint()
            case "updates" if (self.decided_s or 0.0) > PATIENCE_S:
                return f"look at these devices, or wait until {self.round_id} ends without them"
            case "server" if self.decided_s is None:
                return "start it: `fedloop server run`"
            case "server" if (self.decided_s or 0.0) > PATIENCE_S:
                return "is `fedloop server run` running? if it is, it says itself what it waits for"
            case _:
                return ""

    def _clients_hint(self) -> str:
        enrolled = self.there + sum(self.excluded.values()) - self.excluded.get("revoked", 0)
        reasons = {*self.excluded, *([_TOO_FEW] if enrolled < self.quorum else [])}
        found = [advice for reason, advice in _ADVICE.items() if reason in reasons]
        return "; ".join(found) or "enrol devices that can take part (`fedloop agent enrol`)"


def now(followed: Followed, config: ServerConfig | None) -> Awaited:
    """What is waited for at this moment. Without the server's configuration, which is in its folder, the quorum is that of the
    last round, and everything else the default. Who lacks budget for the next round the server alone knows, which says it.
    Nothing is waited for as long as the log registers no model.
    """
    rounds, clients = followed.rounds, followed.identities.clients
    last = next((each.opened for each in reversed(rounds.rounds.values()) if each.opened is not None), None)
    if config is None:
        if (spec := followed.releases.models.get(DEFAULT_MODEL)) is None:
            return Awaited("nothing")
        config = ServerConfig(plan=task_of(spec).plan())
        if last is not None:
            config = structs.replace(config, quorum=last.quorum, cohort_size=max(last.quorum, COHORT))
    return awaited(rounds, followed.releases, clients, config, now_ms=int(time.time() * 1000), excluded={})


def awaited(
    rounds: RoundsView,
    releases: ReleasesView,
    clients: Mapping[str, Client],
    config: ServerConfig,
    *,
    now_ms: int,
    excluded: Mapping[str, str],
) -> Awaited:
    """What is waited for at `now_ms` of the log's clock. `excluded` says who cannot be asked for a reason that is in no fold of
    these: who cannot pay."""
    last, release = rounds.last, next(reversed(releases.releases.values()), None)
    times = [rounds.epoch_ms, *((last.opened_ms, last.ended_ms) if last else ())]
    decided_ms = max([*times, *((release.proposed_ms, release.decided_ms) if release and rounds.epoch else ())])
    found = Awaited("nothing")
    if rounds.open_round is not None:
        found = _updates(rounds.open_round, rounds.buffered, now_ms)
    elif last is not None and _undecided(last, releases):
        found = Awaited("server", round_id=last.round_id)
    elif (request := rounds.pending) is not None:
        since_ms = rounds.waits_since_ms(request, now_ms + config.quorum_wait_s * 1000)
        found = _clients(request, clients.values(), config, now_ms, since_ms, excluded)
        if found.there >= found.quorum or not rounds.epoch:
            found = structs.replace(found, what="server", left_s=None)
    decided_s = max(0.0, (now_ms - decided_ms) / 1000) if rounds.epoch else None
    return structs.replace(found, epoch=rounds.epoch, decided_s=decided_s)


def _undecided(last: RoundState, releases: ReleasesView) -> bool:
    if last.state != "closed":
        return False
    release = releases.releases.get(releases.by_round.get(last.round_id, ""))
    return release is None or release.status == "proposed"


def _updates(state: RoundState, buffered: Iterable[RoundState], now_ms: int) -> Awaited:
    opened = state.opened
    assert opened is not None
    came_ms, missing = dict(state.replied_ms), [each for each in opened.cohort if not _answered(each, state)]
    for earlier in buffered if opened.max_staleness else ():
        late = [each for each in earlier.at_work if each not in opened.cohort]
        came_ms |= {each: earlier.replied_ms[each] for each in late if each in earlier.replied_ms}
        missing += [each for each in late if not _answered(each, earlier)]
    asked = len(opened.cohort) + sum(each not in opened.cohort for each in {*came_ms, *missing})
    left_s = (_ends_ms(state, opened, sorted(came_ms.values())) - now_ms) / 1000
    # Until all are asked, after the deadline, when all have answered, and to abort, it is the server's turn.
    waits = missing and left_s > 0 and len(state.instructed) == len(opened.cohort) and state.abort_requested is None
    return Awaited(
        "updates" if waits else "server",
        request_id=state.request_id,
        round_id=state.round_id,
        quorum=opened.quorum,
        there=asked - len(missing),
        asked=asked if waits else len(state.instructed),
        missing=missing,
        left_s=left_s if waits else None,
    )


def _answered(client_id: str, state: RoundState) -> bool:
    return client_id in state.replies or client_id in state.declined


def _ends_ms(state: RoundState, opened: types.RoundOpened, came_ms: Sequence[int]) -> float:
    """When the round ends at the latest, if the replies that have come are accepted, as in `flower.grid`."""
    deadline_ms = state.opened_ms + opened.deadline_s * 1000
    if opened.enough is not None and len(came_ms) >= opened.enough:
        return came_ms[opened.enough - 1]
    if (grace := grace_after_quorum(opened, state.opened_ms, came_ms)) is None:
        return deadline_ms
    grace_s, reached_ms = grace
    return min(deadline_ms, reached_ms + grace_s * 1000)


def _clients(
    request: RoundRequest,
    clients: Iterable[Client],
    config: ServerConfig,
    now_ms: int,
    since_ms: int,
    excluded: Mapping[str, str],
) -> Awaited:
    reasons = [absence(each, config, now_ms) or excluded.get(each.client_id) for each in clients]
    left_s = config.quorum_wait_s - (now_ms - since_ms) / 1000
    return Awaited(
        "clients",
        request_id=request.request_id,
        quorum=config.quorum,
        there=reasons.count(None),
        excluded=dict(sorted(Counter(each for each in reasons if each is not None).items())),
        left_s=max(0.0, left_s),
    )
