"""The encrypted store: nothing readable on disk, nothing half done, several processes at once."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from fedloop_clients import store as store_module
from fedloop_clients.migrations import STEPS
from fedloop_clients.store import Store
from fedloop_clients.store_file import StoreError, WrongKeyError
from fedloop_events.errors import UnreachableError

KEY = bytes(range(32))
CANARY = b"canary-4711-of-the-user"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "store.db"


def test_what_is_kept_is_there_again_and_replaced(path: Path) -> None:
    store = Store.create(path, KEY)
    store.keep("name", b"one")
    store.keep("name", b"two")
    store.close()
    assert Store.open(path, KEY).kept("name") == b"two"
    assert Store.create(path, KEY).kept("other") is None


def test_no_file_shows_what_is_in_the_store_or_its_key(path: Path) -> None:
    store = Store.create(path, KEY)
    for number in range(50):
        store.keep(f"name-{number}", CANARY * 100)
    files = list(path.parent.iterdir())
    assert {each.name for each in files} >= {"store.db", "store.db-wal"}
    for secret in (CANARY, KEY, KEY.hex().encode(), b"SQLite format"):
        assert not [each.name for each in files if secret in each.read_bytes()]
    assert [each.stat().st_mode & 0o077 for each in files] == [0] * len(files)
    store.close()


def test_what_was_replaced_is_not_in_the_pages_either(path: Path) -> None:
    store = Store.create(path, KEY)
    assert store.rows("PRAGMA secure_delete") == [(1,)]
    assert store.rows("PRAGMA synchronous") == [(2,)]
    assert store.rows("PRAGMA journal_mode") == [("wal",)]


def test_another_key_opens_nothing_and_harms_nothing(path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    Store.create(path, KEY).close()
    for opened in (Store.open, Store.create):
        with pytest.raises(WrongKeyError, match="does not open"):
            opened(path, bytes(32))
    assert Store.open(path, KEY).kept("name") is None
    assert capfd.readouterr().err == ""


def test_what_is_no_store_is_an_error(path: Path) -> None:
    with pytest.raises(StoreError, match="no store"):
        Store.open(path, KEY)
    path.write_bytes(os.urandom(8192))
    with pytest.raises(WrongKeyError):
        Store.open(path, KEY)
    with pytest.raises(StoreError, match="cannot be created"):
        Store.create(path.parent / "absent" / "store.db", KEY)


def test_a_store_whose_making_was_interrupted_is_made_again(path: Path) -> None:
    path.touch()
    with pytest.raises(StoreError, match="never finished"):
        Store.open(path, KEY)
    Store.create(path, KEY).keep("name", b"value")


def test_a_store_of_a_newer_version_is_refused(path: Path) -> None:
    with Store.create(path, KEY).transaction() as db:
        db.execute(f"PRAGMA user_version = {len(STEPS) + 1}")
    for opened in (Store.open, Store.create):
        with pytest.raises(StoreError, match=f"version {len(STEPS) + 1}; this program knows versions up to {len(STEPS)}"):
            opened(path, KEY)
    with pytest.MonkeyPatch.context() as newer:
        newer.setattr(store_module, "STEPS", (*STEPS, lambda db: None))
        assert Store.open(path, KEY).rows("PRAGMA user_version") == [(len(STEPS) + 1,)]


def test_a_damaged_page_is_an_error(path: Path) -> None:
    store = Store.create(path, KEY)
    store.keep("name", bytes(200_000))
    store.close()
    with path.open("r+b") as file:
        file.seek(-5000, os.SEEK_END)
        file.write(b"\x00" * 100)
    with pytest.raises(StoreError):
        Store.open(path, KEY).kept("name")


def test_an_exception_undoes_the_whole_transaction_and_the_ones_that_joined_it(path: Path) -> None:
    store = Store.create(path, KEY)

    def fail() -> None:
        with store.transaction():
            store.keep("name", b"value")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert store.kept("name") is None
    store.keep("name", b"value")
    assert store.kept("name") == b"value"


def test_processes_write_in_turns(path: Path) -> None:
    Store.create(path, KEY).close()
    children = []
    for _ in range(4):
        if (child := os.fork()) == 0:
            try:
                store = Store.open(path, KEY)
                for _ in range(25):
                    with store.transaction() as db:
                        (count,) = db.execute("SELECT count(*) FROM kept").fetchone()
                        store.keep(f"name-{count}", b"")
            except BaseException:
                os._exit(1)
            os._exit(0)
        children.append(child)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert Store.open(path, KEY).rows("SELECT count(*) FROM kept") == [(100,)]


def test_a_store_held_by_another_process_is_waited_for_a_bounded_time(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "BUSY_TIMEOUT_S", 0.05)
    one, other = Store.create(path, KEY), Store.open(path, KEY)
    with one.transaction(), pytest.raises(UnreachableError, match="in use by another process"):
        other.keep("name", b"value")
    other.keep("name", b"value")


def test_a_killed_process_loses_only_what_it_had_not_committed(
    path: Path, in_child: Callable[[Callable[[], object]], int]
) -> None:
    def work() -> None:
        store = Store.create(path, KEY)
        store.keep("committed", b"value")
        with store.transaction():
            store.keep("lost", b"value")
            os.kill(os.getpid(), 9)

    assert in_child(work) == -9
    store = Store.open(path, KEY)
    assert (store.kept("committed"), store.kept("lost")) == (b"value", None)
