"""What a fold over the log is, and the reader that keeps one up to date."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, Self, TypeVar, runtime_checkable

from fedloop_events import envelope
from fedloop_events.envelope import Record
from fedloop_events.errors import InvalidEventError
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.snapshots import Snapshots
from fedloop_events.logs.port import READ_AHEAD, START, EventLog
from fedloop_events.types import Payload

SNAPSHOT_EVERY = 10_000

_logger = logging.getLogger(__name__)


class Fold(Protocol):
    """A state and how an event changes it, in place. `apply` does no I/O, reads no clock, draws no random number.

    An event may come twice with the same id; it counts once.
    """

    @property
    def topics(self) -> tuple[str, ...]: ...

    def apply(self, record: Record, payload: Payload) -> None:
        """Raises `InvalidEventError` for an event that this fold refuses: it is counted and skipped."""


@runtime_checkable
class StoredFold(Fold, Protocol):
    """A fold whose state can be kept in a snapshot. `version` changes whenever a stored state no longer fits."""

    @property
    def version(self) -> int: ...

    def to_state(self) -> bytes: ...

    def from_state(self, state: bytes) -> Self:
        """A fold like this one in the state that `to_state` gave; a class method, unless it needs more than the state."""


F = TypeVar("F", bound=Fold)


class Reader(Generic[F]):
    """Keeps `fold` up to date with `log`.

    Events of unknown types are skipped and counted in `unknown`. With `identities`, which are caught up first, an event that its
    author did not say is refused. Refused and malformed events are counted in `refused`, handed to `on_refused`, and skipped:
    one bad event never stops a reader. `snapshots` are for a `StoredFold`; with any other fold they stay unused.
    """

    def __init__(
        self,
        log: EventLog,
        fold: F,
        *,
        snapshots: Snapshots | None = None,
        identities: Identities | None = None,
        on_refused: Callable[[Record, InvalidEventError], None] | None = None,
    ) -> None:
        self.fold = fold
        self.position = START
        self.unknown = self.refused = 0
        self._log, self._snapshots, self._on_refused = log, snapshots, on_refused
        self._identities = identities
        self._who = None
        if identities is not None:
            self._who = Reader(log, identities)
            self._who.position = identities.position
        self._since_snapshot = 0
        if snapshots is not None:
            self._restore(snapshots)

    def catch_up(self) -> int:
        """Apply everything that is in the log now; how many events were read."""
        total = 0
        while count := self._step(0.0):
            total += count
        if self._snapshots is not None and self._since_snapshot >= SNAPSHOT_EVERY:
            self.save()
        return total

    def wait(self, timeout_s: float) -> int:
        """`catch_up`, after waiting up to `timeout_s` for the first event; how many events were read."""
        count = self._step(timeout_s)
        return count + self.catch_up() if count else 0

    def save(self) -> None:
        """Write a snapshot now."""
        if self._snapshots is not None and isinstance(self.fold, StoredFold):
            self._snapshots.save(self.fold.version, self.position, self.fold.to_state())
            self._since_snapshot = 0

    def _restore(self, snapshots: Snapshots) -> None:
        fold = self.fold
        if not isinstance(fold, StoredFold) or (found := snapshots.load(fold.version)) is None:
            return
        position, state = found
        end = self._log.end()
        if not all(end.covers(stream, offset) for stream, offset in position.offsets.items()):
            _logger.warning("the snapshot %s is not of this log: it is rebuilt", snapshots.path)
            return
        self.fold = fold.from_state(state)
        self.position = position

    def _step(self, wait_s: float) -> int:
        batch = self._log.read(self.fold.topics, self.position, limit=READ_AHEAD, wait_s=wait_s)
        if batch.records and self._who is not None:
            self._who.catch_up()
        self._apply(batch.records)
        self.position = batch.position
        self._since_snapshot += len(batch.records)
        return len(batch.records)

    def _apply(self, records: Sequence[Record]) -> None:
        decode, apply, identities = envelope.decode, self.fold.apply, self._identities
        for record in records:
            try:
                payload = decode(record)
                if payload is None:
                    self.unknown += 1
                    continue
                if identities is not None:
                    identities.authenticate(record, payload)
                apply(record, payload)
            except InvalidEventError as error:
                self.refused += 1
                if self._on_refused is not None:
                    self._on_refused(record, error)
