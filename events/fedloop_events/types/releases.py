"""Topic `releases`: models, candidates, and which release is in force."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from fedloop_events import topics
from fedloop_events.types.fields import (
    BlobRef,
    Count,
    EventId,
    Identifier,
    Label,
    Line,
    PartHashes,
    Positive,
    Sha256,
)
from fedloop_events.types.payload import Audience, Older, ReleaseDecision, ReleaseEvent


class ClassificationSpec(
    Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="task", tag="classification"
):
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


class CausalSpec(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, tag_field="task", tag="chat"):
    """A frozen causal language model, and a LoRA adapter on its last layers, which learns from what users make of its answers."""

    base_model: Line
    """Name of an installed package that carries a model, or the name of a folder that every party configures."""
    files: Annotated[dict[Identifier, Sha256], Meta(max_length=20)]
    """SHA-256 of each file that the base model is made of, its tokenizer and chat template among them: every party checks its own
    copies."""
    rank: Annotated[int, Meta(ge=1, le=256)]
    alpha: Positive
    targets: list[Line]
    layers: Annotated[int, Meta(ge=1, le=1000)]
    """How many of the last layers carry an adapter."""
    max_tokens: Annotated[int, Meta(ge=2, le=100_000)] = 512
    """Of a prompt and its answer in training."""
    max_answer_tokens: Annotated[int, Meta(ge=1, le=100_000)] = 128
    """Of an answer that is given, its end included."""
    learns: Literal["feedback", "sft", "kto", "dpo"] = "feedback"
    """From what: better answers (supervised fine-tuning, `sft`), single judgements (`kto`), preferences between two answers
    (`dpo`), or, of each response, what there is of these (`feedback`)."""
    activated: bool = True
    """Whether the adapters act only from where the assistant's turn begins on (activated LoRA), and not on what is before it."""


Spec = ClassificationSpec | CausalSpec
"""What a model is, by the task that it learns: a union by the tag `task`."""


class ModelRegistered(ReleaseEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the model is; its adapters are the releases. Labels that do not fit into the event stand in its parts."""

    topic = topics.RELEASES
    type_name = "io.fedloop.model.registered.v3"
    audience = Audience.EVERYONE

    spec: Spec
    parts: PartHashes = []


class LabelsListed(ReleaseEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A part of a `ModelRegistered` that comes after it and names it: more of the labels, in their order."""

    topic = topics.RELEASES
    type_name = "io.fedloop.labels.listed.v1"
    audience = Audience.EVERYONE

    labels: list[Label]


class ModelRegisteredV2(Older, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Before 3: every label stood in the event itself."""

    type_name = "io.fedloop.model.registered.v2"
    becomes = ModelRegistered

    origin: Identifier
    model: Identifier
    spec: ClassificationSpec

    def upcast(self) -> ModelRegistered:
        return ModelRegistered(origin=self.origin, model=self.model, spec=self.spec)


class ClassificationSpecV1(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A `ClassificationSpec` without its tag, which needs none where there is one task."""

    base_model: Line
    base_sha256: Sha256
    labels: list[Label]
    rank: Annotated[int, Meta(ge=1, le=256)]
    alpha: Positive
    targets: list[Line]
    layers: Annotated[int, Meta(ge=1, le=1000)]
    max_tokens: Annotated[int, Meta(ge=1, le=100_000)] = 64


class ModelRegisteredV1(Older, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Before 2: every model was a classifier."""

    type_name = "io.fedloop.model.registered.v1"
    becomes = ModelRegisteredV2

    origin: Identifier
    model: Identifier
    spec: ClassificationSpecV1

    def upcast(self) -> ModelRegisteredV2:
        spec = ClassificationSpec(**msgspec.structs.asdict(self.spec))
        return ModelRegisteredV2(origin=self.origin, model=self.model, spec=spec)


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
    """What a release is worth on the server's held-out set, in the metrics of its task; `leading` names the one that decides."""

    topic = topics.RELEASES
    type_name = "io.fedloop.release.evaluated.v3"
    audience = Audience.EVERYONE

    release: Identifier
    metrics: Annotated[dict[Identifier, float | None], Meta(max_length=100)]
    """None where the value is not a finite number."""
    leading: Identifier
    examples: Count
    dataset_sha256: Sha256
    higher_is_better: bool = True
    """Of the leading metric."""
    scores: BlobRef | None = None
    """What the leading metric is made of, example by example. The server's alone."""

    @property
    def kept_back(self) -> Iterable[BlobRef]:
        return () if self.scores is None else (self.scores,)


class ReleaseEvaluatedV2(Older, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Before 3: every metric was finite and better when higher, and nothing said what it was made of."""

    type_name = "io.fedloop.release.evaluated.v2"
    becomes = ReleaseEvaluated

    origin: Identifier
    model: Identifier
    epoch: Count
    release: Identifier
    metrics: Annotated[dict[Identifier, float], Meta(max_length=100)]
    leading: Identifier
    examples: Count
    dataset_sha256: Sha256

    def upcast(self) -> ReleaseEvaluated:
        return ReleaseEvaluated(
            origin=self.origin,
            model=self.model,
            epoch=self.epoch,
            release=self.release,
            metrics=dict(self.metrics),
            leading=self.leading,
            examples=self.examples,
            dataset_sha256=self.dataset_sha256,
        )


class ReleaseEvaluatedV1(Older, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Before 2: `accuracy` alone."""

    type_name = "io.fedloop.release.evaluated.v1"
    becomes = ReleaseEvaluatedV2

    origin: Identifier
    model: Identifier
    epoch: Count
    release: Identifier
    accuracy: Annotated[float, Meta(ge=0, le=1)]
    examples: Count
    dataset_sha256: Sha256

    def upcast(self) -> ReleaseEvaluatedV2:
        return ReleaseEvaluatedV2(
            origin=self.origin,
            model=self.model,
            epoch=self.epoch,
            release=self.release,
            metrics={"accuracy": self.accuracy},
            leading="accuracy",
            examples=self.examples,
            dataset_sha256=self.dataset_sha256,
        )


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
