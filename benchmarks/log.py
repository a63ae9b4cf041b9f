"""The log: durable append, and read, decode and fold."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import apsw
import msgspec
from fedloop_events import envelope, ids, signatures, topics, types
from fedloop_events.envelope import Event, Record
from fedloop_events.log import read_all
from fedloop_events.masked import MaskedText
from fedloop_events.projections import Reader
from fedloop_events.signatures import SigningKey
from fedloop_events.sqlite import PAGE_BYTES, SqliteLog

from benchmarks.harness import Row, interleaved_s, rates, scratch, seconds

_ATTRIBUTES = ("topic", "key", "source", "type", "signature")


def rows(quick: bool) -> list[Row]:
    count, chunk = (20_000, 2_000) if quick else (1_000_000, 20_000)
    result: list[Row] = []
    for label, words, signed in (("300 B", 3, False), ("1 KB, signed", 18, True)):
        make = _maker(words, signed=signed)
        for batch in (100, 1000):
            with scratch() as folder:
                result += _append(f"{label}, batches of {batch:,}", folder, make, batch, count, chunk)
                if batch == 1000:
                    result.append(_fold(label, folder, count, runs=1 if quick else 3))
    return result


def _append(what: str, folder: Path, make: Callable[[], Event], batch: int, count: int, chunk: int) -> list[Row]:
    """Both logs grow in turn, a chunk at a time, up to `count` events."""
    peer, log = _bare(folder / "peer.sqlite"), SqliteLog(folder / "log.sqlite")
    ours_s, theirs_s = [], []
    for _ in range(count // chunk):
        events = [make() for _ in range(chunk)]
        values = [(bytes(_size(event)),) for event in events]
        ours_s.append(seconds(lambda events=events: _batches(log.append, events, batch)))  # type: ignore[misc]
        theirs_s.append(seconds(lambda values=values: _batches(lambda part: _insert(peer, part), values, batch)))  # type: ignore[misc]
    log.close()
    peer.close()
    tenth = max(1, len(ours_s) // 10)
    first, last = chunk * tenth / sum(ours_s[:tenth]), chunk * tenth / sum(ours_s[-tenth:])
    name = f"append {count:,} events of {what}"
    return [
        rates(name, "bare apsw, same bytes, no ids", count / sum(ours_s), count / sum(theirs_s), "/s", 0.5),
        rates(f"{name}: last tenth", "its first tenth", last, first, "/s", 0.8),
    ]


def _fold(label: str, folder: Path, count: int, runs: int) -> Row:
    log = SqliteLog(folder / "log.sqlite")
    decoder = msgspec.json.Decoder(types.FeedbackRecorded)

    def ours() -> None:
        fold = _CountByKey()
        Reader(log, fold).catch_up()
        assert sum(fold.counts.values()) == count

    def theirs(part: list[bytes]) -> None:
        for data in part:
            decoder.decode(data)

    # The peer's bytes lie in memory, a slice of the log at a time, and nothing but the decoding is on its clock.
    sample = [record.data for record in islice(read_all(log), min(count, 100_000))]
    ours_s, theirs_s = interleaved_s([ours, lambda: theirs(sample)], runs=runs, warm=0)
    log.close()
    return rates(
        f"read, decode and fold {count:,} events of {label}",
        "msgspec decoding them",
        count / ours_s,
        len(sample) / theirs_s,
        "/s",
        0.5,
    )


class _CountByKey:
    topics = topics.ALL
    version = 1

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def apply(self, record: Record, payload: types.Payload) -> None:
        self.counts[record.key] = self.counts.get(record.key, 0) + 1

    def to_state(self) -> bytes:
        return msgspec.json.encode(self.counts)

    @classmethod
    def from_state(cls, state: bytes) -> _CountByKey:
        fold = cls()
        fold.counts = msgspec.json.decode(state)
        return fold


def _maker(words: int, *, signed: bool) -> Callable[[], Event]:
    """Makes feedback events, each with an id and a sequence number of its own. They share one signature: only its size counts."""
    seq = 0

    def payload() -> types.FeedbackRecorded:
        text = {"text": " ".join(["my card <CARD_1>"] * words), "counts": {"CARD": 1}}
        return types.FeedbackRecorded(
            origin="demo",
            client_id=f"device-{seq % 8}",
            seq=seq,
            feedback_id=f"f{seq}",
            response_id=f"r{seq}",
            release="0001-0123456789ab",
            use_case="default",
            text=msgspec.convert(text, MaskedText),
            predicted="card_arrival",
            thumb="up",
        )

    signature = (
        signatures.sign(envelope.encode(payload(), id=ids.new_id(), time_s=0), SigningKey.generate()).signature if signed else ""
    )

    def make() -> Event:
        nonlocal seq
        seq += 1
        event = envelope.encode(payload(), id=ids.new_id(), time_s=1_800_000_000)
        return msgspec.structs.replace(event, signature=signature)

    return make


def _size(event: Event) -> int:
    """Bytes of the event's columns: 16 of the id, 8 each of the two times."""
    return sum(len(getattr(event, name)) for name in _ATTRIBUTES) + len(event.data) + 16 + 8 + 8


def _bare(path: Path) -> apsw.Connection:
    connection = apsw.Connection(str(path))
    for statement in (
        f"PRAGMA page_size={PAGE_BYTES}",
        "PRAGMA journal_mode=WAL",
        "PRAGMA synchronous=FULL",
        "CREATE TABLE events (position INTEGER PRIMARY KEY, data BLOB NOT NULL)",
    ):
        connection.execute(statement).fetchall()
    return connection


def _insert(connection: apsw.Connection, values: Sequence[tuple[bytes]]) -> None:
    connection.execute("BEGIN IMMEDIATE")
    connection.executemany("INSERT INTO events (data) VALUES (?)", values)
    connection.execute("COMMIT")


def _batches(write: Callable[[Any], None], items: list[Any], batch: int) -> None:
    for start in range(0, len(items), batch):
        write(items[start : start + batch])
