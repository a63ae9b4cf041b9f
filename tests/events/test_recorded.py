"""Logs that released versions wrote replay for ever: file format, event versions, signatures."""

from __future__ import annotations

import shutil
from pathlib import Path

import msgspec
import samples
from fedloop_events import envelope
from fedloop_events.envelope import Record
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.logs.port import read_all
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_events.types import FeedbackRecorded, Payload

RECORDED = Path(__file__).parent / "recorded"


class Everything:
    topics = ("clients", "feedback", "rounds")
    version = 1

    def __init__(self) -> None:
        self.payloads: list[Payload] = []

    def apply(self, record: Record, payload: Payload) -> None:
        self.payloads.append(payload)

    def to_state(self) -> bytes:
        return b""

    @classmethod
    def from_state(cls, state: bytes) -> Everything:
        return cls()


def test_format_1_replays_with_every_signature_and_every_older_event(tmp_path: Path) -> None:
    # A copy: opening a log in WAL mode writes beside it.
    log = SqliteLog(shutil.copy(RECORDED / "format_1.sqlite", tmp_path))
    reader = Reader(log, Everything(), identities=(identities := Identities()))
    assert (reader.catch_up(), reader.refused, reader.unknown, log.check()) == (10, 0, 0, 10)
    feedback = [payload for payload in reader.fold.payloads if isinstance(payload, FeedbackRecorded)]
    assert [(one.seq, one.thumb, one.use_case) for one in feedback] == [
        (2, "up", "default"),
        (3, "down", "default"),
        (4, None, "default"),
        (5, "up", "default"),
    ]
    assert feedback[0] == msgspec.structs.replace(
        samples.feedback(2),
        rating=4,
        label="lost_card",
        correction=samples.masked("<PERSON_1> lost it"),
        comment=samples.masked("thanks"),
    )
    assert feedback[3] == samples.feedback(5)
    assert {name: client.revoked for name, client in identities.clients.items()} == {"device-1": False, "device-2": True}
    log.close()


def test_writing_the_newest_versions_again_gives_the_recorded_bytes(tmp_path: Path) -> None:
    log = SqliteLog(shutil.copy(RECORDED / "format_1.sqlite", tmp_path))
    for record in read_all(log):
        payload = envelope.decode(record)
        assert payload is not None
        if record.type == payload.type_name:
            assert envelope.encode(payload, id=record.id, time_s=record.time_s).data == record.data
    log.close()
