"""What a fold over the log is, and the reader that keeps one up to date."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Generic, Protocol, Self, TypeVar, runtime_checkable

from fedloop_events.envelope import Record
from fedloop_events.errors import InvalidEventError, LogChangedError
from fedloop_events.folds import marks
from fedloop_events.folds.admit import Admit, Standing
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.snapshots import Snapshots
from fedloop_events.logs.port import READ_AHEAD, START, EventLog, Position
from fedloop_events.types import Payload

SNAPSHOT_EVERY = 10_000

_logger = logging.getLogger(__name__)


class Fold(Protocol):
    """A state and how an event that counts changes it, in place. `apply` does no I/O, reads no clock, draws no random number.

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

    The fold gets what counts (`Admit`). Events of unknown types are skipped and counted in `unknown`. With `identities`, which
    are caught up first (by their own reader, if that is what is given), an event that its author did not sign is refused. Refused
    and malformed events are counted in `refused`, handed to `on_refused`, and skipped: one bad event never stops a reader.
    `snapshots` are for a `StoredFold`; with any other fold they stay unused. If the log is not the one that a snapshot was made
    of, it raises `LogChangedError`; with `accept_loss` it names what is lost, and reads the log from its beginning. `after` is
    where it begins.
    """

    def __init__(
        self,
        log: EventLog,
        fold: F,
        *,
        snapshots: Snapshots | None = None,
        identities: Identities | Reader[Identities] | None = None,
        on_refused: Callable[[Record, InvalidEventError], None] | None = None,
        after: Position = START,
        accept_loss: bool = False,
    ) -> None:
        self.fold = fold
        self.position = after
        self.refused = 0
        self._log, self._snapshots, self._on_refused = log, snapshots, on_refused
        if isinstance(identities, Identities):
            identities = Reader(log, identities, after=identities.position)
        self._who = identities
        self._admit = Admit(None if identities is None else identities.fold)
        self._since_snapshot = 0
        self._marks: marks.Marks = {}
        if snapshots is not None:
            self._restore(snapshots, accept_loss=accept_loss)

    @property
    def unknown(self) -> int:
        return self._admit.unknown

    @property
    def standing(self) -> Standing:
        """The epochs as of the position, and what servers decided that they had fenced."""
        return self._admit.standing

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
            self._snapshots.save(self.fold.version, self.position, self.fold.to_state(), self.standing, self._marks)
            self._since_snapshot = 0

    def _restore(self, snapshots: Snapshots, *, accept_loss: bool) -> None:
        fold = self.fold
        if not isinstance(fold, StoredFold) or (found := snapshots.load(fold.version)) is None:
            return
        try:
            marks.check(self._log.end(), lambda after: self._log.read(fold.topics, after, limit=1), found.position, found.marks)
        except LogChangedError as error:
            if not accept_loss:
                raise
            _logger.warning("what is lost is accepted: %s; the state is rebuilt from what is left", error.message)
            snapshots.discard()
            return
        self.fold = fold.from_state(found.state)
        self.position, self._admit.standing, self._marks = found.position, found.standing, found.marks

    def _step(self, wait_s: float) -> int:
        batch = self._log.read(self.fold.topics, self.position, limit=READ_AHEAD, wait_s=wait_s)
        if batch.records and self._who is not None:
            self._who.catch_up()
        self._apply(batch.records)
        self.position = batch.position
        if self._snapshots is not None:
            marks.remember(self._marks, batch.records)
        self._since_snapshot += len(batch.records)
        return len(batch.records)

    def _apply(self, records: Sequence[Record]) -> None:
        admit, apply = self._admit, self.fold.apply
        for record in records:
            try:
                payload = admit(record)
                if payload is not None:
                    apply(record, payload)
            except InvalidEventError as error:
                self.refused += 1
                if self._on_refused is not None:
                    self._on_refused(record, error)
