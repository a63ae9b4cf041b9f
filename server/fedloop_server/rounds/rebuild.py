"""Rebuilding a release from the log: anyone with the log and the blobs can, without any key, and compare the bytes.

It repeats what the server did with the function that the server used (`merging.merge`), on the updates that `RoundClosed` lists,
and also checks what the server could have made up: that each of them was signed by the client it names, for this round, and
names that very blob.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from fedloop_events import envelope, topics, types
from fedloop_events.blobs.store import BlobStore
from fedloop_events.blobs.tensors import Array
from fedloop_events.envelope import Record
from fedloop_events.errors import BlobError, FedloopError, InvalidEventError, UsageError
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.folds.releases import ReleaseState, ReleasesView
from fedloop_events.folds.rounds import RoundsView
from fedloop_events.logs.port import EventLog
from fedloop_events.types import DEFAULT_MODEL
from msgspec import Struct

from fedloop_server.aggregation.merging import merge
from fedloop_server.aggregation.releases import encode, get
from fedloop_server.operations import registry


class RebuildError(FedloopError):
    """The log does not hold how the release was made, or not the updates that it was made of."""


class RebuiltRelease(Struct, frozen=True):
    """One release that was made again."""

    release: str
    published_sha256: str
    rebuilt_sha256: str
    clients: list[str]

    @property
    def identical(self) -> bool:
        return self.published_sha256 == self.rebuilt_sha256


class Rebuilt(Struct, frozen=True):
    """What came of it; `steps` from the oldest release that was made again to the one that was asked for."""

    release: str
    steps: list[RebuiltRelease]

    @property
    def identical(self) -> bool:
        """Whether every byte of every step is the same."""
        return all(step.identical for step in self.steps)

    @property
    def published_sha256(self) -> str:
        return self.steps[-1].published_sha256

    @property
    def rebuilt_sha256(self) -> str:
        return self.steps[-1].rebuilt_sha256


class _Updates:
    """Fold: what clients have signed."""

    topics = (topics.UPDATES,)

    def __init__(self) -> None:
        self.submitted: dict[str, types.UpdateSubmitted] = {}

    def apply(self, record: Record, payload: types.Payload) -> None:
        if isinstance(payload, types.UpdateSubmitted):
            self.submitted.setdefault(record.id, payload)


class _Releases:
    """Fold: the releases of `model`, and what there is about later ones that does not count."""

    topics = (topics.RELEASES,)

    def __init__(self, model: str) -> None:
        self.view, self._model = ReleasesView(), model
        self._published: dict[str, Record] = {}
        self._refused: list[tuple[str | None, Record, InvalidEventError]] = []
        """With each the release that was in force then."""

    def apply(self, record: Record, payload: types.Payload) -> None:
        self.view.apply(record, payload)
        if isinstance(payload, types.ReleasePublished) and payload.model == self._model:
            self._published.setdefault(payload.release, record)

    def refuse(self, record: Record, error: InvalidEventError) -> None:
        self._refused.append((self._current(), record, error))

    def in_force(self) -> str:
        """The release in force. Raises `RebuildError` if the log has broken events of a later one, `UsageError` if there is none.

        Broken events from before it was published, and those of a release that was decided all the same, change nothing.
        """
        for release, record in self._published.items():
            if not self._is_decided(release):
                raise _broken(release, record, "it publishes what the log does not propose")
        candidate = self.view.candidate(self._model)
        for then, record, error in self._refused:
            named = _release_of(record)
            if then == self._current() and not self._is_decided(named):
                raise _broken(named or (None if candidate is None else candidate.release), record, error.message)
        return registry.current(self.view, self._model).release

    def _current(self) -> str | None:
        found = self.view.current(self._model)
        return None if found is None else found.release

    def _is_decided(self, release: str | None) -> bool:
        state = self.view.releases.get(release or "")
        return state is not None and state.status != "proposed"


def rebuild(
    log: EventLog,
    blobs: BlobStore,
    release: str | None = None,
    *,
    model: str = DEFAULT_MODEL,
    run_id: str = types.DEFAULT_RUN,
    deep: bool = False,
) -> Rebuilt:
    """Make a release again (by default the one in force): from its base's blob, or with `deep` from release 0 on.

    Raises `UsageError` for an unknown release or one that no round made, `RebuildError` if the log does not hold an update that
    counted as its client signed it, if its events about a later release than the one in force are broken, or if the release's
    stored file is; `BlobError` if another blob is gone or its bytes are wrong.
    """
    identities = Identities()
    found = _Releases(model)
    releases = Reader(log, found, identities=identities, on_refused=found.refuse)
    rounds = Reader(log, RoundsView(run_id), identities=identities)
    updates = Reader(log, _Updates(), identities=identities)
    for reader in (releases, rounds, updates):
        reader.catch_up()
    name = found.in_force() if release is None else registry.find(found.view, release).release
    try:
        ancestors = registry.lineage(rounds.fold, found.view, name)
    except UsageError as error:
        raise RebuildError(error.message, hint="`fedloop log verify` says what is broken") from None
    made = [found.view.releases[each.release] for each in ancestors if each.base_release is not None]
    if not made:
        raise UsageError(f"release {name} was made by no round: there is nothing to rebuild")
    steps: list[RebuiltRelease] = []
    arrays: Mapping[str, Array] | None = None
    for state in reversed(made if deep else made[:1]):
        step, arrays = _remake(state, arrays, blobs, rounds.fold, updates.fold.submitted, found.view)
        steps.append(step)
    _check_stored(made[0], blobs)
    return Rebuilt(name, steps)


def _remake(
    state: ReleaseState,
    base: Mapping[str, Array] | None,
    blobs: BlobStore,
    rounds: RoundsView,
    submitted: Mapping[str, types.UpdateSubmitted],
    releases: ReleasesView,
) -> tuple[RebuiltRelease, Mapping[str, Array]]:
    """The step from `base`, which is None where the base's own blob is to be read."""
    made = rounds.rounds.get(state.round_id or "")
    if made is None or made.opened is None or made.closed is None:
        raise RebuildError(f"the round that made release {state.release} is not in the log")
    opened, accepted = made.opened, made.closed.accepted
    known = releases.releases.get(opened.base_release)
    if state.base_release != opened.base_release or known is None or known.blob != opened.base:
        raise RebuildError(f"release {state.release} names another base than its round {opened.round_id}")
    if state.updates != [each.update_id for each in accepted] or len(accepted) < opened.quorum:
        raise RebuildError(f"release {state.release} names other updates than its round {opened.round_id} accepted")
    stale = rounds.stale(made)
    for each in accepted:
        _check_submitted(each, submitted.get(each.update_id), stale.get(each.update_id, opened))
    _check_bases(state, stale.values(), releases)
    arrays = merge(blobs, opened, get(blobs, opened.base) if base is None else base, accepted, stale)
    digest = hashlib.sha256()
    for chunk in encode(arrays):
        digest.update(chunk)
    clients = [each.client_id for each in accepted]
    return RebuiltRelease(state.release, state.blob.sha256, digest.hexdigest(), clients), arrays


