"""Ed25519 signatures over events, as the CloudEvents verifiability extension prescribes.

https://github.com/cloudevents/spec/blob/c2845a4/cloudevents/extensions/verifiability.md over DSSE 1.0.2
(https://github.com/secure-systems-lab/dsse/blob/v1.0.2/protocol.md). `Event.signature` is the value of the attribute
`dssematerial`, which is binary: the UTF-8 of a DSSE envelope. Besides the core attributes and the data, the signature covers
the topic and the key. It covers neither replay nor order nor completeness: origin, run, round and `seq` stand in the data.
"""

from __future__ import annotations

import base64
import binascii
import datetime
import functools
import hashlib
import os
import re
import stat
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated, Final

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from msgspec import Meta, Struct, structs
from nacl.exceptions import BadSignatureError
from nacl.signing import VerifyKey

from fedloop_events.envelope import CONTENT_TYPE, SPECVERSION, Event
from fedloop_events.errors import SignatureError, UsageError
from fedloop_events.files import quoted

PAYLOAD_TYPE: Final = "https://cloudevents.io/verifiability/dsse/v0.1"
SIGNED_EXTENSIONS: Final = ("partitionkey", "fedlooptopic")
_MAX_ENVELOPE_CHARS: Final = 4096
_CORE_ATTRIBUTES: Final = frozenset(
    {"id", "source", "specversion", "type", "datacontenttype", "dataschema", "subject", "time", "data", "dssematerial"}
)
_EXTENSION_NAME: Final = re.compile("[a-z0-9]{1,20}")
_P: Final = 2**255 - 19
_Y8: Final = 0x05FC536D880238B13933C6D305ACDFD5F098EFF289F4C345B027B2C28F95E826
_SMALL_ORDER_Y: Final = frozenset({0, 1, _P - 1, _Y8, _P - _Y8})


class SigningKey:
    """An Ed25519 private key (RFC 8032)."""

    def __init__(self, private: Ed25519PrivateKey) -> None:
        self._private = private
        raw = private.public_key().public_bytes_raw()
        self.public_key: Final = base64.b64encode(raw).decode()
        """The public key: 32 bytes as base64."""
        self.key_id: Final = hashlib.sha256(raw).hexdigest()[:16]

    @classmethod
    def generate(cls) -> SigningKey:
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_private_bytes(cls, secret: bytes) -> SigningKey:
        """The key whose 32 secret bytes are `secret`, for stores of their own (an encrypted database, a keyring)."""
        if len(secret) != 32:
            raise UsageError("an Ed25519 private key has 32 bytes")
        return cls(Ed25519PrivateKey.from_private_bytes(secret))

    @classmethod
    def load(cls, path: Path | str) -> SigningKey:
        """The key that `save` wrote. Raises `UsageError` if the file is absent, no key, or readable by others."""
        try:
            with Path(path).open("rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                data = file.read(10_000)
        except OSError as error:
            raise UsageError(f"the key {path} cannot be read", cause=error.strerror or "") from error
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise UsageError(f"the key {path} can be used by others", hint=f"chmod 600 {quoted(path)}")
        try:
            private = serialization.load_pem_private_key(data, None)
        except (ValueError, TypeError) as error:
            raise UsageError(f"{path} is no private key") from error
        if not isinstance(private, Ed25519PrivateKey):
            raise UsageError(f"the key {path} is no Ed25519 key")
        return cls(private)

    def to_pem(self) -> bytes:
        """The private key (PKCS 8, PEM), to be kept where only its owner can read it."""
        return self._private.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )

    def save(self, path: Path | str) -> None:
        """Write the key to a new file that only its owner can read (PKCS 8, PEM). Raises `UsageError` if `path` exists."""
        pem = self.to_pem()
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)
        except FileExistsError:
            raise UsageError(f"the key {path} exists already", hint="it is never overwritten: move it away first") from None
        except OSError as error:
            raise UsageError(f"the key {path} cannot be written", cause=error.strerror or "") from error
        with os.fdopen(descriptor, "wb") as file:
            file.write(pem)
            file.flush()
            os.fsync(file.fileno())

    def private_bytes(self) -> bytes:
        return self._private.private_bytes_raw()

    def sign_bytes(self, message: bytes) -> bytes:
        return self._private.sign(message)


class _Signature(Struct, frozen=True, forbid_unknown_fields=True):
    sig: str
    keyid: str = ""


class _Envelope(Struct, frozen=True, forbid_unknown_fields=True):
    payload: str
    payloadType: str  # noqa: N815 (DSSE's name)
    signatures: Annotated[list[_Signature], Meta(min_length=1, max_length=4)]


