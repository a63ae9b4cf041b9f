"""Stores that released versions wrote open for ever, and nothing in them is lost."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from clients.conftest import unpack
from fedloop_clients import Agent, keys
from fedloop_clients.enrolment import open_store
from fedloop_clients.feedback import ConflictingFeedbackError
from fedloop_clients.migrations import STEPS
from fedloop_clients.remembering import Memory
from fedloop_clients.store import Store
from fedloop_events import types
from fedloop_events.envelope import decode
from fedloop_events.locations import open_log
from fedloop_events.logs.port import read_all
from fedloop_tasks.turns import Turn
from sqlcipher3 import dbapi2

if TYPE_CHECKING:
    from clients.conftest import DigitMasker

RECORDED = Path(__file__).parent / "recorded" / "store_v1"
VERSION_3, VERSION_4 = RECORDED.with_name("store_v3"), RECORDED.with_name("store_v4")
CONNECT = dbapi2.connect
InChild = Callable[[Callable[[], object]], int]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    unpack(RECORDED, tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode((RECORDED / "expected.json").read_bytes())
    return found


def opened(folder: Path, **given: Any) -> Agent:
    return Agent.open(folder / "device", folder / "deployment", **given)


def observe(folder: Path) -> dict[str, Any]:
    """What this program finds, in the form of `expected.json`."""
    with opened(folder) as agent:
        store = agent._device.store
        found: dict[str, Any] = {
            "status": agent.status(),
            "examples": [(each.text, each.label) for each in agent._device.examples()],
            "responses": [
                [response_id, raw, masked and msgspec.json.decode(masked)["text"], predicted, release]
                for response_id, raw, masked, predicted, release in store.rows(
                    "SELECT response_id, raw, masked, predicted, release FROM responses JOIN texts"
                    " ON owner = response_id AND kind = 'prompt' ORDER BY responses.number"
                )
            ],
            "feedback": store.rows("SELECT feedback_id, state, failure FROM feedback ORDER BY number"),
            "outbox": [[seq, each, digest(event)] for seq, each, event in store.rows("SELECT * FROM outbox ORDER BY seq")],
            "answers": store.rows("SELECT * FROM answers ORDER BY instruction_id"),
            "contexts": [[run_id, digest(state)] for run_id, state in store.rows("SELECT * FROM contexts")],
            "kept": [[name, digest(value)] for name, value in store.rows("SELECT * FROM kept WHERE name = 'identity'")],
        }
    decoded: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(found))
    return decoded


def digest(value: Any) -> str | None:
    return None if value is None else hashlib.sha256(bytes(value)).hexdigest()


def as_expected(expected: dict[str, Any]) -> dict[str, Any]:
    """Without what is kept of the log to save time, which another version reads again; what version 1 did not say is empty."""
    kept = [each for each in expected["kept"] if each[0] == "identity"]
    return {name: value for name, value in expected.items() if name not in ("given", "unpublished")} | {
        "kept": kept,
        "status": expected["status"] | {"cut_short": [], "personal": None, "rank": None},
    }


def test_a_store_of_version_1_opens_and_loses_nothing(folder: Path, expected: dict[str, Any]) -> None:
    assert observe(folder) == as_expected(expected)
    assert observe(folder) == as_expected(expected)
    store, _ = open_store(folder / "device")
    assert store.rows("PRAGMA user_version") == [(len(STEPS),)]
    assert store.rows("PRAGMA foreign_key_check") == []
    assert store.rows("PRAGMA integrity_check") == [("ok",)]
    store.close()


def test_what_version_1_had_not_published_waits_as_it_was_given(folder: Path, expected: dict[str, Any]) -> None:
    store, _ = open_store(folder / "device")
    waiting = store.rows(
        "SELECT feedback_id, response_id, thumb, rating, label FROM feedback WHERE state <> 'published' ORDER BY number"
    )
    texts = {
        (owner, kind): (raw, masked and msgspec.json.decode(masked)["text"])
        for owner, kind, raw, masked in (store.rows("SELECT owner, kind, raw, masked FROM texts"))
    }
    for row, before in zip(waiting, expected["unpublished"], strict=True):
        feedback_id, response_id, thumb, rating, label = row
        given = {"thumb": thumb, "rating": rating, "label": label} | {
            kind: texts.get((feedback_id, kind), (None,))[0] for kind in ("correction", "comment")
        }
        written = str(before["said"].get("correction")).strip().lower()
        if label is not None and written == label:
            given["label"] = before["said"].get("label")
        assert {name: value for name, value in given.items() if value is not None} == before["said"]
        assert (feedback_id, response_id) == (before["feedback_id"], before["response_id"])
        assert texts[response_id, "prompt"] == (before["text"], before["masked"])
    assert len(waiting) > 30
    store.close()


def test_feedback_that_was_given_to_version_1_is_known_by_its_id(folder: Path, expected: dict[str, Any]) -> None:
    with opened(folder) as agent:
        for each in expected["given"]:
            again = agent.feedback(each["response_id"], **each["said"], feedback_id=each["feedback_id"])
            assert again.teaches == each["teaches"]
            with pytest.raises(ConflictingFeedbackError):
                agent.feedback(each["response_id"], thumb="up", comment="else", feedback_id=each["feedback_id"])
    assert observe(folder) == as_expected(expected)


def test_a_device_of_version_1_goes_on_where_it_was(folder: Path, expected: dict[str, Any], masker: DigitMasker) -> None:
    with opened(folder, masker=masker) as agent:
        agent.run(until=lambda status: status.settled)
        status, before, derived_id = agent.status(), expected["status"], agent.identity.derived_id
        assert (status.waiting, status.unsent, status.failed) == (0, 0, before["failed"])
        assert (status.answers, status.spends) == (before["answers"], before["spends"])
        assert status.published == before["published"] + before["waiting"]
        corrected = {each.edit.text for each in agent._device.interactions.judged() if each.edit is not None}
        assert "it was about account <NUMBER_1> <NUMBER_1>" in corrected
        raw = agent._device.store.rows("SELECT owner, raw FROM texts WHERE raw IS NOT NULL")
        known = ("unmaskable", "explosive", "nobody judged")
        assert [text for _, text in raw if not any(each in text for each in known)] == []
    log = open_log(folder / "deployment")
    own = [payload for record in read_all(log) if isinstance(payload := decode(record), types.ClientEvent)]
    log.close()
    assert [each.seq for each in own] == list(range(len(own)))
    recorded = [each.feedback_id for each in own if isinstance(each, types.FeedbackRecorded)]
    states = {each[0]: each[1] for each in expected["feedback"]}
    derived = {each: derived_id("feedback", each) for each, state in states.items() if state == "captured"}
    assert len(derived) > 10
    assert sorted(recorded) == sorted(derived.get(each, each) for each, state in states.items() if state != "failed")


def traced(call: Callable[[str], object]) -> Callable[..., Any]:
    """Connections that call back before each statement."""

    def connect(*terms: Any, **more: Any) -> Any:
        db = CONNECT(*terms, **more)
        db.set_trace_callback(call)
        return db

    return connect


def test_a_process_killed_anywhere_in_a_migration_leaves_the_older_version_whole(
    folder: Path, expected: dict[str, Any], in_child: InChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran: list[str] = []
    shutil.copytree(folder / "device", folder / "counted")
    with monkeypatch.context() as patched:
        patched.setattr(dbapi2, "connect", traced(ran.append))
        open_store(folder / "counted")[0].close()
    first, last = ran.index("BEGIN IMMEDIATE"), ran.index("COMMIT", ran.index("PRAGMA user_version = 2"))
    assert last - first > 100
    key = keys.load(folder / "device")
    for fatal in (*range(first + 1, last - 10, 15), *range(last - 10, last + 1)):

        def work(fatal: int = fatal) -> None:
            left = iter(range(fatal))

            def die(_: str) -> None:
                if next(left, None) is None:
                    os.kill(os.getpid(), 9)

            dbapi2.connect = traced(die)
            Store.open(folder / "device" / "store.db", key)

        assert in_child(work) == -9
        db = CONNECT(str(folder / "device" / "store.db"))
        db.execute(f"PRAGMA key = \"x'{key.hex()}'\"")
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
        assert db.execute("SELECT count(*) FROM feedback WHERE said IS NOT NULL").fetchone() == (41,)
        db.close()
    assert observe(folder) == as_expected(expected)


def columns(folder: Path, *, version: int) -> dict[str, list[tuple[Any, ...]]]:
    """What a store of version 3 has in its tables, read without this program, which may have made another version of it."""
    db = CONNECT(str(folder / "device" / "store.db"))
    db.execute(f"PRAGMA key = \"x'{keys.load(folder / 'device').hex()}'\"")
    assert db.execute("PRAGMA user_version").fetchone() == (version,)
    found = {
        "responses": "number, response_id, predicted, release",
        "feedback": "feedback_id, response_id, thumb, rating, label, preferred_over, state, failure, logged, digest",
        "texts": "owner, kind, raw, masked",
        "retracted": "feedback_id, state",
    }
    rows = {table: db.execute(f"SELECT {names} FROM {table} ORDER BY 1, 2").fetchall() for table, names in found.items()}
    assert (db.execute("PRAGMA integrity_check").fetchall(), db.execute("PRAGMA foreign_key_check").fetchall()) == ([("ok",)], [])
    db.close()
    return rows


def test_a_store_of_version_3_opens_and_loses_nothing_wherever_its_migration_is_killed(
    tmp_path: Path, in_child: InChild, monkeypatch: pytest.MonkeyPatch
) -> None:
    unpack(VERSION_3, tmp_path)
    before = columns(tmp_path, version=3)
    assert {name: len(rows) for name, rows in before.items()} == {"responses": 4, "feedback": 4, "texts": 11, "retracted": 1}
    ran: list[str] = []
    shutil.copytree(tmp_path / "device", tmp_path / "counted")
    with monkeypatch.context() as patched:
        patched.setattr(dbapi2, "connect", traced(ran.append))
        open_store(tmp_path / "counted")[0].close()
    key = keys.load(tmp_path / "device")
    for fatal in range(ran.index("BEGIN IMMEDIATE") + 1, ran.index("COMMIT") + 1):

        def work(fatal: int = fatal) -> None:
            left = iter(range(fatal))

            def die(_: str) -> None:
                if next(left, None) is None:
                    os.kill(os.getpid(), 9)

            dbapi2.connect = traced(die)
            Store.open(tmp_path / "device" / "store.db", key)

        assert in_child(work) == -9
        assert columns(tmp_path, version=3) == before
    Store.open(tmp_path / "device" / "store.db", key).close()
    assert columns(tmp_path, version=len(STEPS)) == before


def test_what_a_store_of_version_3_holds_is_published_and_learnt_from(tmp_path: Path, masker: DigitMasker) -> None:
    unpack(VERSION_3, tmp_path)
    with opened(tmp_path, masker=masker) as agent:
        agent.run(until=lambda status: status.settled)
        assert (agent.status().published, agent.status().failed) == (3, {"the deadline passed": 1})
        found = [each for each in agent._device.interactions.judged() if each.edit is not None]
        assert [each.edit for each in found] == [masker.mask("loan 17"), masker.mask("transfer 17")]
        assert [each.response for each in found] == [masker.mask("about card 0815 is lost")] * 2
    log = open_log(tmp_path / "deployment")
    recorded = [each for record in read_all(log) if isinstance(each := decode(record), types.FeedbackRecorded)]
    log.close()
    assert [each.preferred_over is not None for each in recorded] == [False, False, False, True]
    assert [each.predicted for each in recorded] == ["card-lost"] * 4
    assert all(each.response is None and each.context == [] for each in recorded)


def test_what_a_store_of_version_4_holds_is_published_and_remembered(tmp_path: Path, masker: DigitMasker) -> None:
    unpack(VERSION_4, tmp_path)
    before = columns(tmp_path, version=4)
    with opened(tmp_path, masker=masker) as agent:
        assert columns(tmp_path, version=len(STEPS)) == before
        assert agent._device.store.rows("SELECT DISTINCT remembered FROM responses") == [(None,)]
        turns = [Turn("user", "hello"), Turn("assistant", "what is it"), Turn("user", "is the card 4711 lost")]
        found = Memory(agent._device.store).correction(turns)
        assert found is not None
        assert found.answer == "ask the bank"
        assert agent._device.store.rows("SELECT signal FROM feedback WHERE signal IS NOT NULL") == [("copied",)]
        agent.run(until=lambda status: status.settled)
        assert (agent.status().published, agent.status().failed) == (4, {})
