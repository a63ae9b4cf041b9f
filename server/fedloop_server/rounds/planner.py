"""Planning: what the task plans, found once. A round's terms are a function of the configuration: of public numbers alone."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import msgspec
from fedloop_events import types
from fedloop_events.files import write_whole
from fedloop_events.folds.releases import ReleasesView
from fedloop_events.folds.rounds import RoundsView
from fedloop_tasks.task import Terms
from msgspec import Struct

from fedloop_server.config import ServerConfig

_logger = logging.getLogger(__name__)


class _Kept(Struct, frozen=True, forbid_unknown_fields=True):
    config_sha256: str
    mechanisms: dict[str, types.Mechanism]


class Planner:
    """Finding the least noise takes seconds, so it is done when first asked, and kept in `cache` if that is given."""

    def __init__(self, config: ServerConfig, *, cache: Path | None = None) -> None:
        self.config = config
        self._cache = cache
        self._kept: _Kept | None = None

    def terms(self, program: str) -> Terms:
        """The terms of a round of this program. Raises `BudgetTooSmallError` if no noise keeps the configured budget."""
        if self._kept is None:
            self._kept = self._load() or self._make()
        return self.config.plan.terms(program, self._kept.mechanisms.get(program))

    def next_program(self, rounds: RoundsView, releases: ReleasesView) -> str | None:
        """What the next round runs; None if the plan is used up.

        A round counts once it has made a release, published or not. Rounds that were aborted do not: what they spent stands in
        the ledgers of the clients, which have the last word.
        """
        made = [state.opened for state in rounds.rounds.values() if state.round_id in releases.by_round]
        return self.config.plan.next_program([opened.strategy for opened in made if opened is not None])

    def _make(self) -> _Kept:
        made = _Kept(self._key(), self.config.plan.mechanisms())
        self._save(made)
        return made

    def _key(self) -> str:
        return hashlib.sha256(msgspec.json.encode(self.config.plan)).hexdigest()

    def _load(self) -> _Kept | None:
        try:
            found = None if self._cache is None else msgspec.json.decode(self._cache.read_bytes(), type=_Kept)
        except (OSError, msgspec.MsgspecError):
            return None
        return found if found is not None and found.config_sha256 == self._key() else None

    def _save(self, made: _Kept) -> None:
        if self._cache is None:
            return
        try:
            write_whole(self._cache, msgspec.json.encode(made))
        except OSError as error:
            _logger.warning("the plan cannot be kept in %s (%s): it is made again at the next start", self._cache, error.strerror)
