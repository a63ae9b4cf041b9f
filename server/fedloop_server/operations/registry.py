"""The release registry: which release is in force, where each one came from, and going back."""

from __future__ import annotations

from typing import Final

from fedloop_events import types
from fedloop_events.errors import PolicyError, UsageError
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.folds.releases import Evaluation, ReleaseState, ReleasesView
from fedloop_events.folds.rounds import RoundsView
from fedloop_events.writer import EventWriter
from fedloop_tasks.table import task_of
from fedloop_tasks.task import Task
from msgspec import Struct

MAX_LINEAGE = 10_000


_AGAIN: Final = "run `fedloop server init` again as before, to its end"


class ReleaseSummary(Struct, frozen=True):
    """One release, or a candidate for one."""

    release: str
    number: int
    status: str
    """proposed, published, rejected; or withdrawn: published, and later rolled back."""
    current: bool
    """Whether it is the one in force."""
    evaluation: Evaluation | None
    """The latest one."""
    round_id: str | None
    base_release: str | None
    strategy: str | None
    updates: int
    """How many went in."""
    sha256: str
    size_bytes: int
    proposed_ms: int
    reason: str
    """Why it was rejected, or withdrawn."""


class Contribution(Struct, frozen=True):
    """One update that went into a release."""

    client_id: str
    update_id: str
    blob: types.BlobRef | None
    weight: float


class Ancestor(Struct, frozen=True):
    """One step of a release's history: the round that made it of its base, and whose updates went in."""

    release: str
    number: int
    sha256: str
    base_release: str | None
    round_id: str | None
    strategy: str | None
    contributions: list[Contribution]


def summarise(releases: ReleasesView, state: ReleaseState) -> ReleaseSummary:
    in_force = releases.current(state.model)
    return ReleaseSummary(
        state.release,
        state.number,
        "withdrawn" if state.withdrawn else state.status,
        in_force is not None and in_force.release == state.release,
        state.evaluation,
        state.round_id,
        state.base_release,
        state.strategy,
        len(state.updates),
        state.blob.sha256,
        state.blob.size_bytes,
        state.proposed_ms,
        state.reason,
    )


def summaries(releases: ReleasesView) -> list[ReleaseSummary]:
    """Every release, oldest first."""
    return [summarise(releases, each) for each in list(releases.releases.values())]


def find(releases: ReleasesView, release: str) -> ReleaseState:
    """The release of that name. Raises `UsageError` if there is none."""
    state = releases.releases.get(release)
    if state is None:
        raise UsageError("there is no release of that name", hint="`fedloop release list` shows them")
    return state


def current(releases: ReleasesView, model: str) -> ReleaseState:
    """The release in force. Raises `UsageError` if the model has none."""
    state = releases.current(model)
    if state is None:
        raise UsageError("the model has no release", hint=_AGAIN)
    return state


def task_of_model(releases: ReleasesView, model: str) -> Task:
    """What the model learns. Raises `UsageError` if it is not registered."""
    spec = releases.models.get(model)
    if spec is None:
        raise UsageError("the log registers no such model", hint=_AGAIN)
    return task_of(spec)


def lineage(rounds: RoundsView, releases: ReleasesView, release: str) -> list[Ancestor]:
    """From `release` back to release 0. Raises `UsageError` for an unknown release, or an ancestor that is not in the log."""
    steps: list[Ancestor] = []
    name: str | None = release
    while name is not None and len(steps) < MAX_LINEAGE:
        state = find(releases, name)
        closed = None
        if state.round_id is not None:
            made = rounds.rounds.get(state.round_id)
            closed = None if made is None else made.closed
            if closed is None:
                raise UsageError(f"release {name} names a round that is not in the log, or not closed")
        accepted = [] if closed is None else closed.accepted
        steps.append(
            Ancestor(
                name,
                state.number,
                state.blob.sha256,
                state.base_release,
                state.round_id,
                state.strategy,
                [Contribution(each.client_id, each.update_id, each.blob, each.weight) for each in accepted],
            )
        )
        name = state.base_release
    return steps


def roll_back(writer: EventWriter, *, release: str, reason: str, model: str = types.DEFAULT_MODEL) -> types.ReleaseRolledBack:
    """Put `release`, which was published once, in force again, by an event that names the one it withdraws.

    Raises `UsageError` for a release that is unknown, was never published, or is in force; `PolicyError` if another release
    came into force meanwhile.
    """
    identities = Identities()
    reader = Reader(writer.log, ReleasesView(), identities=identities)
    reader.catch_up()
    target, now = find(reader.fold, release), current(reader.fold, model)
    if target.model != model or target.status != "published":
        raise UsageError(f"release {release} was never published", hint="`fedloop release list` shows which were")
    if target is now:
        raise UsageError(f"release {release} is in force already")
    event = types.ReleaseRolledBack(
        origin=identities.origin, model=model, release=release, withdrawn=now.release, reason=reason[:200]
    )
    writer.append(event)
    reader.catch_up()
    if current(reader.fold, model).release != release or not find(reader.fold, now.release).withdrawn:
        raise PolicyError(f"release {now.release} is no longer in force: nothing was rolled back", hint="look again, then repeat")
    return event
