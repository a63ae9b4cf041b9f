"""Planning: what the task plans, found once. A round's terms are a function of the configuration: of public numbers alone."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict

import fedloop_tasks.updates as updates
import msgspec
from fedloop_events import envelope, types
from fedloop_events.blobs import tensors
from fedloop_events.errors import InvalidEventError, UsageError
from fedloop_events.files import write_private
from fedloop_events.folds.identities import Client
from fedloop_events.folds.releases import ReleasesView
from fedloop_events.folds.rounds import RoundsView
from fedloop_events.parts import PART_BYTES
from fedloop_events.types import DEFAULT_MODEL
from fedloop_tasks.table import program_of
from fedloop_tasks.task import Arrays, Terms
from msgspec import Struct

from fedloop_server.aggregation.merging import buffers
from fedloop_server.config import ServerConfig
from fedloop_server.rounds import scheduler

_logger = logging.getLogger(__name__)


class _Kept(Struct, frozen=True, forbid_unknown_fields=True):
    config_sha256: str
    mechanisms: dict[str, types.Mechanism]


class About(TypedDict):
    """What tells one round from the next."""

    origin: str
    epoch: int
    run_id: str
    round_id: str
    request_id: str
    number: int
    model: str
    base_release: str
    base: types.BlobRef


class Planner:
    """Finding the least noise takes seconds, so it is done when first asked, and kept in `cache` if that is given."""

    def __init__(self, config: ServerConfig, *, cache: Path | None = None) -> None:
        self.config = config
        self._cache = cache
        self._kept: _Kept | None = None

    def terms(self, program: str) -> Terms:
        """The terms of a round of this program. Raises `UsageError` if no noise keeps the configured budget."""
        if self._kept is None:
            self._kept = self._load() or self._make()
        return self.config.plan.terms(program, self._kept.mechanisms.get(program))

    def check(self, arrays: Arrays) -> None:
        """Raises `UsageError` if a round of the plan, over a release of these tensors, could not be opened or answered."""
        for program in self.config.plan.programs:
            upload = program_of(program).upload(list(arrays))
            opened = self._check_opening(program, upload)
            size_bytes = sum(spec.size_bytes for spec in updates.sent(program_of(program).specs(opened, arrays), opened))
            if size_bytes > self.config.max_upload_bytes:
                raise UsageError(
                    f"max_upload_bytes = {self.config.max_upload_bytes} is less than an update of this model",
                    hint=f"an update has {size_bytes} bytes of tensors: set max_upload_bytes to twice as much in server.toml",
                )
            release = program_of(program).largest(arrays)
            if len(next(tensors.encode(release))) > tensors.MAX_HEADER_BYTES:
                raise UsageError(
                    f"no file can hold a release of rounds of {program}, which has up to {len(release)} tensors",
                    hint="give the model fewer layers or targets that carry an adapter, or choose another strategy",
                )

    def opening(self, program: str, upload: list[str], cohort: Sequence[Client], about: About) -> types.RoundOpened:
        """The terms of a round of this program, by what is configured. Raises what `terms` raises."""
        config, terms = self.config, self.terms(program)
        buffered = config.buffer_size > 0 and buffers(program_of(terms.program))
        return types.RoundOpened(
            **about,
            strategy=terms.program,
            cohort=[each.client_id for each in cohort],
            quorum=config.quorum,
            deadline_s=config.deadline_s,
            upload=upload,
            max_upload_bytes=config.max_upload_bytes,
            max_update_norm=max(config.max_update_norm, terms.least_norm),
            mechanism=terms.mechanism,
            hyperparameters=terms.hyperparameters,
            enough=config.buffer_size if buffered else config.cohort_size if len(cohort) > config.cohort_size else None,
            grace_s=config.grace_s if config.grace_s < config.deadline_s else None,
            max_weight=scheduler.weight_bound(cohort) if terms.mechanism is None and cohort else None,
            max_staleness=config.max_staleness if buffered else 0,
        )

    def _check_opening(self, program: str, upload: list[str]) -> types.RoundOpened:
        """Of what stands in the event of a round, only its clients can stand in others (`parts`)."""
        about = About(
            origin="x" * 80,
            epoch=1,
            run_id="x" * 80,
            round_id="x" * 80,
            request_id="x" * 80,
            number=1,
            model=DEFAULT_MODEL,
            base_release="x" * 80,
            base=types.BlobRef("0" * 64, 1),
        )
        opened = self.opening(program, upload, [], about)
        if len(msgspec.json.encode(opened)) > envelope.MAX_EVENT_BYTES - PART_BYTES:
            raise UsageError(
                f"no event can hold the terms of a round of {program}, which names {len(upload)} tensors",
                hint="give the model fewer layers or targets that carry an adapter",
            )
        try:
            envelope.expect(envelope.encode(opened, id="0" * 32, time_s=0), types.RoundOpened)
        except InvalidEventError as error:
            raise UsageError(
                f"no event can hold the terms of a round of {program}", cause=str(error), hint="change what the cause names"
            ) from None
        return opened

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

    def keep_in(self, cache: Path) -> None:
        """Keep what was found so far in that file too."""
        self._cache = cache
        if self._kept is not None:
            self._save(self._kept)

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
            write_private(self._cache, msgspec.json.encode(made))
        except OSError as error:
            _logger.warning("the plan cannot be kept in %s (%s): it is made again at the next start", self._cache, error.strerror)
