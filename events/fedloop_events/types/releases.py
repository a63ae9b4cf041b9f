"""Topic `releases`: models, candidates, and which release is in force."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta, Struct

from fedloop_events import topics
from fedloop_events.types.fields import (
    BlobRef,
    Count,
    EventId,
    Identifier,
    Label,
    Line,
    Positive,
    Sha256,
)
from fedloop_events.types.payload import Audience, ReleaseDecision, ReleaseEvent


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


class ModelRegistered(ReleaseEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the model is; its adapters are the releases."""

    topic = topics.RELEASES
    type_name = "io.fedloop.model.registered.v1"
    audience = Audience.EVERYONE

    spec: ModelSpec


class ReleaseProposed(ReleaseDecision, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A merged candidate and its lineage: the round, the base, and the updates that went in."""

    topic = topics.RELEASES
    type_name = "io.fedloop.release.proposed.v1"
    audience = Audience.EVERYONE

    release: Identifier
    number: Count
    blob: BlobRef
    round_id: Identifier | None = None
    base_release: Identifier | None = None
    strategy: Identifier | None = None
    updates: list[EventId] = []


class ReleaseEvaluated(ReleaseDecision, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A candidate's accuracy on the server's held-out set."""

    topic = topics.RELEASES
    type_name = "io.fedloop.release.evaluated.v1"
    audience = Audience.EVERYONE

    release: Identifier
    accuracy: Annotated[float, Meta(ge=0, le=1)]
    examples: Count
    dataset_sha256: Sha256


class ReleasePublished(ReleaseDecision, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The candidate has passed the gate: agents load it."""

    topic = topics.RELEASES
    type_name = "io.fedloop.release.published.v1"
    audience = Audience.EVERYONE

    release: Identifier
    number: Count
    blob: BlobRef


class ReleaseRejected(ReleaseDecision, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The candidate has not passed the gate, and why."""

    topic = topics.RELEASES
    type_name = "io.fedloop.release.rejected.v1"
    audience = Audience.EVERYONE

    release: Identifier
    reason: Identifier
    detail: Line = ""


class ReleaseRolledBack(ReleaseEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """An operator has put an earlier release in force again; no agent goes back without this event."""

    topic = topics.RELEASES
    type_name = "io.fedloop.release.rolled-back.v1"
    audience = Audience.EVERYONE

    release: Identifier
    """The one in force from here on."""
    withdrawn: Identifier
    reason: Line