class _Material(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    core: str
    ext: str | None = None
    signedextattrs: Annotated[list[str], Meta(min_length=1, max_length=16)] | None = None


_envelopes = msgspec.json.Decoder(_Envelope)
_materials = msgspec.json.Decoder(_Material)


def sign(event: Event, key: SigningKey) -> Event:
    """`event` with its signature by `key`."""
    material = _Material(
        core=_base64(core_digest(event)),
        ext=_base64(_extension_digest(event, SIGNED_EXTENSIONS)),
        signedextattrs=list(SIGNED_EXTENSIONS),
    )
    body = msgspec.json.encode(material)
    signature = key.sign_bytes(pre_authentication(PAYLOAD_TYPE, body))
    envelope = _Envelope(_base64(body), PAYLOAD_TYPE, [_Signature(_base64(signature), key.key_id)])
    return structs.replace(event, signature=msgspec.json.encode(envelope).decode())


def verify(event: Event, public_key: str) -> None:
    """Raise `SignatureError` unless `event` is exactly what the owner of `public_key` signed, topic and key included."""
    if not event.signature:
        raise SignatureError(f"event {event.id} is not signed")
    body = _signed_body(event, public_key)
    try:
        # The very bytes that were verified; nothing is parsed a second time.
        material = _materials.decode(body)
        core = _unbase64(material.core)
        ext = b"" if material.ext is None else _unbase64(material.ext)
    except (msgspec.MsgspecError, UnicodeDecodeError, ValueError):
        raise SignatureError(f"event {event.id} has a signature over something else than an event") from None
    names = material.signedextattrs or []
    if (material.ext is None) != (material.signedextattrs is None) or len(set(names)) != len(names):
        raise SignatureError(f"event {event.id} has a malformed list of signed attributes")
    if any(name in _CORE_ATTRIBUTES or _EXTENSION_NAME.fullmatch(name) is None for name in names):
        raise SignatureError(f"event {event.id} has a malformed list of signed attributes")
    if not set(SIGNED_EXTENSIONS) <= set(names):
        raise SignatureError(f"event {event.id} has a signature that does not cover its topic and key")
    if core != core_digest(event) or ext != _extension_digest(event, names):
        raise SignatureError(f"event {event.id} was changed after it was signed")


def check_public_key(public_key: str) -> None:
    """Raise `SignatureError` unless `public_key` is 32 bytes in base64 and a canonical point of large order.

    Under a small-order key anybody can make signatures that verify (Chalkias et al., "Taming the many EdDSAs", section 3).
    """
    _public_key(public_key)


def verify_bytes(message: bytes, signature: bytes, public_key: str) -> None:
    """Raise `SignatureError` unless `signature` is the owner of `public_key`'s, over exactly `message`."""
    if not _is_by(_public_key(public_key), signature, message):
        raise SignatureError("the signature is not by the key that it should be by")


def core_digest(event: Event) -> bytes:
    """SHA-256 over the SHA-256 of each core attribute, in the extension's order, and of the data. There is no `subject`."""
    time = datetime.datetime.fromtimestamp(event.time_s, datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    return attributes_digest(
        event.id, event.source, SPECVERSION, event.type, CONTENT_TYPE, event.dataschema, "", time, data=event.data
    )


def attributes_digest(*attributes: str, data: bytes) -> bytes:
    """CORE_DIGEST of the extension: an absent attribute is ""."""
    parts = [hashlib.sha256(attribute.encode()).digest() for attribute in attributes]
    return hashlib.sha256(b"".join([*parts, hashlib.sha256(data).digest()])).digest()


def pre_authentication(payload_type: str, body: bytes) -> bytes:
    """PAE of DSSE: what is signed."""
    kind = payload_type.encode()
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(body), body)


def extensions_digest(values: Iterable[str]) -> bytes:
    """EXT_DIGEST of the extension, over the values of the signed attributes in their order."""
    return hashlib.sha256(b"".join(hashlib.sha256(value.encode()).digest() for value in values)).digest()


def _extension_digest(event: Event, names: Sequence[str]) -> bytes:
    values = {"partitionkey": event.key, "fedlooptopic": event.topic}
    return extensions_digest(values.get(name, "") for name in names)


def _signed_body(event: Event, public_key: str) -> bytes:
    """The body of the event's envelope, if one of its signatures is by `public_key`. `keyid` is a hint and decides nothing."""
    key = _public_key(public_key)
    try:
        if len(event.signature) > _MAX_ENVELOPE_CHARS:
            raise ValueError("too long")
        envelope = _envelopes.decode(event.signature)
        body = _unbase64(envelope.payload)
        signatures = [_unbase64(signature.sig) for signature in envelope.signatures]
    except (msgspec.MsgspecError, ValueError):
        raise SignatureError(f"event {event.id} has a malformed signature") from None
    if envelope.payloadType != PAYLOAD_TYPE:
        raise SignatureError(f"event {event.id} has a signature of another kind")
    message = pre_authentication(PAYLOAD_TYPE, body)
    if any(_is_by(key, signature, message) for signature in signatures):
        return body
    raise SignatureError(f"event {event.id} is not signed by the key of its author")


@functools.lru_cache(maxsize=4096)
def _public_key(text: str) -> VerifyKey:
    try:
        raw = _unbase64(text)
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise SignatureError("a public key is not 32 bytes in base64")
    y = int.from_bytes(raw, "little") & (1 << 255) - 1
    if y >= _P or y in _SMALL_ORDER_Y:
        raise SignatureError("a public key is not canonical, or of small order: anybody could sign for it")
    return VerifyKey(raw)


def _is_by(key: VerifyKey, signature: bytes, message: bytes) -> bool:
    """Checked by libsodium, which takes half of OpenSSL's time; checks are most of what a gateway does."""
    try:
        key.verify(message, signature)
    except (BadSignatureError, ValueError):
        return False
    return True


def _base64(data: bytes) -> str:
    return base64.b64encode(data).decode()


def _unbase64(text: str) -> bytes:
    """Strict: either alphabet (DSSE allows both), padded, with no spare bits. Raises `ValueError`."""
    try:
        data = base64.b64decode(text.encode("ascii"), altchars=b"-_" if "-" in text or "_" in text else None, validate=True)
    except (binascii.Error, UnicodeEncodeError) as error:
        raise ValueError("not base64") from error
    if text not in (base64.b64encode(data).decode(), base64.urlsafe_b64encode(data).decode()):
        raise ValueError("not canonical base64")
    return data
