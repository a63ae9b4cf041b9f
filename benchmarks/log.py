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

from benchmarks.harness import Pair, Row, per_second, rates, scratch, seconds

_ATTRIBUTES = ("topic", "key", "source", "type", "signature")


def rows(quick: bool) -> list[Row]:
    count, chunk, runs = (20_000, 2_000, 1) if quick else (1_000_000, 10_000, 3)
    result: list[Row] = []
    for label, words, signed in (("300 B", 3, False), ("1 KB, signed", 18, True)):
        make = maker(words, signed=signed)
        for batch in (100, 1000):
            appended: list[Pair] = []
            tenths: list[Pair] = []
            folded: list[Pair] = []
            for _ in range(runs):
                with scratch() as folder:
                    chunks = _append(folder, make, batch, count, chunk)
                    appended.append(Pair(*map(sum, zip(*chunks, strict=True))))
                    tenths.append(_last_and_first_tenth(chunks))
                    if batch == 1000:
                        folded.append(_fold(folder, count, chunk))
            name = f"append {count:,} events of {label}, batches of {batch:,}"
            result.append(rates(name, "bare apsw, same bytes, no ids", per_second(count, appended), "/s", 0.5))
            result.append(rates(f"{name}: last tenth", "first tenth", tenths, "of bare apsw", 0.8))
            if folded:
                name = f"read, decode and fold {count:,} events of {label}"
                result.append(rates(name, "msgspec decoding the same bytes", per_second(count, folded), "/s", 0.5))
    return result


def _append(folder: Path, make: Callable[[], Event], batch: int, count: int, chunk: int) -> list[Pair]:
    """Both logs grow up to `count` events, a chunk at a time, and take turns at going first; the seconds of each chunk."""
    peer, log = _bare(folder / "peer.sqlite"), SqliteLog(folder / "log.sqlite")
    times = []
    for number in range(count // chunk):
        events = [make() for _ in range(chunk)]
        values = [(bytes(_size(event)),) for event in events]
        ours, theirs = partial(_batches, log.append, events, batch), partial(_batches, partial(_insert, peer), values, batch)
        if number % 2:
            theirs_s, ours_s = seconds(theirs), seconds(ours)
        else:
            ours_s, theirs_s = seconds(ours), seconds(theirs)
        times.append(Pair(ours_s, theirs_s))
    log.close()
    peer.close()
    return times


def _last_and_first_tenth(chunks: Sequence[Pair]) -> Pair:
    """The speed of each, relative to the peer: it has no index that could slow down, and shares every bad moment of the disk."""
    relative = [theirs_s / ours_s for ours_s, theirs_s in chunks]
    tenth = max(1, len(relative) // 10)
    return Pair(median(relative[-tenth:]), median(relative[:tenth]))


def _fold(folder: Path, count: int, chunk: int) -> Pair:
    """A chunk is read from the log, decoded and folded; then the peer decodes the same bytes, which lie in memory. Seconds."""
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

    ours_s = theirs_s = 0.0
    for start in range(0, count, chunk):
        part = [record.data for record in islice(read_all(log, after=Position({STREAM: start})), chunk)]
        ours_s += seconds(ours)
        theirs_s += seconds(partial(theirs, part))
    assert counts.total() == count
    log.close()
    return Pair(ours_s, theirs_s)


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
