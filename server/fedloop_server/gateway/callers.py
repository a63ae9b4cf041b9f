"""Who is calling: each request's signature, its time, and that it comes once."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from fedloop_events import signatures
from fedloop_events.errors import SignatureError
from fedloop_events.logs.http import signing
from fedloop_events.logs.http.signing import Claim
from msgspec import Struct
from starlette.requests import Request

from fedloop_server.gateway.connections import shared_address
from fedloop_server.gateway.feed import Feed
from fedloop_server.gateway.limits import Buckets, Limits, Nonces
from fedloop_server.gateway.problems import Problem

_ONCE: Final = frozenset({b"host", b"content-digest", b"signature-input", b"signature", b"content-type", b"content-length"})


class Caller(Struct, frozen=True):
    """Who signed a request."""

    name: str
    content_sha256: bytes

    @property
    def is_server(self) -> bool:
        return self.name == signing.SERVER

    @property
    def sees_as(self) -> str | None:
        """For the feed: None sees all."""
        return None if self.is_server else self.name


class Callers:
    """Tells who signs; `clock` gives seconds since 1970. Nothing of a body is read here."""

    def __init__(self, feed: Feed, limits: Limits, *, clock: Callable[[], float] = time.time) -> None:
        self._feed, self._limits, self.clock = feed, limits, clock
        self._nonces = Nonces(limits.nonces, limits.all_nonces)
        self._rate = Buckets(limits.requests_per_s, limits.burst)
        self._strangers = Buckets(limits.strangers_per_s, limits.strangers_burst)

    def headers(self, request: Request) -> dict[str, str]:
        """The header lines that matter, each of which may come once. Raises `Problem`."""
        scope = request.scope
        if len(scope["raw_path"]) + len(scope["query_string"]) > self._limits.target_bytes:
            raise Problem("uri-too-long", f"path and query are longer than {self._limits.target_bytes:,} bytes")
        found: dict[bytes, bytes] = {}
        size = 0
        for name, value in scope["headers"]:
            size += len(name) + len(value) + 4
            if name in _ONCE:
                if name in found:
                    raise Problem("malformed", "a header line that must come once comes twice")
                found[name] = value
        if size > self._limits.header_bytes:
            raise Problem("headers", f"the header is longer than {self._limits.header_bytes:,} bytes")
        return {name.decode(): value.decode("latin-1").strip() for name, value in found.items()}

    def claim(self, request: Request, headers: dict[str, str]) -> Claim:
        """What the request claims of itself. Raises `Problem`."""
        scope = request.scope
        authority = headers.get("host", "").lower()
        default = ":443" if scope["scheme"] == "https" else ":80"
        try:
            claim = signing.parse(
                scope["method"],
                authority.removesuffix(default),
                scope["raw_path"].decode("ascii", "replace"),
                scope["query_string"].decode("ascii", "replace"),
                headers,
            )
        except SignatureError as error:
            raise Problem("unsigned", error.message) from None
        now = self.clock()
        if claim.created > now + self._limits.skew_s or claim.expires < now:
            raise Problem("clock", "by this gateway's clock the signature has expired, or is not valid yet")
        if not 0 < claim.expires - claim.created <= self._limits.valid_s:
            raise Problem("clock", f"a signature may be valid for {self._limits.valid_s:g} seconds at most")
        return claim

    async def known(self, request: Request, claim: Claim) -> Caller:
        """The enrolled client, or the server, that signed this request. Raises `Problem`."""
        key = self._key(claim.keyid)
        if key is None:
            self.stranger(request)
            await self._feed.sync()  # it may just have been enrolled
            key = self._key(claim.keyid)
            if key is None:
                raise Problem("unknown-client", "no client of this name is enrolled")
        self.verify(claim, key)
        if self.is_revoked(claim.keyid):
            raise Problem("revoked", "this client has been revoked")
        return Caller(claim.keyid, claim.content_sha256)

    def is_known(self, keyid: str) -> bool:
        return keyid == signing.SERVER or keyid in self._feed.identities.clients

    def is_revoked(self, name: str) -> bool:
        client = self._feed.identities.clients.get(name)
        return client is not None and client.revoked

    def stranger(self, request: Request) -> None:
        """Count a request of somebody who is not enrolled, by address. Raises `Problem`."""
        address = shared_address(request.client.host) if request.client else ""
        if wait_s := self._strangers.take(address, self.clock()):
            raise Problem("rate", "too many requests from clients that are not enrolled", retry_after_s=wait_s)

    def verify(self, claim: Claim, public_key: str) -> None:
        """Raises `Problem` unless the owner of the key signed this request, now, once, and not too often."""
        try:
            signatures.verify_bytes(claim.base, claim.signature, public_key)
        except SignatureError:
            raise Problem("signature", "the signature is not by the key of its keyid, or the request was changed") from None
        now = self.clock()
        if self._nonces.seen(claim.keyid, claim.nonce):
            raise Problem("replayed", "this very request has been made before")
        is_device = claim.keyid != signing.SERVER
        if is_device and (wait_s := self._rate.take(claim.keyid, now)):
            raise Problem("rate", "more requests a second than a device may make", retry_after_s=wait_s)
        if self._nonces.full(claim.keyid, now, bounded=is_device):
            raise Problem("rate", "more nonces than can be remembered until they expire", retry_after_s=self._limits.valid_s)
        self._nonces.add(claim.keyid, claim.nonce, claim.expires)

    def _key(self, keyid: str) -> str | None:
        if keyid == signing.SERVER:
            return self._feed.identities.server_key
        client = self._feed.identities.clients.get(keyid)
        return None if client is None else client.public_key