def _release_of(record: Record) -> str | None:
    """The release that an event names which counts for nothing."""
    try:
        return getattr(envelope.decode(record), "release", None)
    except InvalidEventError:
        return None


def _broken(release: str | None, record: Record, why: str) -> RebuildError:
    return RebuildError(
        f"release {release} is broken in the log" if release else "a later release than the one in force is broken in the log",
        cause=f"event {record.offset} of stream {record.stream!r}: {why}",
        hint="`fedloop log verify` says what is broken; an older release is rebuilt if it is named",
    )


def _check_stored(state: ReleaseState, blobs: BlobStore) -> None:
    """Raise `RebuildError` unless the store holds the very bytes that were published."""
    try:
        for _ in blobs.blocks(state.blob):
            pass
    except BlobError as error:
        raise RebuildError(
            f"the stored file of release {state.release} is damaged or gone",
            cause=error.message,
            hint="restore the blob from a copy",
        ) from None


def _check_bases(state: ReleaseState, stale: Iterable[types.RoundOpened], releases: ReleasesView) -> None:
    """Raise `RebuildError` unless the earlier rounds started from releases that this one comes from."""
    for each in stale:
        known = releases.releases.get(each.base_release)
        if known is None or known.blob != each.base or not releases.comes_from(state.release, each.base_release):
            raise RebuildError(
                f"release {state.release} counts an update of round {each.round_id}, whose base is none of its ancestors"
            )


def _check_submitted(accepted: types.AcceptedUpdate, update: types.UpdateSubmitted | None, opened: types.RoundOpened) -> None:
    if update is None:
        raise RebuildError(f"update {accepted.update_id}, which counted, is not in the log as {accepted.client_id} signed it")
    same = (update.client_id, update.round_id, list(update.content.arrays.values()))
    if same != (accepted.client_id, opened.round_id, [accepted.blob]) or update.client_id not in opened.cohort:
        raise RebuildError(f"update {accepted.update_id} is not what {accepted.client_id} signed for round {opened.round_id}")
