"""Signatures against published vectors, an independent implementation of the attack, and every way to tamper."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import msgspec
import pytest
import samples
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from fedloop_events import signatures
from fedloop_events.errors import SignatureError, UsageError
from fedloop_events.signatures import SigningKey, attributes_digest, extensions_digest, pre_authentication
from hypothesis import given
from hypothesis import strategies as st

KEY = samples.key("device-1")
EVENT = samples.signed(samples.feedback())

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P


def unbase64(text: str) -> bytes:
    return base64.b64decode(text)


def envelope() -> dict[str, object]:
    decoded = json.loads(EVENT.signature)
    assert isinstance(decoded, dict)
    return decoded


def resigned(body: bytes) -> str:
    """An envelope with a valid signature over `body`, whatever it is."""
    signature = KEY.sign_bytes(pre_authentication(signatures.PAYLOAD_TYPE, body))
    encoded = [base64.b64encode(part).decode() for part in (body, signature)]
    return json.dumps({"payload": encoded[0], "payloadType": signatures.PAYLOAD_TYPE, "signatures": [{"sig": encoded[1]}]})


def test_pre_authentication_is_the_vector_of_dsse() -> None:
    expected = b"DSSEv1 29 http://example.com/HelloWorld 11 hello world"
    assert pre_authentication("http://example.com/HelloWorld", b"hello world") == expected


def test_the_core_digest_is_the_vector_of_the_extension() -> None:
    # cloudevents/extensions/verifiability.md at c2845a4, case 5: the one case that states the bytes of its data.
    attributes = ("1", "example/uri", "1.0", "example.type.binary", "application/octet-stream", "", "", "")
    digest = attributes_digest(*attributes, data=unbase64("8J+koQ=="))
    assert digest == unbase64("qCSeiZkS+hH9WiClfq6plfqYNVy2kvxWRfoBrLEzoDk=")


@pytest.mark.parametrize(
    ("values", "ext"),
    [
        (["value1"], "kU1P8bDaEnyNhglWzdTJNHh77khNWSZebBUxufVM2pU="),
        (["value1", "value2"], "HB1pe431FoQZRsJbyLNMq0QaAvqPtmhdi8dHGShbJAU="),
    ],
)
def test_extension_digests_are_the_vectors_of_the_extension(values: list[str], ext: str) -> None:
    # The same file, cases 6a and 7.
    assert extensions_digest(values) == unbase64(ext)


def test_ed25519_is_the_one_of_rfc_8032() -> None:
    # Section 7.1, test 2.
    secret = bytes.fromhex("4ccd089b28ff96da9db6c346ec114e0f5b8a319f35aba624da8cf6ed4fb8a6fb")
    public = bytes.fromhex("3d4017c3e843895a92b70aa74d1b7ebc9c982ccf2ec4968cc0cd55f12af4660c")
    signature = bytes.fromhex(
        "92a009a9f0d4cab8720e820b5f642540a2b27b5416503f8fb3762223ebdb69da"
        "085ac1e43e15996e458f3613d0f11d8c387b2eaeb4302aeeb00d291612bb0c00"
    )
    key = SigningKey.from_private_bytes(secret)
    assert unbase64(key.public_key) == public
    assert key.sign_bytes(b"\x72") == signature


def test_a_signed_event_verifies_under_its_authors_key_alone() -> None:
    signatures.verify(EVENT, KEY.public_key)
    with pytest.raises(SignatureError, match="not signed by the key"):
        signatures.verify(EVENT, samples.key("device-2").public_key)


def test_signing_is_deterministic_and_covers_what_the_extension_says() -> None:
    assert samples.signed(samples.feedback(), number=1) == samples.signed(samples.feedback(), number=1)
    material = json.loads(unbase64(str(envelope()["payload"])))
    assert material.keys() == {"core", "ext", "signedextattrs"}
    assert material["signedextattrs"] == ["partitionkey", "fedlooptopic"]


@pytest.mark.parametrize(
    "change",
    [
        {"id": "0" * 32},
        {"source": "/demo/clients/device-2"},
        {"type": "io.fedloop.feedback.recorded.v1"},
        {"time_s": EVENT.time_s + 1},
        {"data": EVENT.data.replace(b"up", b"down")},
        {"topic": "updates"},
        {"key": "device-2"},
        {"signature": ""},
        {"signature": "{}"},
        {"signature": "x" * 10_000},
        {"signature": EVENT.signature.replace("payloadType", "payloadtype")},
        {"signature": EVENT.signature.replace("v0.1", "v0.2")},
    ],
)
def test_an_event_changed_in_any_part_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(SignatureError):
        signatures.verify(msgspec.structs.replace(EVENT, **change), KEY.public_key)


@given(place=st.integers(0, len(EVENT.signature) - 1), character=st.characters(max_codepoint=127))
def test_a_changed_character_of_a_signature_never_makes_another_event_verify(place: int, character: str) -> None:
    changed = EVENT.signature[:place] + character + EVENT.signature[place + 1 :]
    event = msgspec.structs.replace(EVENT, signature=changed, key="device-2")
    with pytest.raises(SignatureError):
        signatures.verify(event, KEY.public_key)


def test_the_key_id_is_a_hint_and_decides_nothing() -> None:
    changed = EVENT.signature.replace(KEY.key_id, "somebody")
    assert changed != EVENT.signature
    signatures.verify(msgspec.structs.replace(EVENT, signature=changed), KEY.public_key)


def test_both_base64_alphabets_are_accepted_and_nothing_between() -> None:
    parts = envelope()
    url_safe = json.dumps(parts | {"signatures": [{"sig": _translated(parts)}]})
    signatures.verify(msgspec.structs.replace(EVENT, signature=url_safe), KEY.public_key)


def _translated(parts: dict[str, object]) -> str:
    entries = parts["signatures"]
    assert isinstance(entries, list)
    return str(entries[0]["sig"]).replace("+", "-").replace("/", "_")


@pytest.mark.parametrize("text", ["QUJ=", "QUI", "QUI=\n", " QUI=", "Q*I=", "+-==", "QUÄ="])
def test_lax_base64_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="base64"):
        signatures._unbase64(text)


@pytest.mark.parametrize(
    "change",
    [
        {"signedextattrs": ["exta", "exta"]},  # 8a
        {"signedextattrs": ["exta", "id"]},  # 8b
        {"signedextattrs": ["dssematerial"]},  # 8c
        {"ext": None},  # 8d
        {"signedextattrs": None},  # 8e
        {"signedextattrs": ["partitionkey"]},
        {"signedextattrs": ["fedlooptopic", "partitionkey"]},
        {"core": "AAAA"},
        {"more": "x"},
    ],
)
def test_a_validly_signed_but_malformed_material_is_refused(change: dict[str, object]) -> None:
    material = json.loads(unbase64(str(envelope()["payload"]))) | change
    body = json.dumps({name: value for name, value in material.items() if value is not None}).encode()
    with pytest.raises(SignatureError):
        signatures.verify(msgspec.structs.replace(EVENT, signature=resigned(body)), KEY.public_key)


def test_material_of_another_signer_may_be_laid_out_differently_and_cover_more() -> None:
    material = json.loads(unbase64(str(envelope()["payload"])))
    spaced = json.dumps(material, indent=2).encode()
    signatures.verify(msgspec.structs.replace(EVENT, signature=resigned(spaced)), KEY.public_key)
    with pytest.raises(SignatureError):
        signatures.verify(msgspec.structs.replace(EVENT, signature=resigned(b"\xff")), KEY.public_key)


# --- small-order keys ------------------------------------------------------------------------------------------------


def _x(y: int) -> int | None:
    """An x of the curve point with this y (RFC 8032, section 5.1.3), or None."""
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    x = pow(square, (P + 3) // 8, P)
    if (x * x - square) % P:
        x = x * pow(2, (P - 1) // 4, P) % P
    return x if (x * x - square) % P == 0 else None


def _add(one: tuple[int, int], other: tuple[int, int]) -> tuple[int, int]:
    product = D * one[0] * other[0] * one[1] * other[1] % P
    x = (one[0] * other[1] + other[0] * one[1]) * pow(1 + product, -1, P) % P
    return x, (one[1] * other[1] + one[0] * other[0]) * pow(1 - product, -1, P) % P


def _times(scalar: int, point: tuple[int, int]) -> tuple[int, int]:
    result = (0, 1)
    while scalar:
        if scalar & 1:
            result = _add(result, point)
        point, scalar = _add(point, point), scalar >> 1
    return result


def small_order_encodings() -> set[bytes]:
    """All encodings of the eight points of small order, the non-canonical ones included, found without the rule under test."""
    y = 2
    while True:
        x = _x(y)
        if x is not None and _times(4, (torsion := _times(L, (x, y)))) != (0, 1):
            break
        y += 1
    encodings = set()
    for number in range(8):
        x, y = _times(number, torsion)
        for value in (y, y + P):
            for sign in {x & 1, 1} if x == 0 else {x & 1}:
                if value < 1 << 255:
                    encodings.add((value | sign << 255).to_bytes(32, "little"))
    return encodings


def test_every_small_order_key_is_refused() -> None:
    encodings = small_order_encodings()
    assert len(encodings) == 14
    for raw in encodings:
        with pytest.raises(SignatureError, match="small order"):
            signatures.check_public_key(base64.b64encode(raw).decode())


def test_what_is_refused_would_really_let_anybody_sign() -> None:
    """Under the key 1 (the neutral point), R = neutral, S = 0 is a signature of every message for the library."""
    neutral = (1).to_bytes(32, "little")
    Ed25519PublicKey.from_public_bytes(neutral).verify(neutral + bytes(32), b"anything")


@given(st.binary(min_size=32, max_size=32))
def test_honest_keys_are_accepted(secret: bytes) -> None:
    signatures.check_public_key(SigningKey.from_private_bytes(secret).public_key)


@pytest.mark.parametrize("text", ["", "AAAA", "A" * 44, base64.b64encode(P.to_bytes(32, "little")).decode(), "é" * 44])
def test_malformed_keys_are_refused(text: str) -> None:
    with pytest.raises(SignatureError):
        signatures.check_public_key(text)


# --- files -----------------------------------------------------------------------------------------------------------


def test_a_key_is_saved_for_its_owner_alone_and_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "key"
    KEY.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert SigningKey.load(path).public_key == KEY.public_key
    with pytest.raises(UsageError, match="exists already"):
        samples.key("device-2").save(path)
    assert SigningKey.load(path).public_key == KEY.public_key


def test_a_key_that_others_can_read_or_that_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "key"
    KEY.save(path)
    path.chmod(0o640)
    with pytest.raises(UsageError, match="others"):
        SigningKey.load(path)
    path.chmod(0o600)
    path.write_text("nonsense")
    with pytest.raises(UsageError, match="no private key"):
        SigningKey.load(path)
    with pytest.raises(UsageError, match="cannot be read"):
        SigningKey.load(tmp_path / "absent")
    with pytest.raises(UsageError, match="32 bytes"):
        SigningKey.from_private_bytes(b"short")
