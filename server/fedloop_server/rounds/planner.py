"""Planning: the terms of each round, a function of the configuration and of public numbers alone.

Under differential privacy a deployment has `planned_rounds` rounds, whose mechanisms compose to the configured epsilon for a
client that takes part in all of them: first noisy sums per class, then DP-SGD.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Final, Literal

import msgspec
from fedloop_events import types
from fedloop_events.files import write_whole
from fedloop_events.folds.releases import ReleasesView
from fedloop_events.folds.rounds import RoundsView
from msgspec import Struct

from fedloop_server.config import ServerConfig

Kind = Literal["sums", "train"]
SUMS: Final = "sums"

_logger = logging.getLogger(__name__)


class RoundTerms(Struct, frozen=True):
    """What every client of a round is asked for."""

    kind: Kind
    strategy: str
    mechanism: types.Mechanism | None
    hyperparameters: dict[str, float]
    max_update_norm: float

    def upload(self, names: Sequence[str]) -> list[str]:
        """The tensors of an update, of those that a release has."""
        if self.kind == SUMS:
            return [SUMS]
        return [name for name in names if self.strategy != "ffa" or not name.endswith(".A")]


class _Plan(Struct, frozen=True, forbid_unknown_fields=True):
    config_sha256: str
    sums: types.Mechanism
    training: types.Mechanism


class Planner:
    """Finding the least noise takes seconds, so it is done when first asked, and kept in `cache` if that is given."""

    def __init__(self, config: ServerConfig, *, cache: Path | None = None) -> None:
        self.config = config
        self._cache = cache
        self._plan: _Plan | None = None

    def terms(self, kind: Kind) -> RoundTerms:
        """The terms of a round of this kind. Raises `BudgetTooSmallError` if no noise keeps the configured epsilon."""
        config, mechanism = self.config, None
        if config.epsilon is not None:
            plan = self._planned()
            mechanism = plan.sums if kind == SUMS else plan.training
        hyperparameters = {"head_scale": config.head_scale} if kind == SUMS else config.hyperparameters
        # Sums of unit vectors are as long as there are examples of one class.
        norm = max(config.max_update_norm, 4.0 * config.nominal_examples) if kind == SUMS else config.max_update_norm
        return RoundTerms(kind, SUMS if kind == SUMS else config.merge, mechanism, hyperparameters, norm)

    def next_kind(self, rounds: RoundsView, releases: ReleasesView) -> Kind | None:
        """What the next round is; None if the plan is used up.

        A round counts once it has made a release, published or not. Rounds that were aborted do not: what they spent stands in
        the ledgers of the clients, which have the last word.
        """
        made = [state for state in rounds.rounds.values() if state.opened is not None and state.round_id in releases.by_round]
        if self.config.epsilon is None:
            return "train"
        if len(made) >= self.config.planned_rounds:
            return None
        return "train" if any(state.opened.kind == SUMS for state in made if state.opened) else SUMS

    def _planned(self) -> _Plan:
        if self._plan is None:
            self._plan = self._load() or self._make()
        return self._plan

    def _make(self) -> _Plan:
        from fedloop_privacy.accounting import plan  # imports torch

        config = self.config
        if config.epsilon is None:
            raise ValueError("a round without differential privacy has no mechanism")
        sums, training = plan(
            config.epsilon,
            config.delta,
            config.planned_rounds,
            config.sampling_rate,
            config.round_steps,
            config.clip_norm,
            config.divisor,
            config.sums_share,
        )
        made = _Plan(self._key(), sums, training)
        self._save(made)
        return made

    def _key(self) -> str:
        config = self.config
        terms = (config.epsilon, config.delta, config.planned_rounds, config.sampling_rate, config.round_steps)
        return hashlib.sha256(msgspec.json.encode((*terms, config.clip_norm, config.divisor, config.sums_share))).hexdigest()

    def _load(self) -> _Plan | None:
        try:
            found = None if self._cache is None else msgspec.json.decode(self._cache.read_bytes(), type=_Plan)
        except (OSError, msgspec.MsgspecError):
            return None
        return found if found is not None and found.config_sha256 == self._key() else None

    def _save(self, made: _Plan) -> None:
        if self._cache is None:
            return
        try:
            write_whole(self._cache, msgspec.json.encode(made))
        except OSError as error:
            _logger.warning("the plan cannot be kept in %s (%s): it is made again at the next start", self._cache, error.strerror)
