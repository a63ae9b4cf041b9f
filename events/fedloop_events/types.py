"""The event types: what each topic of the log can hold.

Every type is frozen, refuses unknown fields, and bounds what it holds. A type's name carries its version
(`io.fedloop.<noun>.<verb>.v<n>`); `envelope` decodes older versions through `upcast`. What a client says names the deployment
(`origin`), the client and the client's own dense sequence number `seq`, so that a signed event cannot be replayed elsewhere. What
the server says names its `epoch`: an event of an epoch that is not the latest one at its place in the log counts for nothing.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from msgspec import Meta, Struct

from fedloop_events import topics
from fedloop_events.masked import MaskedText

Identifier = Annotated[str, Meta(min_length=1, max_length=80, pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
"""A name that is safe as a file name, a Kafka key and a part of a URI."""
EventId = Annotated[str, Meta(min_length=32, max_length=32)]
"""A UUID as 32 lower-case hexadecimal digits."""
Sha256 = Annotated[str, Meta(min_length=64, max_length=64, pattern=r"\A[0-9a-f]{64}\Z")]
Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]
Positive = Annotated[float, Meta(gt=0, le=1e12)]
Line = Annotated[str, Meta(max_length=200)]
"""One short sentence or name, never a user's words."""
Label = Annotated[str, Meta(min_length=1, max_length=100)]
NodeId = Annotated[str, Meta(min_length=1, max_length=20, pattern=r"\A[0-9]+\Z")]
"""Flower's unsigned 64-bit node id, in decimal: JSON numbers end at 2^53."""


