"""Where the store's key lies: the choice is kept, and nothing falls back in silence."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import keyring
import pytest
from fedloop_clients import keys
from fedloop_clients.keys import KeyUnavailableError
from keyring.backend import KeyringBackend
from keyring.backends import fail
from keyring.errors import KeyringError


class MemoryKeyring(KeyringBackend):
    priority = 5

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries: dict[tuple[str, str], str] = {}
        self.locked = False

    def set_password(self, service: str, username: str, password: str) -> None:
        self._check()
        self.entries[service, username] = password

    def get_password(self, service: str, username: str) -> str | None:
        self._check()
        return self.entries.get((service, username))

    def _check(self) -> None:
        if self.locked:
            raise KeyringError("locked")


@pytest.fixture
def ring() -> Iterator[MemoryKeyring]:
    before, ring = keyring.get_keyring(), MemoryKeyring()
    keyring.set_keyring(ring)
    yield ring
    keyring.set_keyring(before)


@pytest.fixture
def no_ring() -> Iterator[None]:
    before = keyring.get_keyring()
    keyring.set_keyring(fail.Keyring())  # type: ignore[no-untyped-call]
    yield
    keyring.set_keyring(before)


def test_a_key_in_a_file_is_its_owners_alone_and_stays_the_same(tmp_path: Path) -> None:
    key = keys.create(tmp_path, "file")
    assert len(key) == keys.KEY_BYTES
    assert keys.load(tmp_path) == keys.create(tmp_path, "file") == key
    assert [path.stat().st_mode & 0o777 for path in tmp_path.iterdir()] == [0o600]


def test_a_key_in_the_keyring_is_in_no_file(tmp_path: Path, ring: MemoryKeyring) -> None:
    key = keys.create(tmp_path, "auto")
    assert keys.load(tmp_path) == key
    (secret,) = ring.entries.values()
    assert secret.encode() not in (tmp_path / "store.key").read_bytes()


def test_auto_takes_a_file_where_no_keyring_is_usable(tmp_path: Path, no_ring: None) -> None:
    assert keys.load(tmp_path) if keys.create(tmp_path, "auto") else False


def test_a_keyring_that_was_asked_for_is_never_replaced_by_a_file(tmp_path: Path, no_ring: None) -> None:
    with pytest.raises(KeyUnavailableError, match="cannot keep the key"):
        keys.create(tmp_path, "keyring")
    assert list(tmp_path.iterdir()) == []


def test_a_locked_keyring_is_an_error_and_makes_no_new_key(tmp_path: Path, ring: MemoryKeyring) -> None:
    keys.create(tmp_path, "keyring")
    ring.locked = True
    with pytest.raises(KeyUnavailableError, match="did not give the key"):
        keys.load(tmp_path)
    with pytest.raises(KeyUnavailableError):
        keys.create(tmp_path, "auto")


def test_another_users_keyring_is_an_error(tmp_path: Path, ring: MemoryKeyring) -> None:
    keys.create(tmp_path, "keyring")
    ring.entries.clear()
    with pytest.raises(KeyUnavailableError, match="has no entry"):
        keys.load(tmp_path)


def test_a_key_file_that_others_can_read_is_refused(tmp_path: Path) -> None:
    keys.create(tmp_path, "file")
    (tmp_path / "store.key").chmod(0o640)
    with pytest.raises(KeyUnavailableError, match="other users"):
        keys.load(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\xff\xfe", b"{}", b'{"key":"AAAA"}', b'{"key":"!"}', b'{"key":1}', b'{"other":"x"}'])
def test_a_damaged_key_file_is_an_error(tmp_path: Path, content: bytes) -> None:
    keys.create(tmp_path, "file")
    (tmp_path / "store.key").write_bytes(content)
    with pytest.raises(KeyUnavailableError):
        keys.load(tmp_path)


def test_an_absent_key_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(KeyUnavailableError, match="there is no key"):
        keys.load(tmp_path)
