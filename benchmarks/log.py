"""The log: durable append, and read, decode and fold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

import apsw
import msgspec
from fedloop_events import envelope, ids, signatures, types
from fedloop_events.envelope import Event
from fedloop_events.logs.port import Position, read_all
from fedloop_events.logs.sqlite import STREAM, SqliteLog
from fedloop_events.logs.sqlite_file import PAGE_BYTES
from fedloop_events.masked import MaskedText
from fedloop_events.signatures import SigningKey

from benchmarks.harness import Row, rates, scratch, seconds

_ATTRIBUTES = ("topic", "key", "source", "type", "signature")


def rows(quick: bool) -> list[Row]:
    count, chunk = (20_000, 2_000) if quick else (1_000_000, 10_000)
    result: list[Row] = []
    for label, words, signed in (("300 B", 3, False), ("1 KB, signed", 18, True)):
        make = maker(words, signed=signed)
        for batch in (100, 1000):
            with scratch() as folder:
                result += _append(f"{label}, batches of {batch:,}", folder, make, batch, count, chunk)
                if batch == 1000:
                    result.append(_fold(label, folder, count, chunk))
    return result


def _append(what: str, folder: Path, make: Callable[[], Event], batch: int, count: int, chunk: int) -> list[Row]:
    """Both logs grow in turn, a chunk at a time, up to `count` events."""
    peer, log = _bare(folder / "peer.sqlite"), SqliteLog(folder / "log.sqlite")
    ours_s, theirs_s = [], []
    for _ in range(count // chunk):
        events = [make() for _ in range(chunk)]
        values = [(bytes(_size(event)),) for event in events]
        ours_s.append(seconds(partial(_batches, log.append, events, batch)))
        theirs_s.append(seconds(partial(_batches, partial(_insert, peer), values, batch)))
    log.close()
    peer.close()
    # The peer has no index that could slow down as the log grows, and shares every bad moment of the disk.
    relative = [theirs / ours for ours, theirs in zip(ours_s, theirs_s, strict=True)]
    tenth = max(1, len(relative) // 10)
    name = f"append {count:,} events of {what}"
    return [
        rates(name, "bare apsw, same bytes, no ids", count / sum(ours_s), count / sum(theirs_s), "/s", 0.5),
        rates(f"{name}: last tenth", "first tenth", median(relative[-tenth:]), median(relative[:tenth]), "of bare apsw", 0.8),
    ]


def _fold(label: str, folder: Path, count: int, chunk: int) -> Row:
    """A chunk is read from the log, decoded and folded; then the peer decodes the same bytes, which lie in memory."""
    log = SqliteLog(folder / "log.sqlite")
    decoder = msgspec.json.Decoder(types.FeedbackRecorded)
    records = read_all(log)
    counts: Counter[str] = Counter()

    def ours() -> None:
        for record in islice(records, chunk):
            payload = envelope.expect(record, types.FeedbackRecorded)
            counts[payload.client_id] += 1

    def theirs(part: list[bytes]) -> None:
        for data in part:
            decoder.decode(data)

    ours_s, theirs_s = [], []
    for start in range(0, count, chunk):
        part = [record.data for record in islice(read_all(log, after=Position({STREAM: start})), chunk)]
        ours_s.append(seconds(ours))
        theirs_s.append(seconds(partial(theirs, part)))
    assert counts.total() == count
    log.close()
    what = f"read, decode and fold {count:,} events of {label}"
    return rates(what, "msgspec decoding the same bytes", count / sum(ours_s), count / sum(theirs_s), "/s", 0.5)


def maker(words: int, *, signed: bool) -> Callable[[], Event]:
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
