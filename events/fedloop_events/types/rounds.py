"""Topic `rounds`: what a server decides about one run, and what is asked of it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

from fedloop_events import topics
from fedloop_events.types.fields import (
    BlobRef,
    Content,
    Count,
    EventId,
    Identifier,
    Line,
    Mechanism,
    NodeId,
    PartHashes,
    Positive,
    Sha256,
)
from fedloop_events.types.payload import Audience, Older, Payload, ServerEvent


class EpochStarted(ServerEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A server process has taken over the run; every server of an earlier epoch is fenced."""

    topic = topics.ROUNDS
    type_name = "io.fedloop.epoch.started.v1"
    audience = Audience.EVERYONE

    server_id: Identifier


class RoundRequested(Payload, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Somebody wants `rounds` rounds."""

    topic = topics.ROUNDS
    type_name = "io.fedloop.round.requested.v1"
    audience = Audience.EVERYONE

    run_id: Identifier
    request_id: Identifier
    rounds: Annotated[int, Meta(ge=1, le=10_000)] = 1
    reason: Line = ""

    @property
    def key(self) -> str:
        return self.run_id


class RoundRequestWithdrawn(Payload, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Whoever asked for rounds no longer wants those that have not been opened."""

    topic = topics.ROUNDS
    type_name = "io.fedloop.round.request.withdrawn.v1"
    audience = Audience.EVERYONE

    run_id: Identifier
    request_id: Identifier
    reason: Line = ""

    @property
    def key(self) -> str:
        return self.run_id


class RoundAbortRequested(Payload, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The operator wants a round to end without a release: the server aborts it, unless a release is proposed by then."""

    topic = topics.ROUNDS
    type_name = "io.fedloop.round.abort.requested.v1"
    audience = Audience.NOBODY

    run_id: Identifier
    round_id: Identifier
    reason: Line = ""

    @property
    def key(self) -> str:
        return self.run_id


class Exclusion(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Why a client did not count: a stable code, and one sentence without any content."""

    client_id: Identifier
    reason: Identifier
    detail: Line = ""


class CohortListed(ServerEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A part of a `RoundOpened` that comes after it and names it: more of the cohort, or of those who were not chosen."""

    topic = topics.ROUNDS
    type_name = "io.fedloop.cohort.listed.v1"
    audience = Audience.NAMED

    round_id: Identifier
    cohort: list[Identifier] = []
    excluded: list[Exclusion] = []

    @property
    def named(self) -> Iterable[str]:
        return self.cohort


class RoundOpened(ServerEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The terms of a round, before any device touches its data.

    `strategy` is the name of the program that the round runs, `upload` names the tensors of an update. `mechanism` None is a
    round without differential privacy.

    The round ends when every instruction is settled, when `enough` updates are accepted (None: all of the cohort), `grace_s`
    after the quorum is reached, or as long as that took if it took longer (None: no sooner for that), or after `deadline_s`. No
    update weighs more than `max_weight`.

    Whoever has not answered a buffered round when it ends, and is still in time, is at work: its update counts in one of the
    next `max_staleness` rounds, with less weight (Nguyen et al. 2022, arXiv 2106.06639). 0 is a round that is not buffered.
    """

    topic = topics.ROUNDS
    type_name = "io.fedloop.round.opened.v3"
    audience = Audience.COHORT

    round_id: Identifier
    request_id: Identifier
    number: Annotated[int, Meta(ge=1)]
    model: Identifier
    base_release: Identifier
    base: BlobRef
    strategy: Identifier
    cohort: list[Identifier]
    quorum: Annotated[int, Meta(ge=1)]
    deadline_s: Positive
    upload: list[Line]
    max_upload_bytes: Count
    max_update_norm: Positive
    mechanism: Mechanism | None = None
    hyperparameters: dict[Line, float] = {}
    excluded: list[Exclusion] = []
    """Enrolled clients that the scheduler did not choose, and why."""
    parts: PartHashes = []
    enough: Annotated[int, Meta(ge=1)] | None = None
    grace_s: Positive | None = None
    max_weight: Positive | None = None
    max_staleness: Count = 0

    @property
    def named(self) -> Iterable[str]:
        return self.cohort


class RoundOpenedV2(Older, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Before 3: a round waited for its whole cohort, or for its deadline."""

    type_name = "io.fedloop.round.opened.v2"
    becomes = RoundOpened

    origin: Identifier
    epoch: Count
    run_id: Identifier
    round_id: Identifier
    request_id: Identifier
    number: Annotated[int, Meta(ge=1)]
    model: Identifier
    base_release: Identifier
    base: BlobRef
    strategy: Identifier
    cohort: list[Identifier]
    quorum: Annotated[int, Meta(ge=1)]
    deadline_s: Positive
    upload: list[Line]
    max_upload_bytes: Count
    max_update_norm: Positive
    mechanism: Mechanism | None = None
    hyperparameters: dict[Line, float] = {}
    excluded: list[Exclusion] = []
    parts: PartHashes = []

    def upcast(self) -> RoundOpened:
        return RoundOpened(**{name: getattr(self, name) for name in self.__struct_fields__})


class RoundOpenedV1(Older, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Before 2: `kind` "sums" or "train" beside `strategy`, which says the same."""

    type_name = "io.fedloop.round.opened.v1"
    becomes = RoundOpenedV2

    origin: Identifier
    epoch: Count
    run_id: Identifier
    round_id: Identifier
    request_id: Identifier
    number: Annotated[int, Meta(ge=1)]
    model: Identifier
    base_release: Identifier
    base: BlobRef
    kind: Literal["sums", "train"]
    strategy: Identifier
    cohort: list[Identifier]
    quorum: Annotated[int, Meta(ge=1)]
    deadline_s: Positive
    upload: list[Line]
    max_upload_bytes: Count
    max_update_norm: Positive
    mechanism: Mechanism | None = None
    hyperparameters: dict[Line, float] = {}
    excluded: list[Exclusion] = []

    def upcast(self) -> RoundOpenedV2:
        return RoundOpenedV2(**{name: getattr(self, name) for name in self.__struct_fields__ if name != "kind"})


class NodesListed(ServerEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The nodes that a run saw at one step: an answer that a replay must give again."""

    topic = topics.ROUNDS
    type_name = "io.fedloop.nodes.listed.v1"
    audience = Audience.NOBODY

    step: Count
    node_ids: list[NodeId]
    round_id: Identifier | None = None


class InstructionSent(ServerEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One message of a run to one client. Its event id is derived from (run, step), so that a replay sends nothing twice.

    `content_sha256` covers what the strategy decided: type, destination and content, without times and ids.
    """

    topic = topics.ROUNDS
    type_name = "io.fedloop.instruction.sent.v1"
    audience = Audience.NAMED

    step: Count
    client_id: Identifier
    message_type: Line
    content: Content
    content_sha256: Sha256
    round_id: Identifier | None = None
    ttl_s: Positive = 43_200.0
    group_id: Line = ""

    @property
    def named(self) -> Iterable[str]:
        return (self.client_id,)


class UpdateRefused(ServerEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A reply that was not accepted, and why; nothing of its content."""

    topic = topics.ROUNDS
    type_name = "io.fedloop.update.refused.v1"
    audience = Audience.NOBODY

    client_id: Identifier
    update_id: EventId
    reason: Identifier
    detail: Line = ""
    round_id: Identifier | None = None


class AcceptedUpdate(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One reply that counts: the event, the instruction it answers, its tensors, and its weight in the merge."""

    client_id: Identifier
    update_id: EventId
    instruction_id: EventId
    blob: BlobRef | None = None
    weight: Positive = 1.0


class RepliesListed(ServerEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A part of a `StepCollected` that comes after it and names it: more of the replies that count, or of who was excluded."""

    topic = topics.ROUNDS
    type_name = "io.fedloop.replies.listed.v1"
    audience = Audience.NAMED

    step: Count
    accepted: list[AcceptedUpdate] = []
    excluded: list[Exclusion] = []
    round_id: Identifier | None = None

    @property
    def named(self) -> Iterable[str]:
        return [*(each.client_id for each in self.accepted), *(each.client_id for each in self.excluded)]


class StepCollected(ServerEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Exactly the replies that count for one collecting step of a run, sorted by instruction, and who was excluded; what comes
    later is late. A round may have several."""

    topic = topics.ROUNDS
    type_name = "io.fedloop.step.collected.v1"
    audience = Audience.COHORT

    step: Count
    accepted: list[AcceptedUpdate]
    excluded: list[Exclusion] = []
    round_id: Identifier | None = None
    parts: PartHashes = []

    @property
    def named(self) -> Iterable[str]:
        return [*(each.client_id for each in self.accepted), *(each.client_id for each in self.excluded)]


AT_WORK: Final = "at-work"
"""Why a client is not among those of a buffered round: its update is still to come."""


class RoundClosed(StepCollected, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The collecting step with which a round ends: what it accepted is what the round makes a release of.

    In a buffered round that may be answers to the instructions of earlier rounds too, which come after its own. Who is excluded
    as `AT_WORK` may still answer.
    """

    topic = topics.ROUNDS
    type_name = "io.fedloop.round.closed.v2"
    audience = Audience.COHORT


class RoundClosedV1(Older, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Before 2: every collecting step; that of a round, which had one, closed it."""

    type_name = "io.fedloop.round.closed.v1"
    becomes = StepCollected  # as a `RoundClosed` is one

    origin: Identifier
    epoch: Count
    run_id: Identifier
    step: Count
    accepted: list[AcceptedUpdate]
    excluded: list[Exclusion] = []
    round_id: Identifier | None = None

    def upcast(self) -> StepCollected:
        newer = StepCollected if self.round_id is None else RoundClosed
        return newer(self.origin, self.epoch, self.run_id, self.step, self.accepted, self.excluded, self.round_id)


class ResultRecorded(ServerEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one step of a run computed, where computing it again could give something else: noise is drawn once."""

    topic = topics.ROUNDS
    type_name = "io.fedloop.result.recorded.v1"
    audience = Audience.NOBODY

    step: Count
    content: Content
    round_id: Identifier | None = None


class RoundAborted(ServerEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The round ended without a release, and why: fewer clients than its quorum is never a success."""

    topic = topics.ROUNDS
    type_name = "io.fedloop.round.aborted.v1"
    audience = Audience.COHORT

    round_id: Identifier
    reason: Identifier
    detail: Line = ""
    excluded: list[Exclusion] = []

    @property
    def named(self) -> Iterable[str]:
        return [each.client_id for each in self.excluded]