class BlobRef(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A content-addressed blob: the SHA-256 of its bytes, and how many there are."""

    sha256: Sha256
    size_bytes: Count


class Mechanism(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The terms of a Poisson-subsampled Gaussian mechanism, fixed by the round and never by a device's own counts.

    `sampling_rate` is the probability q that an example takes part in a step, `noise_multiplier` sigma in units of `clip_norm`
    (the L2 bound on one example's contribution), `divisor` what the noisy sum of a step is divided by. One Gaussian release of a
    sum is `sampling_rate=1, steps=1`.
    """

    sampling_rate: Annotated[float, Meta(gt=0, le=1)]
    noise_multiplier: Positive
    clip_norm: Positive
    steps: Annotated[int, Meta(ge=1, le=1_000_000)]
    divisor: Positive


Scalar = int | float | bool | str
Metric = int | float | list[int | float]


class Content(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A Flower `RecordDict`: each array record is one blob of tensors; metrics and configuration stand in the event."""

    arrays: dict[Line, BlobRef] = {}
    metrics: dict[Line, dict[Line, Metric]] = {}
    configs: dict[Line, dict[Line, Scalar | list[Scalar]]] = {}


class Payload(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """Base of all event types."""

    topic: ClassVar[str]
    type_name: ClassVar[str]

    origin: Identifier
    """The deployment: an event of another one is refused."""

    @property
    def key(self) -> str:
        """Order holds within one key of a topic, and nowhere else."""
        raise NotImplementedError

    @property
    def author(self) -> str:
        """Who signs it: a client id, or "server"."""
        return "server"


class ClientSaid(Payload, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of what a client signs."""

    client_id: Identifier
    seq: Count
    """The client's own number of this event, dense from 0."""

    @property
    def key(self) -> str:
        return self.client_id

    @property
    def author(self) -> str:
        return self.client_id


# --- clients ---------------------------------------------------------------------------------------------------------


class DeploymentCreated(Payload, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The first event: the deployment's name and the server's public key (32 bytes, base64)."""

    topic = topics.CLIENTS
    type_name = "io.fedloop.deployment.created.v1"

    public_key: Line

    @property
    def key(self) -> str:
        return self.origin


class ClientEnrolled(ClientSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A device's public key (Ed25519, 32 bytes, base64) and the privacy budget of its whole life; signed by that key.

    The first enrolment under a `client_id` holds; a later one with another key is refused. `epsilon` None means that the device's
    owner allows rounds without differential privacy.
    """

    topic = topics.CLIENTS
    type_name = "io.fedloop.client.enrolled.v1"

    public_key: Line
    node_id: NodeId
    epsilon: Positive | None
    delta: Annotated[float, Meta(gt=0, lt=1)]


class ClientRevoked(Payload, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """From here on nothing this client says counts."""

    topic = topics.CLIENTS
    type_name = "io.fedloop.client.revoked.v1"

    client_id: Identifier
    reason: Line

    @property
    def key(self) -> str:
        return self.client_id


class ClientSeen(ClientSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The device is up. `examples_at_least` is a power of two (or 0), never the exact count; no epsilon covers it."""

    topic = topics.CLIENTS
    type_name = "io.fedloop.client.seen.v1"

    examples_at_least: Count
    device: Literal["cpu", "cuda", "mps"] = "cpu"


# --- feedback --------------------------------------------------------------------------------------------------------


class FeedbackRecorded(ClientSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What a user said of one response, masked. Version 1 had `score` (-1, 0, 1) in place of `thumb`, and no `use_case`."""

    topic = topics.FEEDBACK
    type_name = "io.fedloop.feedback.recorded.v2"

    feedback_id: Identifier
    response_id: Identifier
    release: Identifier
    use_case: Identifier
    text: MaskedText
    predicted: Label
    thumb: Literal["up", "down"] | None = None
    rating: Annotated[int, Meta(ge=1, le=5)] | None = None
    label: Label | None = None
    correction: MaskedText | None = None
    comment: MaskedText | None = None


# --- rounds ----------------------------------------------------------------------------------------------------------


class ServerSaid(Payload, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of what a server decides within its epoch, about one run."""

    epoch: Count
    run_id: Identifier

    @property
    def key(self) -> str:
        return self.run_id


class EpochStarted(ServerSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A server process has taken over the run; every server of an earlier epoch is fenced."""

    topic = topics.ROUNDS
    type_name = "io.fedloop.epoch.started.v1"

    server_id: Identifier


class RoundRequested(Payload, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Somebody wants `rounds` rounds."""

    topic = topics.ROUNDS
    type_name = "io.fedloop.round.requested.v1"

    run_id: Identifier
    request_id: Identifier
    rounds: Annotated[int, Meta(ge=1, le=10_000)] = 1
    reason: Line = ""

    @property
    def key(self) -> str:
        return self.run_id


class Exclusion(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Why a client did not count: a stable code, and one sentence without any content."""

    client_id: Identifier
    reason: Identifier
    detail: Line = ""


class RoundOpened(ServerSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The terms of a round, before any device touches its data.

    `kind` "sums" asks for one noisy sum of embeddings per class, "train" for an adapter update. `upload` names the tensors that
    an update holds, with dtype and shape as in the base release. `mechanism` None is a round without differential privacy.
    """

    topic = topics.ROUNDS
    type_name = "io.fedloop.round.opened.v1"

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
    """Enrolled clients that the scheduler did not choose, and why."""


class NodesListed(ServerSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The nodes that a run saw at one step: an answer that a replay must give again."""

    topic = topics.ROUNDS
    type_name = "io.fedloop.nodes.listed.v1"

    step: Count
    node_ids: list[NodeId]
    round_id: Identifier | None = None


class InstructionSent(ServerSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """One message of a run to one client. Its event id is derived from (run, step), so that a replay sends nothing twice.

    `content_sha256` covers what the strategy decided: type, destination and content, without times and ids.
    """

    topic = topics.ROUNDS
    type_name = "io.fedloop.instruction.sent.v1"

    step: Count
    client_id: Identifier
    message_type: Line
    content: Content
    content_sha256: Sha256
    round_id: Identifier | None = None
    ttl_s: Positive = 43_200.0
    group_id: Line = ""


class UpdateRefused(ServerSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A reply that was not accepted, and why; nothing of its content."""

    topic = topics.ROUNDS
    type_name = "io.fedloop.update.refused.v1"

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


class RoundClosed(ServerSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Exactly the replies that count for one collecting step of a run, sorted by instruction; what comes later is late."""

    topic = topics.ROUNDS
    type_name = "io.fedloop.round.closed.v1"

    step: Count
    accepted: list[AcceptedUpdate]
    excluded: list[Exclusion] = []
    round_id: Identifier | None = None


class ResultRecorded(ServerSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What one step of a run computed, where computing it again could give something else: noise is drawn once."""

    topic = topics.ROUNDS
    type_name = "io.fedloop.result.recorded.v1"

    step: Count
    content: Content
    round_id: Identifier | None = None


class RoundAborted(ServerSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The round ended without a release, and why: fewer clients than its quorum is never a success."""

    topic = topics.ROUNDS
    type_name = "io.fedloop.round.aborted.v1"

    round_id: Identifier
    reason: Identifier
    detail: Line = ""
    excluded: list[Exclusion] = []


# --- updates ---------------------------------------------------------------------------------------------------------


class UpdateSubmitted(ClientSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A client's reply to one instruction, with the mechanism it ran and the ledger entry that pays for it."""

    topic = topics.UPDATES
    type_name = "io.fedloop.update.submitted.v1"

    run_id: Identifier
    instruction_id: EventId
    content: Content
    round_id: Identifier | None = None
    base_release: Identifier | None = None
    mechanism: Mechanism | None = None
    spend_seq: Count | None = None


class RoundDeclined(ClientSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A client will not, or cannot, answer one instruction: a stable code, never the text of an exception."""

    topic = topics.UPDATES
    type_name = "io.fedloop.round.declined.v1"

    run_id: Identifier
    instruction_id: EventId
    reason: Identifier
    detail: Line = ""
    round_id: Identifier | None = None


# --- releases --------------------------------------------------------------------------------------------------------


class ModelSpec(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A frozen base encoder, a LoRA adapter on its last layers, and a linear head over its sentence embedding."""

    base_model: Line
    """Name of an installed package that carries a model, or the name of a folder that every party configures."""
    base_sha256: Sha256
    """SHA-256 of the base model's safetensors file: every party checks its own copy."""
    labels: list[Label]
    rank: Annotated[int, Meta(ge=1, le=256)]
    alpha: Positive
    targets: list[Line]
    layers: Annotated[int, Meta(ge=1, le=1000)]
    """How many of the last layers carry an adapter."""
    max_tokens: Annotated[int, Meta(ge=1, le=100_000)] = 64


class ReleaseSaid(Payload, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of what the server decides about a model's releases."""

    model: Identifier

    @property
    def key(self) -> str:
        return self.model


class ModelRegistered(ReleaseSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the model is; its adapters are the releases."""

    topic = topics.RELEASES
    type_name = "io.fedloop.model.registered.v1"

    spec: ModelSpec


class ReleaseProposed(ReleaseSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A merged candidate and its lineage: the round, the base, and the updates that went in."""

    topic = topics.RELEASES
    type_name = "io.fedloop.release.proposed.v1"

    epoch: Count
    release: Identifier
    number: Count
    blob: BlobRef
    round_id: Identifier | None = None
    base_release: Identifier | None = None
    strategy: Identifier | None = None
    updates: list[EventId] = []


class ReleaseEvaluated(ReleaseSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A candidate's accuracy on the server's held-out set."""

    topic = topics.RELEASES
    type_name = "io.fedloop.release.evaluated.v1"

    epoch: Count
    release: Identifier
    accuracy: Annotated[float, Meta(ge=0, le=1)]
    examples: Count
    dataset_sha256: Sha256


class ReleasePublished(ReleaseSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The candidate has passed the gate: agents load it."""

    topic = topics.RELEASES
    type_name = "io.fedloop.release.published.v1"

    epoch: Count
    release: Identifier
    number: Count
    blob: BlobRef


class ReleaseRejected(ReleaseSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The candidate has not passed the gate, and why."""

    topic = topics.RELEASES
    type_name = "io.fedloop.release.rejected.v1"

    epoch: Count
    release: Identifier
    reason: Identifier
    detail: Line = ""


class ReleaseRolledBack(ReleaseSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An operator has put an earlier release in force again; no agent goes back without this event."""

    topic = topics.RELEASES
    type_name = "io.fedloop.release.rolled-back.v1"

    release: Identifier
    """The one in force from here on."""
    withdrawn: Identifier
    reason: Line


# --- audit -----------------------------------------------------------------------------------------------------------


class TextMasked(ClientSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How many spans of each type were masked in one piece of feedback; no epsilon covers these counts."""

    topic = topics.AUDIT
    type_name = "io.fedloop.text.masked.v1"

    feedback_id: Identifier
    counts: dict[Annotated[str, Meta(max_length=40)], Annotated[int, Meta(ge=1)]] = {}


class BudgetSpent(ClientSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the client is about to spend, recorded before it touches its data; it stays spent whatever happens.

    `spend_seq` is dense from 0 and `previous` is the SHA-256 of the previous spend's payload ("" for the first), so that a ledger
    rolled back or cloned is seen.
    """

    topic = topics.AUDIT
    type_name = "io.fedloop.budget.spent.v1"

    spend_seq: Count
    previous: Annotated[str, Meta(max_length=64)]
    run_id: Identifier
    instruction_id: EventId
    mechanism: Mechanism
    round_id: Identifier | None = None


class BudgetRefused(ClientSaid, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The client would not spend what a round asked for."""

    topic = topics.AUDIT
    type_name = "io.fedloop.budget.refused.v1"

    run_id: Identifier
    instruction_id: EventId
    reason: Identifier
    budget_epsilon: Positive | None = None
    would_be_epsilon: float | None = None
    round_id: Identifier | None = None


# --- quarantine ------------------------------------------------------------------------------------------------------


class EventQuarantined(Payload, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An event that counts for nothing: where it stands and why, never what it holds."""

    topic = topics.QUARANTINE
    type_name = "io.fedloop.event.quarantined.v1"

    source_topic: Line
    event_id: EventId
    reason: Identifier
    detail: Line = ""

    @property
    def key(self) -> str:
        return self.source_topic


TYPES: tuple[type[Payload], ...] = (
    DeploymentCreated,
    ClientEnrolled,
    ClientRevoked,
    ClientSeen,
    FeedbackRecorded,
    EpochStarted,
    RoundRequested,
    RoundOpened,
    NodesListed,
    InstructionSent,
    UpdateRefused,
    RoundClosed,
    ResultRecorded,
    RoundAborted,
    UpdateSubmitted,
    RoundDeclined,
    ModelRegistered,
    ReleaseProposed,
    ReleaseEvaluated,
    ReleasePublished,
    ReleaseRejected,
    ReleaseRolledBack,
    TextMasked,
    BudgetSpent,
    BudgetRefused,
    EventQuarantined,
)
