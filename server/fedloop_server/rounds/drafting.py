"""The event that does an action: drawn, merged or measured here, decided by the server's loop."""

from __future__ import annotations

import math
import random
from typing import TypedDict

from fedloop_events import types
from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_events.blobs.tensors import Array
from fedloop_events.errors import BlobError, TensorError
from fedloop_events.signatures import SigningKey
from fedloop_tasks.table import program_of
from fedloop_tasks.task import Evaluate, Verdict
from msgspec.structs import replace

from fedloop_server.aggregation import releases
from fedloop_server.aggregation.merging import MergeError, merge
from fedloop_server.deciding import Draft
from fedloop_server.deployment import release_id
from fedloop_server.operations import registry
from fedloop_server.rounds import actions, scheduler, scores
from fedloop_server.rounds.planner import About, Planner
from fedloop_server.state import ServerState

Decides = (
    actions.RefuseLate
    | actions.RequestRound
    | actions.OpenRound
    | actions.AbortRound
    | actions.ProposeRelease
    | actions.EvaluateRelease
    | actions.JudgeRelease
    | actions.RejectRelease
)
"""The actions that are one decision."""


class _Run(TypedDict):
    """The fields that every event of the run has."""

    origin: str
    epoch: int
    run_id: str


class _Release(TypedDict):
    """The fields that every event about a release has."""

    origin: str
    model: str
    epoch: int
    release: str


