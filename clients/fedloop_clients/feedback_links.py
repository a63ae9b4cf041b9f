"""Links by which somebody who has no key can give feedback on one response, until they expire.

A link's token is the response's id and the time it expires at, with an HMAC-SHA256 (RFC 2104) under a key derived from the
device's: it can be read by everybody, and made by the device alone. It holds nothing of what was asked or answered.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
from collections.abc import Callable
from contextlib import suppress
from typing import Final

import msgspec
from fedloop_events.errors import PolicyError, UsageError
from msgspec import Struct

from fedloop_clients.feedback import UnknownResponseError
from fedloop_clients.interactions import Interactions
from fedloop_clients.store import Store
from fedloop_clients.store_file import NotWritableError

PATH: Final = "/f/"
"""What stands in a link between the sidecar's address and the token."""
DEFAULT_TTL_S: Final = 7 * 86_400.0
LONGEST_TTL_S: Final = 90 * 86_400.0
_MOST_CHARS: Final = 300
_SERVED_AT: Final = "sidecar"
"""Name of the sidecar's address in the store."""


class ForgedLinkError(PolicyError):
    """This device has not made that link."""


class ExpiredLinkError(PolicyError):
    """The time in which the link could be used is over."""


class Link(Struct, frozen=True, array_like=True):
    """What a link is about. `expires_s` is in seconds of Unix time."""

    response_id: str
    expires_s: int


class FeedbackLinks:
    """The links of one device; `secret` is their key, `clock` gives Unix time in seconds."""

    def __init__(self, store: Store, secret: bytes, clock: Callable[[], float]) -> None:
        self._store, self._secret, self._clock = store, secret, clock

    def serve_at(self, address: str) -> None:
        """Keep where this device's sidecar listens: links lead there. On a full disk they lead where it listened before."""
        with suppress(NotWritableError):
            self._store.keep(_SERVED_AT, address.encode())

    def url(self, response_id: str, ttl_s: float) -> str:
        """See `Agent.feedback_url`."""
        if not 1 <= ttl_s <= LONGEST_TTL_S:
            raise UsageError(f"ttl is {ttl_s:g} seconds; a link holds for 1 to {LONGEST_TTL_S:,.0f}")
        if not Interactions(self._store).knows("response", response_id):
            raise UnknownResponseError(
                "no response of this device has this response_id", hint="use the id that came with the answer"
            )
        address = self._store.kept(_SERVED_AT)
        if address is None:
            raise UsageError("no sidecar has served this device yet: links lead to it", hint="start `fedloop agent serve`")
        return f"{address.decode()}{PATH}{token(Link(response_id, int(self._clock() + ttl_s)), self._secret)}"

    def link(self, given: str) -> Link:
        """The link of a token. Raises `ForgedLinkError`, `ExpiredLinkError`."""
        return link_of(given, self._secret, self._clock())


def token(link: Link, secret: bytes) -> str:
    """The link's token, in letters that a URL takes."""
    data = _written(msgspec.json.encode(link))
    return f"{data}.{_written(_mac(data, secret))}"


def link_of(given: str, secret: bytes, now_s: float) -> Link:
    """The link of a token. Raises `ForgedLinkError`, `ExpiredLinkError`."""
    data, _, mac = given.partition(".")
    if len(given) > _MOST_CHARS or not hmac.compare_digest(_written(_mac(data, secret)).encode(), mac.encode()):
        raise ForgedLinkError("this link was not made by this device")
    link = msgspec.json.decode(base64.urlsafe_b64decode(data + "=" * (-len(data) % 4)), type=Link)
    if now_s >= link.expires_s:
        raise ExpiredLinkError("this link has expired")
    return link


def feedback_id_of(given: str) -> str:
    """The id of the one piece of feedback that a link takes."""
    return f"link-{hashlib.sha256(given.encode()).hexdigest()[:32]}"


def _mac(data: str, secret: bytes) -> bytes:
    return hmac.digest(secret, data.encode(), "sha256")


def _written(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).decode().rstrip("=")
