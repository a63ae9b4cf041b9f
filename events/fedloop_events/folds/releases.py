"""What the releases of a deployment are: a fold over the topic `releases`."""

from __future__ import annotations

import math
from typing import ClassVar, Literal, Self

import msgspec
from msgspec import Struct

from fedloop_events import topics, types
from fedloop_events.envelope import Record


class Evaluation(Struct, frozen=True):
    """Named metrics of one release on one held-out set, None for one that was not finite; `leading` names the one that decides.

    Raises ValueError for a metric that is not finite (NaN, above all), or if the leading one is not among them.
    """

    metrics: dict[str, float | None]
    leading: str
    examples: int
    dataset_sha256: str
    higher_is_better: bool = True
    """Of the leading metric."""
    scores: types.BlobRef | None = None
    """What the leading metric is made of, example by example; None where nothing recorded it."""

    def __post_init__(self) -> None:
        wrong = [name for name, value in self.metrics.items() if value is not None and not math.isfinite(value)]
        if wrong or self.leading not in self.metrics:
            raise ValueError(f"the metric {(wrong or [self.leading])[0]} has no value, or none that is finite")

    @property
    def score(self) -> float | None:
        """The leading metric's value."""
        return self.metrics[self.leading]


class ReleaseState(Struct):
    """One release, or a candidate for one. Times are the log's own, in ms."""

    release: str
    model: str
    number: int
    blob: types.BlobRef
    round_id: str | None = None
    base_release: str | None = None
    strategy: str | None = None
    updates: list[str] = []
    status: Literal["proposed", "published", "rejected"] = "proposed"
    reason: str = ""
    """Why it was rejected, or withdrawn."""
    withdrawn: bool = False
    """Published, and later rolled back."""
    evaluations: dict[str, Evaluation] = {}
    """By held-out set, oldest first; of two on one set the first holds."""
    proposed_ms: int = 0
    decided_ms: int = 0

    @property
    def evaluation(self) -> Evaluation | None:
        """The latest one."""
        return next(reversed(self.evaluations.values()), None)


class ReleasesView(Struct):
    """The models, their releases, and which release of each is in force.

    One round makes one release, and one decision holds for each.
    """

    topics: ClassVar[tuple[str, ...]] = (topics.RELEASES,)
    version: ClassVar[int] = 3

    models: dict[str, types.Spec] = {}
    releases: dict[str, ReleaseState] = {}
    by_round: dict[str, str] = {}
    """Release by round."""
    _candidates: dict[str, str] = {}
    _current: dict[str, str] = {}
    _numbers: dict[str, int] = {}

    def current(self, model: str) -> ReleaseState | None:
        """The release in force."""
        return self.releases.get(self._current.get(model, ""))

    def candidate(self, model: str) -> ReleaseState | None:
        """The release that is proposed and not decided."""
        return self.releases.get(self._candidates.get(model, ""))

    def next_number(self, model: str) -> int:
        return self._numbers.get(model, -1) + 1

    def comes_from(self, release: str, ancestor: str) -> bool:
        """Whether a release is `ancestor`, or was made of what was made of it; both must be known."""
        state, least = self.releases[release], self.releases[ancestor].number
        while (
            state.number > least
            and (base := self.releases.get(state.base_release or "")) is not None
            and base.number < state.number
        ):
            state = base
        return state.release == ancestor

    def apply(self, record: Record, payload: types.Payload) -> None:
        if not isinstance(payload, types.ReleaseEvent):
            return
        if isinstance(payload, types.ModelRegistered):
            self.models.setdefault(payload.model, payload.spec)
        elif isinstance(payload, types.ReleaseRolledBack):
            self._rolled_back(payload)
        else:
            self._decided(record, payload)

    def _decided(self, record: Record, payload: types.ReleaseEvent) -> None:
        if isinstance(payload, types.ReleaseProposed):
            self._proposed(record, payload)
            return
        state = self.releases.get(getattr(payload, "release", ""))
        if state is None or state.model != payload.model:
            return
        if isinstance(payload, types.ReleaseEvaluated):
            if payload.leading in payload.metrics:
                evaluated = Evaluation(
                    payload.metrics,
                    payload.leading,
                    payload.examples,
                    payload.dataset_sha256,
                    payload.higher_is_better,
                    payload.scores,
                )
                state.evaluations.setdefault(payload.dataset_sha256, evaluated)
        elif state.status == "proposed":
            if isinstance(payload, types.ReleasePublished) and payload.blob == state.blob:
                state.status = "published"
                self._current[payload.model] = state.release
            elif isinstance(payload, types.ReleaseRejected):
                state.status, state.reason = "rejected", payload.reason
            else:
                return
            state.decided_ms = record.appended_ms
            self._candidates.pop(payload.model, None)

    def _proposed(self, record: Record, proposed: types.ReleaseProposed) -> None:
        second = proposed.round_id is not None and proposed.round_id in self.by_round
        if second or proposed.release in self.releases or proposed.number != self.next_number(proposed.model):
            return
        self.releases[proposed.release] = ReleaseState(
            proposed.release,
            proposed.model,
            proposed.number,
            proposed.blob,
            proposed.round_id,
            proposed.base_release,
            proposed.strategy,
            list(proposed.updates),
            proposed_ms=record.appended_ms,
        )
        self._candidates[proposed.model] = proposed.release
        self._numbers[proposed.model] = proposed.number
        if proposed.round_id is not None:
            self.by_round[proposed.round_id] = proposed.release

    def _rolled_back(self, payload: types.ReleaseRolledBack) -> None:
        # Compare and set: an operator who has not seen the latest release withdraws nothing.
        target, current = self.releases.get(payload.release), self.current(payload.model)
        if target is None or current is None or target.model != payload.model or current.release != payload.withdrawn:
            return
        if target.status == "published" and target is not current:
            current.withdrawn, current.reason = True, payload.reason
            target.withdrawn, target.reason = False, ""
            self._current[payload.model] = target.release

    def to_state(self) -> bytes:
        return msgspec.msgpack.encode(self)

    @classmethod
    def from_state(cls, state: bytes) -> Self:
        return msgspec.msgpack.decode(state, type=cls)
