"""Topic `clients`: who takes part."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from fedloop_events import topics
from fedloop_events.types.fields import (
    Count,
    Identifier,
    Line,
    NodeId,
    Positive,
)
from fedloop_events.types.payload import Audience, ClientEvent, Payload


class DeploymentCreated(Payload, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The first event: the deployment's name and the server's public key (32 bytes, base64)."""

    topic = topics.CLIENTS
    type_name = "io.fedloop.deployment.created.v1"
    audience = Audience.EVERYONE

    public_key: Line

    @property
    def key(self) -> str:
        return self.origin


class ClientEnrolled(ClientEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """A device's public key (Ed25519, 32 bytes, base64) and the privacy budget of its whole life; signed by that key.

    The first enrolment under a `client_id` holds; a later one with another key is refused. `epsilon` None means that the device's
    owner allows rounds without differential privacy.
    """

    topic = topics.CLIENTS
    type_name = "io.fedloop.client.enrolled.v1"
    audience = Audience.SUBJECT

    public_key: Line
    node_id: NodeId
    epsilon: Positive | None
    delta: Annotated[float, Meta(gt=0, lt=1)]


class ClientRevoked(Payload, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """From here on no event of this client counts."""

    topic = topics.CLIENTS
    type_name = "io.fedloop.client.revoked.v1"
    audience = Audience.SUBJECT

    client_id: Identifier
    reason: Line

    @property
    def key(self) -> str:
        return self.client_id


class ClientSeen(ClientEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """The device is up. `examples_at_least` is a power of two (or 0), never the exact count; no epsilon covers it."""

    topic = topics.CLIENTS
    type_name = "io.fedloop.client.seen.v1"
    audience = Audience.SUBJECT

    examples_at_least: Count
    device: Literal["cpu", "cuda", "mps"] = "cpu"
