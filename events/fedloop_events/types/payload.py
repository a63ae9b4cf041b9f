"""The base of all event types, and the register that everything else reads: codec, schemas, visibility.

A type states its topic, its name and its audience once, in its class; a class that lacks one of them is an error when it is
imported. An older version is an `Older` beside the type that it became.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import Enum
from typing import ClassVar, Final

from msgspec import Struct

from fedloop_events.types.fields import (
    BlobRef,
    Count,
    Identifier,
)


class Audience(Enum):
    """Which enrolled clients may see an event through a gateway. The server sees everything."""

    NOBODY = "nobody"
    SUBJECT = "subject"
    """The client that is the event's key: it is by that client, or about it."""
    NAMED = "named"
    """The clients in `Payload.named`."""
    COHORT = "cohort"
    """The cohort of the event's round, and the clients in `Payload.named`."""
    EVERYONE = "everyone"


class Payload(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True, gc=False):
    """Base of all event types. A class with a `type_name` is one of them, and is registered under that name."""

    topic: ClassVar[str]
    type_name: ClassVar[str]
    audience: ClassVar[Audience]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        if "type_name" in cls.__dict__:
            _register(cls, cls.type_name, "topic", "audience")
            CURRENT[cls.type_name] = cls

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

    @property
    def named(self) -> Iterable[str]:
        """The clients that the event names, as far as its audience rests on them."""
        return ()

    @property
    def kept_back(self) -> Iterable[BlobRef]:
        """The blobs among those it names that are the server's alone, whoever may see the event."""
        return ()


class ClientEvent(Payload, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
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


class ServerEvent(Payload, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of what a server decides within its epoch, about one run."""

    epoch: Count
    run_id: Identifier

    @property
    def key(self) -> str:
        return self.run_id


class ReleaseEvent(Payload, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of what the server decides about a model's releases."""

    model: Identifier

    @property
    def key(self) -> str:
        return self.model


class ReleaseDecision(ReleaseEvent, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of what a server decides within its epoch about a model's releases."""

    epoch: Count


class Older(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """Base of the older versions of event types. Events in the log are never rewritten: they are upcast when they are read."""

    type_name: ClassVar[str]
    becomes: ClassVar[type[Payload | Older]]
    """The next version; topic and audience are the newest one's."""

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()
        _register(cls, cls.__dict__.get("type_name", ""), "type_name", "becomes")
        OLDER[cls.type_name] = cls

    def upcast(self) -> Payload | Older:
        """The next version of the same event."""
        raise NotImplementedError


CURRENT: Final[dict[str, type[Payload]]] = {}
"""The newest version of every event type by its name, in the order of their definition."""
OLDER: Final[dict[str, type[Older]]] = {}
"""The older versions, by name."""


def newest(type_name: str) -> type[Payload] | None:
    """The newest version of the type that has this name, or once had it; None if this program does not know it."""
    found: type[Payload | Older] | None = CURRENT.get(type_name) or OLDER.get(type_name)
    while found is not None and issubclass(found, Older):
        found = found.becomes
    return found


def _register(cls: type, name: str, *stated: str) -> None:
    """Raises TypeError, which is an error of whoever defines a type."""
    for attribute in stated:
        if attribute not in cls.__dict__:
            raise TypeError(f"the event type {cls.__name__} does not state its {attribute}")
    if name in CURRENT or name in OLDER:
        raise TypeError(f"the event type {cls.__name__} takes the name {name}, which another one has")
