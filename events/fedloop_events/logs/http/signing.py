"""Signed requests: one profile of HTTP Message Signatures (RFC 9421) with Content-Digest (RFC 9530), for both sides of a gateway.

A signature covers method, authority, path, query and content, and names who (`keyid`: a client id, or "server"), when (`created`,
`expires`), once (`nonce`) and what for (`tag`). One signature, Ed25519, and nothing optional: what is not exactly this is refused
before any of it is used. Any implementation of the two RFCs can make one.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from collections.abc import Mapping
from typing import Final

from msgspec import Struct

from fedloop_events.errors import SignatureError
from fedloop_events.signatures import SigningKey

TAG: Final = "fedloop-gateway-v1"
SERVER: Final = "server"
"""The `keyid` of the deployment's own key."""
VALID_S: Final = 60
"""How long a request that is made here may be under way."""
EMPTY_DIGEST: Final = hashlib.sha256(b"").digest()

_COMPONENTS: Final = ("@method", "@authority", "@path", "@query", "content-digest")
_LISTED: Final = " ".join(f'"{each}"' for each in _COMPONENTS)
_MAX_CHARS: Final = 1000
_INPUT: Final = re.compile(
    r'([a-z*][a-z0-9_.*-]{0,39})=(\(([a-z@" -]{0,200})\)((?:;[a-z]{1,10}=(?:[0-9]{1,12}|"[ !#-\[\]-~]{0,200}")){0,8}))'
)
_PARAMETER: Final = re.compile(r';([a-z]+)=(?:([0-9]+)|"([^"]*)")')
_SIGNATURE: Final = re.compile(r"([a-z*][a-z0-9_.*-]{0,39})=:([A-Za-z0-9+/]{86}==):")
_DIGEST: Final = re.compile(r"sha-256=:([A-Za-z0-9+/]{43}=):")


class Claim(Struct, frozen=True, gc=False):
    """What a request claims of itself; nothing of it is true before `base` is found signed by the key of `keyid`."""

    keyid: str
    created: int
    expires: int
    nonce: str
    content_sha256: bytes
    base: bytes
    signature: bytes


def sign(
    method: str, authority: str, path: str, query: str, *, content_sha256: bytes, client_id: str, key: SigningKey, now_s: int
) -> dict[str, str]:
    """The headers that sign one request, valid once. `path` and `query` (without "?") as they are sent."""
    digest = f"sha-256=:{base64.b64encode(content_sha256).decode()}:"
    parameters = (
        f"({_LISTED});created={now_s};expires={now_s + VALID_S};"
        f'nonce="{secrets.token_urlsafe(18)}";keyid="{client_id}";alg="ed25519";tag="{TAG}"'
    )
    base = _base(_COMPONENTS, _values(method, authority, path, query, digest), parameters)
    signature = base64.b64encode(key.sign_bytes(base)).decode()
    return {"content-digest": digest, "signature-input": f"fedloop={parameters}", "signature": f"fedloop=:{signature}:"}


def parse(method: str, authority: str, path: str, query: str, headers: Mapping[str, str]) -> Claim:
    """What the headers `content-digest`, `signature-input` and `signature` of a request claim.

    Raises `SignatureError`, with a sentence that holds nothing of the request, unless it has the one form.
    """
    digest, described, signed = (headers.get(name, "") for name in ("content-digest", "signature-input", "signature"))
    if not described or not signed:
        raise SignatureError("the request is not signed")
    of_digest, of_input, of_signature = _DIGEST.fullmatch(digest), None, None
    if len(described) <= _MAX_CHARS and len(signed) <= _MAX_CHARS:
        of_input, of_signature = _INPUT.fullmatch(described), _SIGNATURE.fullmatch(signed)
    if of_digest is None:
        raise SignatureError("the request has no Content-Digest of one sha-256")
    if of_input is None or of_signature is None or of_input[1] != of_signature[1]:
        raise SignatureError("the request's signature is malformed")
    components = _COMPONENTS if of_input[3] == _LISTED else tuple(each.strip('"') for each in of_input[3].split(" "))
    if components is not _COMPONENTS and sorted(components) != sorted(_COMPONENTS):
        raise SignatureError(
            "the request's signature does not cover method, authority, path, query and content-digest, each once"
        )
    found = _PARAMETER.findall(of_input[4])
    numbers = {name: int(number) for name, number, _ in found if number}
    texts = {name: text for name, number, text in found if not number}
    if len(found) != len({name for name, *_ in found}) or not {"created", "expires"} == set(numbers):
        raise SignatureError("the request's signature does not state once when it was created and when it expires")
    if not {"nonce", "keyid", "tag"} <= set(texts) <= {"nonce", "keyid", "tag", "alg"}:
        raise SignatureError("the request's signature does not state nonce, keyid and tag")
    if texts["tag"] != TAG or texts.get("alg", "ed25519") != "ed25519":
        raise SignatureError(f"the request's signature is not an ed25519 one for {TAG}")
    if not 16 <= len(texts["nonce"]) <= 64:
        raise SignatureError("the request's nonce does not have 16 to 64 characters")
    return Claim(
        keyid=texts["keyid"],
        created=numbers["created"],
        expires=numbers["expires"],
        nonce=texts["nonce"],
        content_sha256=base64.b64decode(of_digest[1]),
        base=_base(components, _values(method, authority, path, query, digest), of_input[2]),
        signature=base64.b64decode(of_signature[2]),
    )


def _values(method: str, authority: str, path: str, query: str, digest: str) -> dict[str, str]:
    return {
        "@method": method,
        "@authority": authority.lower(),
        "@path": path or "/",
        "@query": f"?{query}",
        "content-digest": digest,
    }


def _base(components: tuple[str, ...], values: Mapping[str, str], parameters: str) -> bytes:
    """The signature base (RFC 9421, section 2.5)."""
    lines = [f'"{name}": {values[name]}' for name in components]
    return "\n".join([*lines, f'"@signature-params": {parameters}']).encode("ascii", "replace")
