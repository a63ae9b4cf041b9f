"""A deployment's rounds, releases and clients, as its log has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.folds.releases import ReleasesView
from fedloop_events.folds.rounds import RoundsView
from fedloop_events.logs.port import EventLog

if TYPE_CHECKING:
    from fedloop_privacy.dp.ledger import Ledger


class Followed:
    """The folds over one log, kept up to date. An event that is not authentic counts for nothing."""

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

    def wait(self, timeout_s: float) -> None:
        """`catch_up`, after waiting up to `timeout_s` for an event."""
        self.log.read(after=self.log.end(), limit=1, wait_s=timeout_s)
        self.catch_up()

    def ledger(self) -> Ledger:
        """Every client's spends, read from the log now."""
        from fedloop_privacy.dp.ledger import Ledger

        reader = Reader(self.log, Ledger(), identities=self.identities)
        reader.catch_up()
        return reader.fold