class Drafting:
    """What a server of `epoch` would append for an action, as `state` is now. `source` decides who takes part, and `key` is the
    server's."""

    def __init__(
        self,
        state: ServerState,
        blobs: BlobStore,
        planner: Planner,
        evaluate: Evaluate,
        source: random.Random,
        *,
        key: SigningKey,
        model: str,
        epoch: int,
    ) -> None:
        self._state, self._blobs, self._planner, self._key = state, blobs, planner, key
        self._evaluate, self._source, self._model, self._epoch = evaluate, source, model, epoch

    def draft(self, action: Decides) -> Draft:
        match action:
            case actions.RefuseLate():
                return self._refused(action)
            case actions.RequestRound():
                return self._requested(action)
            case actions.OpenRound():
                return self._opened(action)
            case actions.AbortRound():
                return self._aborted(action)
            case actions.ProposeRelease():
                return self._proposed(action.round_id)
            case actions.EvaluateRelease():
                return self._evaluated(action.release)
            case actions.JudgeRelease():
                return self._judged(action)
            case actions.RejectRelease():
                return self._decided(action.release, action.verdict)

    def _refused(self, action: actions.RefuseLate) -> Draft:
        refused = types.UpdateRefused(
            **self._run(),
            client_id=action.client_id,
            update_id=action.update_id,
            round_id=action.round_id,
            reason="late",
            detail="the round had ended without it",
        )
        return self._of_run(refused, action.round_id, action.update_id, "refused")

    def _requested(self, action: actions.RequestRound) -> Draft:
        """The one event for this scheduled time, whichever server appends it."""
        origin, run_id = self._state.people.origin, self._state.rounds.run_id
        requested = types.RoundRequested(origin=origin, run_id=run_id, request_id=action.request_id, reason=action.reason)
        return Draft(requested, (origin, run_id, action.request_id, "requested"))

    def _aborted(self, action: actions.AbortRound) -> Draft:
        excluded = scheduler.bounded(action.excluded, scheduler.MAX_ABORT_BYTES)
        aborted = types.RoundAborted(
            **self._run(), round_id=action.round_id, reason=action.reason, detail=action.detail, excluded=excluded
        )
        return self._of_run(aborted, action.round_id, "aborted")

    def _opened(self, action: actions.OpenRound) -> Draft:
        """Draw the cohort, once: the event that records it decides."""
        config = self._planner.config
        current = registry.current(self._state.releases, self._model)
        size = max(config.asked - action.eligibility.at_work, 1)
        past = scheduler.past(self._state.rounds, len(action.eligibility.clients), config.asked, config.unasked_rounds)
        drawn = scheduler.draw(action.eligibility, size, self._source, past)
        upload = program_of(action.program).upload(list(self._arrays(current.blob)))
        about = About(
            **self._run(),
            round_id=actions.round_id(action.number),
            request_id=action.request_id,
            number=action.number,
            model=self._model,
            base_release=current.release,
            base=current.blob,
        )
        cohort = [self._state.people.clients[client_id] for client_id in drawn.clients]
        opened = replace(
            self._planner.opening(action.program, upload, cohort, about),
            excluded=scheduler.bounded(drawn.excluded, scheduler.MAX_OPENING_BYTES),
        )
        return self._of_run(opened, "round", action.number)

    def _proposed(self, round_id: str) -> Draft:
        """Merge what was accepted; blob first, then the event that names it."""
        state = self._state.rounds.rounds[round_id]
        opened, closed = state.opened, state.closed
        assert opened is not None
        assert closed is not None
        stale = self._state.rounds.stale(state)
        try:
            base = releases.get(self._blobs, opened.base)
            blob = releases.put(self._blobs, merge(self._blobs, opened, base, closed.accepted, stale))
        except (BlobError, TensorError, MergeError) as error:
            return self._aborted(actions.AbortRound(round_id, "unmergeable", type(error).__name__))
        number = self._state.releases.next_number(self._model)
        proposed = types.ReleaseProposed(
            **self._release(release_id(number, blob)),
            number=number,
            blob=blob,
            round_id=round_id,
            base_release=opened.base_release,
            strategy=opened.strategy,
            updates=[update.update_id for update in closed.accepted],
        )
        return self._of_release(proposed, proposed.release, "proposed")

    def _evaluated(self, release: str) -> Draft:
        """Measure; what the figure is made of first, then the event that names it."""
        state = self._state.releases.releases[release]
        found = self._evaluate(self._arrays(state.blob))
        kept = None
        if found.scores is not None:
            kept = scores.put(self._blobs, found.scores, key=self._key, release=release, dataset_sha256=found.dataset_sha256)
        evaluated = types.ReleaseEvaluated(
            **self._release(release),
            metrics={name: value if math.isfinite(value) else None for name, value in found.metrics.items()},
            leading=found.leading,
            examples=found.examples,
            dataset_sha256=found.dataset_sha256,
            higher_is_better=found.higher_is_better,
            scores=kept,
        )
        first = not state.evaluations
        return self._of_release(evaluated, release, f"evaluated{'' if first else found.dataset_sha256}")

    def _judged(self, action: actions.JudgeRelease) -> Draft:
        releases = self._state.releases
        candidate, incumbent = releases.releases[action.release], releases.releases[action.incumbent]
        assert candidate.evaluation is not None
        verdict = registry.task_of_model(releases, self._model).gate(
            scores.measured(self._blobs, candidate.evaluation),
            scores.measured(self._blobs, incumbent.evaluations[candidate.evaluation.dataset_sha256]),
            self._planner.config.gate_margin,
        )
        return self._decided(action.release, verdict)

    def _decided(self, release: str, verdict: Verdict) -> Draft:
        state = self._state.releases.releases[release]
        common = self._release(release)
        if verdict.reason:
            rejected = types.ReleaseRejected(**common, reason=verdict.reason, detail=verdict.detail)
            return self._of_release(rejected, release, "decided")
        published = types.ReleasePublished(**common, number=state.number, blob=state.blob)
        return self._of_release(published, release, "decided")

    def _run(self) -> _Run:
        return {"origin": self._state.people.origin, "epoch": self._epoch, "run_id": self._state.rounds.run_id}

    def _release(self, release: str) -> _Release:
        return {"origin": self._state.people.origin, "model": self._model, "epoch": self._epoch, "release": release}

    def _of_run(self, payload: types.ServerEvent, *what: str | int) -> Draft:
        return Draft(payload, (payload.origin, payload.run_id, *what))

    def _of_release(self, payload: types.ReleaseDecision, release: str, verb: str) -> Draft:
        return Draft(payload, (payload.origin, payload.model, release, verb))

    def _arrays(self, blob: types.BlobRef) -> dict[str, Array]:
        return tensors.decode(self._blobs.get(blob))
