"""Signed requests against an independent implementation of RFC 9421, and what is refused."""

from __future__ import annotations

import hashlib
import re
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
import samples
from fedloop_events import signatures
from fedloop_events.errors import SignatureError
from fedloop_events.logs.http import signing
from http_message_signatures import HTTPMessageSigner, HTTPMessageVerifier, HTTPSignatureKeyResolver
from http_message_signatures.algorithms import ED25519

BODY = b'[{"id":"1"}]'
PARTS = ("POST", "localhost:8443", "/v1/events", "a=1&b=%20x")
COMPONENTS = ("@method", "@authority", "@path", "@query", "content-digest")


class Message:
    """A request as the other implementation takes it."""

    def __init__(self, headers: dict[str, str]) -> None:
        method, authority, path, query = PARTS
        self.method, self.url = method, f"https://{authority}{path}?{query}"
        self.headers = headers


class Keys(HTTPSignatureKeyResolver):
    def resolve_public_key(self, key_id: str) -> Any:
        return samples.key(key_id)._private.public_key()

    def resolve_private_key(self, key_id: str) -> Any:
        return samples.key(key_id)._private


def ours(**changes: Any) -> dict[str, str]:
    given: dict[str, Any] = {"content_sha256": hashlib.sha256(BODY).digest(), "now_s": int(datetime.now(UTC).timestamp())}
    return signing.sign(*PARTS, client_id="device-1", key=samples.key("device-1"), **(given | changes))


def test_another_implementation_verifies_what_is_signed_here() -> None:
    (found,) = HTTPMessageVerifier(signature_algorithm=ED25519, key_resolver=Keys()).verify(
        Message({name.title(): value for name, value in ours().items()}),
        expect_tag=signing.TAG,
        require_components=COMPONENTS,
        body=BODY,
    )
    assert found.parameters["keyid"] == "device-1"
    assert found.body == BODY


def test_what_another_implementation_signs_is_taken_here() -> None:
    message = Message({})
    now = datetime.now(UTC)
    HTTPMessageSigner(signature_algorithm=ED25519, key_resolver=Keys()).sign(
        message,
        key_id="device-1",
        created=now,
        expires=now + timedelta(seconds=30),
        nonce="0123456789abcdef",
        tag=signing.TAG,
        covered_component_ids=tuple(reversed(COMPONENTS)),
        body=BODY,
    )
    claim = signing.parse(*PARTS, {name.lower(): value for name, value in message.headers.items()})
    signatures.verify_bytes(claim.base, claim.signature, samples.key("device-1").public_key)
    assert (claim.keyid, claim.nonce, claim.expires - claim.created) == ("device-1", "0123456789abcdef", 30)
    assert claim.content_sha256 == hashlib.sha256(BODY).digest()


@pytest.mark.parametrize("part", range(4))
def test_a_signature_covers_method_authority_path_and_query(part: int) -> None:
    headers = ours()
    method, authority, path, query = (each + "x" * (number == part) for number, each in enumerate(PARTS))
    claim = signing.parse(method, authority, path, query, headers)
    with pytest.raises(SignatureError):
        signatures.verify_bytes(claim.base, claim.signature, samples.key("device-1").public_key)


def test_a_signature_covers_the_content_and_each_of_its_own_parameters() -> None:
    headers = ours()
    other = headers | {"content-digest": ours(content_sha256=hashlib.sha256(b"other").digest())["content-digest"]}
    changed = [
        other,
        headers | {"signature-input": re.sub('keyid="device-1"', 'keyid="device-2"', headers["signature-input"])},
        headers | {"signature-input": re.sub('nonce=".', 'nonce="_', headers["signature-input"])},
        headers | {"signature-input": re.sub("expires=1", "expires=2", headers["signature-input"])},
        headers | {"signature-input": headers["signature-input"].replace(';alg="ed25519"', "")},
    ]
    for each in changed:
        claim = signing.parse(*PARTS, each)
        with pytest.raises(SignatureError):
            signatures.verify_bytes(claim.base, claim.signature, samples.key("device-1").public_key)


@pytest.mark.parametrize(
    ("name", "pattern", "replacement"),
    [
        ("signature-input", '"@query" ', ""),
        ("signature-input", '"@path"', '"@method"'),
        ("signature-input", '"@query"', '"@query" "@scheme"'),
        ("signature-input", "created=", "born="),
        ("signature-input", "expires=[0-9]+;", ""),
        ("signature-input", "expires=[0-9]+;", "expires=1.5;"),
        ("signature-input", 'nonce="[^"]*"', 'nonce="short"'),
        ("signature-input", 'nonce="[^"]*";', ""),
        ("signature-input", 'keyid="device-1"', 'keyid="device-1";keyid="device-2"'),
        ("signature-input", 'keyid="device-1"', 'keyid="a\\\\"b"'),
        ("signature-input", "ed25519", "hmac-sha256"),
        ("signature-input", "fedloop-gateway-v1", "another"),
        ("signature-input", ';tag="[^"]*"', ""),
        ("signature-input", "$", ';evil="1"'),
        ("signature-input", "^fedloop=", "other="),
        ("signature-input", "^", 'first=("@method");created=1, '),
        ("signature-input", "^.*$", "x" * 2000),
        ("signature-input", "^.*$", ""),
        ("signature", ":[^:]*:", "::"),
        ("signature", "^.*$", ""),
        ("signature", "$", ", second=:AAAA:"),
        ("content-digest", "sha-256", "sha-512"),
        ("content-digest", "=:$", ":"),
        ("content-digest", "^.*$", ""),
    ],
)
def test_any_other_form_is_refused_without_being_echoed(name: str, pattern: str, replacement: str) -> None:
    headers = ours()
    headers[name] = re.sub(pattern, replacement, headers[name])
    with pytest.raises(SignatureError) as refused:
        signing.parse(*PARTS, headers)
    assert "device-1" not in refused.value.message
    assert "evil" not in refused.value.message


def test_each_signature_has_a_nonce_of_its_own() -> None:
    assert len({signing.parse(*PARTS, ours()).nonce for _ in range(100)}) == 100
