"""What a deployment's log says now, in the form that commands print."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, TypeVar

from fedloop_events import locations
from fedloop_events.blobs.store import BlobStore, Identifiable
from fedloop_events.errors import UsageError
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.folds.releases import ReleaseState, ReleasesView
from fedloop_events.folds.rounds import RoundState, RoundsView
from fedloop_events.logs.port import EventLog
from fedloop_tasks.table import kind_of
from msgspec import Struct

from fedloop_cli import console
from fedloop_cli.options import Where

if TYPE_CHECKING:
    from fedloop_privacy.ledger import Ledger

T = TypeVar("T")

SERVER_KEY: Final = Path("server", "key.pem")
OVER: Final = frozenset({"aborted", "published", "rejected"})
"""States of a round in which nothing more happens."""


class Followed:
    """The rounds, releases and clients of one log, kept up to date. Whatever its author did not say counts for nothing."""

    def __init__(self, log: EventLog) -> None:
        self.log = log
        self.identities = Identities()
        self._rounds = Reader(log, RoundsView(), identities=self.identities)
        self._releases = Reader(log, ReleasesView(), identities=self.identities)
        self.catch_up()

    @property
    def rounds(self) -> RoundsView:
        return self._rounds.fold

    @property
    def releases(self) -> ReleasesView:
        return self._releases.fold

    def catch_up(self) -> None:
        self._releases.catch_up()
        self._rounds.catch_up()
        self._releases.catch_up()  # a round that has ended has its release

    def round(self, round_id: str) -> RoundState:
        """Raises `UsageError` if there is no such round."""
        state = self.rounds.rounds.get(round_id)
        if state is None:
            known = ", ".join(list(self.rounds.rounds)[-5:])
            raise UsageError(
                f"there is no round {round_id!r}", hint=f"the latest are {known}" if known else "none was opened yet"
            )
        return state

    def release_of(self, state: RoundState) -> ReleaseState | None:
        """The release, or the candidate, that the round made."""
        return self.releases.releases.get(self.releases.by_round.get(state.round_id, ""))


def open_log(where: Where) -> EventLog:
    """The log, asked for in the server's name where it wants to know for whom: a gateway shows strangers nothing.

    Raises `UsageError` if there is none, or the server's key is not at hand then; UnreachableError if it does not answer.
    """
    return _identified(locations.open_log(where.place.log), where)


def open_blobs(where: Where) -> BlobStore:
    """The blobs, in the same way."""
    blobs = locations.open_blobs(where.place.blobs)
    return _identified(blobs, where) if locations.scheme_of(blobs.url) in {"http", "https"} else blobs


def open_state(where: Where) -> Followed:
    """Raises as `open_log`."""
    return Followed(open_log(where))


def _identified(opened: T, where: Where) -> T:
    if isinstance(opened, Identifiable):
        from fedloop_events.signatures import SigningKey

        key_file = None if where.directory is None else where.directory / SERVER_KEY
        if key_file is None or not key_file.is_file():
            raise UsageError("a gateway shows the log to the server alone", hint="name DIR, the folder with the server's key")
        opened.identify("server", SigningKey.load(key_file))
    return opened


def open_ledger(log: EventLog, identities: Identities) -> Ledger:
    """Every client's spends, composed from the log."""
    from fedloop_privacy.ledger import Ledger

    reader = Reader(log, Ledger(), identities=identities)
    reader.catch_up()
    return reader.fold


class RoundSummary(Struct, frozen=True):
    """One round in one row."""

    round_id: str
    number: int
    state: str
    kind: str | None
    strategy: str | None
    base_release: str | None
    release: str | None
    """What it made, once that is published."""
    decision: str | None
    accuracy: float | None
    """The leading metric of what it made."""
    cohort: list[str]
    participants: list[str]
    excluded: list[dict[str, str]]
    opened: str | None
    seconds: float | None
    """From the opening to the decision on the release, or to the abort."""
    bytes_up: int
    bytes_down: int
    reason: str


def summarise(followed: Followed, state: RoundState) -> RoundSummary:
    opened, release = state.opened, followed.release_of(state)
    decided = release is not None and release.status != "proposed"
    ended_ms = state.ended_ms if state.state == "aborted" else release.decided_ms if release is not None else 0
    return RoundSummary(
        state.round_id,
        state.number,
        state.state if not decided or release is None else release.status,
        kind_of(opened.strategy) if opened is not None else None,
        opened.strategy if opened is not None else None,
        opened.base_release if opened is not None else None,
        release.release if release is not None and release.status == "published" else None,
        release.reason or None if release is not None else None,
        release.evaluation.score if release is not None and release.evaluation is not None else None,
        opened.cohort if opened is not None else [],
        state.participants,
        [
            {"client": each.client_id, "reason": each.reason, "detail": each.detail}
            for each in sorted(state.excluded.values(), key=lambda each: each.client_id)
        ],
        console.moment(state.opened_ms),
        (ended_ms - state.opened_ms) / 1000 if ended_ms and state.opened_ms else None,
        state.bytes_up,
        state.bytes_down,
        state.aborted.reason if state.aborted is not None else "",
    )


def rounds_table(summaries: list[RoundSummary]) -> str:
    heads = ["round", "state", "kind", "took part", "excluded", "accuracy", "release", "seconds", "bytes up", "bytes down", "why"]
    return console.table(
        heads,
        [
            [
                each.round_id,
                each.state,
                each.kind,
                f"{len(each.participants)} of {len(each.cohort)}",
                len(each.excluded),
                each.accuracy,
                each.release,
                each.seconds,
                f"{each.bytes_up:,}",
                f"{each.bytes_down:,}",
                each.reason or each.decision or "",
            ]
            for each in summaries
        ],
        empty="no rounds yet",
    )


def release_document(followed: Followed, state: ReleaseState) -> dict[str, Any]:
    current = followed.releases.current(state.model)
    status = "withdrawn" if state.withdrawn else state.status
    return {
        "release": state.release,
        "number": state.number,
        "status": status,
        "current": current is not None and current.release == state.release,
        "accuracy": state.evaluation.score if state.evaluation is not None else None,
        "round_id": state.round_id,
        "base_release": state.base_release,
        "strategy": state.strategy,
        "updates": len(state.updates),
        "sha256": state.blob.sha256,
        "size_bytes": state.blob.size_bytes,
        "proposed": console.moment(state.proposed_ms),
        "reason": state.reason,
    }
