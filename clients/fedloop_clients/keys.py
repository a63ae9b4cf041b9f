"""Where the key of a device's store lies: in the operating system's keyring, or in a file that its owner alone can read."""

from __future__ import annotations

import base64
import binascii
import os
import stat
from pathlib import Path
from typing import Final, Literal

import msgspec
from fedloop_events import ids
from fedloop_events.errors import FedloopError
from fedloop_events.files import quoted, reason, write_private
from msgspec import Struct

KeySource = Literal["auto", "keyring", "file"]

KEY_BYTES: Final = 32
_SERVICE: Final = "fedloop"
KEY_FILE: Final = "store.key"


class KeyUnavailableError(FedloopError):
    """The key of the store cannot be had: absent, damaged, open to other users, or its keyring is locked or missing."""


class _Locator(Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """What the key file holds: the key itself, or the name of its entry in the keyring."""

    key: str = ""
    keyring_entry: str = ""


def create(folder: Path, source: KeySource = "auto", *, needed: bool = False) -> bytes:
    """A new random key for the store in `folder`, durably kept before this returns; the kept one if there is one already, or if
    it is `needed` for a store that is there.

    "auto" takes the keyring where a usable one exists, else a file; "keyring" and "file" are never replaced by the other.
    Raises `KeyUnavailableError`.
    """
    path = folder / KEY_FILE
    if path.exists() or needed:
        return load(folder)
    key = os.urandom(KEY_BYTES)
    encoded = base64.b64encode(key).decode()
    locator = _Locator(key=encoded)
    if source != "file":
        entry = f"store-{ids.new_id()}"
        problem = _keyring_problem() or _to_keyring(entry, encoded)
        if not problem:
            locator = _Locator(keyring_entry=entry)
        elif source == "keyring":
            raise KeyUnavailableError(
                f"the operating system's keyring cannot keep the key: {problem}",
                hint="unlock or install a keyring, or keep the key in a file (--key-from file)",
            )
    try:
        write_private(path, msgspec.json.encode(locator))
    except OSError as error:
        raise KeyUnavailableError(
            f"the key of the store cannot be kept in {folder}",
            cause=reason(error, path),
            hint="then enrol again: nothing was made",
        ) from None
    return key


def load(folder: Path) -> bytes:
    """The key of the store in `folder`. Raises `KeyUnavailableError`; never makes a new one."""
    path = folder / KEY_FILE
    try:
        if stat.S_IMODE(path.stat().st_mode) & 0o077:
            raise KeyUnavailableError(f"{path} can be read by other users", hint=f"chmod 600 {quoted(path)}")
        locator = msgspec.json.decode(path.read_bytes(), type=_Locator)
    except FileNotFoundError:
        raise KeyUnavailableError(
            f"there is no key at {path}",
            hint="restore it from a backup; if it is lost, so is the store: enrol the device under a new name, with a new store",
        ) from None
    except OSError as error:
        raise KeyUnavailableError(f"the key at {path} cannot be read", cause=error.strerror or "") from None
    except (msgspec.MsgspecError, UnicodeDecodeError):
        raise KeyUnavailableError(f"{path} does not hold a key", hint="restore it from a backup") from None
    encoded = _from_keyring(locator.keyring_entry) if locator.keyring_entry else locator.key
    try:
        key = base64.b64decode(encoded, validate=True)
    except binascii.Error:
        key = b""
    if len(key) != KEY_BYTES:
        raise KeyUnavailableError(f"the key that {path} names is not {KEY_BYTES} bytes long", hint="restore it from a backup")
    return key


def _keyring_problem() -> str:
    """Why no usable keyring exists, or "". A backend of priority below 1 stores in the clear or not at all."""
    import keyring

    backend = keyring.get_keyring()
    if backend.priority < 1:
        return f"no usable backend ({type(backend).__module__})"
    return ""


def _to_keyring(entry: str, secret: str) -> str:
    import keyring
    from keyring.errors import KeyringError

    try:
        keyring.set_password(_SERVICE, entry, secret)
        return "" if keyring.get_password(_SERVICE, entry) == secret else "it did not give back what it was given"
    except (KeyringError, OSError, RuntimeError) as error:
        return type(error).__name__


def _from_keyring(entry: str) -> str:
    import keyring
    from keyring.errors import KeyringError

    try:
        secret = keyring.get_password(_SERVICE, entry)
    except (KeyringError, OSError, RuntimeError) as error:
        raise KeyUnavailableError(
            "the operating system's keyring did not give the key", cause=type(error).__name__, hint="unlock it and try again"
        ) from None
    if secret is None:
        raise KeyUnavailableError(
            f"the keyring has no entry {entry!r} of service {_SERVICE!r}", hint="run as the user who enrolled this device"
        )
    return secret
