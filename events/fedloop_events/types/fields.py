"""The kinds of value that events hold, each with its bounds."""

from __future__ import annotations

from typing import Annotated, Final

from msgspec import Meta, Struct

Identifier = Annotated[str, Meta(min_length=1, max_length=80, pattern=r"\A[A-Za-z0-9][A-Za-z0-9._-]*\Z")]
"""A name that is safe as a file name, a Kafka key and a part of a URI."""
IDENTIFIER_RULE: Final = "1 to 80 ASCII letters, digits, ., - or _, beginning with a letter or digit"
"""What an `Identifier` is, in words: whatever satisfies them is one."""


EventId = Annotated[str, Meta(min_length=32, max_length=32)]
"""A UUID as 32 lower-case hexadecimal digits."""


Sha256 = Annotated[str, Meta(min_length=64, max_length=64, pattern=r"\A[0-9a-f]{64}\Z")]


Count = Annotated[int, Meta(ge=0, le=2**53 - 1)]


Positive = Annotated[float, Meta(gt=0, le=1e12)]


Line = Annotated[str, Meta(max_length=200)]
"""One short sentence or name, never a user's words."""


Label = Annotated[str, Meta(min_length=1, max_length=100)]


Signal = Annotated[str, Meta(min_length=1, max_length=40, pattern=r"\A[a-z]+([_-][a-z]+)*\Z")]
"""A word of an application's, which is published as it is: no digit, so that no number of anybody's can stand in it."""
SIGNAL_RULE: Final = "1 to 40 lower-case ASCII letters, with single - or _ between them"


LatencyBin = Annotated[str, Meta(min_length=1, max_length=5, pattern=r"\A-?[0-9]+\Z")]
"""The decimal number of a bin of `sketch`."""


NodeId = Annotated[str, Meta(min_length=1, max_length=20, pattern=r"\A[0-9]+\Z")]
"""Flower's unsigned 64-bit node id, in decimal: JSON numbers end at 2^53."""


DEFAULT_MODEL: Final = "default"
"""The model that a deployment has, unless it names others."""
DEFAULT_USE_CASE: Final = "default"
"""What a device's feedback is about, unless its application says so."""
DEFAULT_RUN: Final = "main"
"""The run of rounds that a deployment has."""


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


MAX_PARTS: Final = 512
PartHashes = Annotated[list[Sha256], Meta(max_length=MAX_PARTS)]
"""The events before this one that list what does not fit into it, by the SHA-256 of their data (`fedloop_events.parts`)."""


Scalar = int | float | bool | str


Metric = int | float | list[int | float]


class Content(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A Flower `RecordDict`: each array record is one blob of tensors; metrics and configuration stand in the event."""

    arrays: dict[Line, BlobRef] = {}
    metrics: dict[Line, dict[Line, Metric]] = {}
    configs: dict[Line, dict[Line, Scalar | list[Scalar]]] = {}
