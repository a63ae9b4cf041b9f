"""The processes of the fault test: `python -m faults.workers produce|confirm|follow|resume JSON`.

They write what they did, a line each, and end when their standard input does. Nothing stops them but a broken promise.
"""

from __future__ import annotations

import hashlib
import os
import random
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import msgspec
import samples
from faults.checker import Call, Mark, Seen
from fedloop_events import envelope, ids, topics, types
from fedloop_events.envelope import Event, Record
from fedloop_events.errors import UnreachableError
from fedloop_events.kafka import KafkaLog
from fedloop_events.log import START, Position
from fedloop_events.projections import Reader
from msgspec import Struct

TOPICS: Final = (topics.CLIENTS, topics.FEEDBACK, topics.ROUNDS, topics.UPDATES)
KEYS_EACH: Final = 5
"""Of one producer in one topic."""
LARGEST_BATCH: Final = 200
MOST_SWITCHES: Final = 10_000
"""In a second, of all threads of a reader: ten times what reading takes, and a tenth of what one makes that spins."""
_ORIGIN: Final = "faults"
_NEWS_S: Final = 0.5
_PAUSE_S: Final = 0.5
"""Of a reader that has come to the end, so that it does not take the processor from the brokers."""
_PAGE: Final = 250


class Task(Struct, frozen=True):
    """What a worker is to do. `rate` is events a second, of a producer; `leg` events of one process of a resuming reader."""

    url: str
    name: str
    folder: str
    timeout_s: float
    seed: int = 0
    rate: float = 0.0
    leg: int = 0

    @property
    def output(self) -> Path:
        return Path(self.folder, self.name)


def mark(event: Event) -> Mark:
    content = (event.source, event.type, str(event.time_s), event.signature, event.data.decode())
    digest = hashlib.blake2b("\0".join(content).encode(), digest_size=8).hexdigest()
    return Mark(f"{event.topic}/{event.key}", event.id, digest)


def _payload(topic: str, who: str, number: int) -> types.Payload:
    match topic:
        case topics.CLIENTS:
            return types.ClientSeen(_ORIGIN, who, number, 64)
        case topics.FEEDBACK:
            return samples.feedback(number, who)
        case topics.UPDATES:
            return types.RoundDeclined(_ORIGIN, who, number, "run", "0" * 32, "busy")
        case _:
            return types.EpochStarted(_ORIGIN, number, who, "server")


class Workload:
    """A producer's events: keys of its own in each topic, numbered one by one, in batches of any size."""

    def __init__(self, name: str, seed: int) -> None:
        self._name, self._random = name, random.Random(f"{seed} {name}")
        self._next: dict[tuple[str, str], int] = {}

    def batch(self) -> list[Event]:
        size = self._random.choice((1, 5, *[self._random.randint(1, LARGEST_BATCH)] * 4))
        return [self.one(self._random.choice(TOPICS)) for _ in range(size)]

    def one(self, topic: str) -> Event:
        who = f"{self._name}-{self._random.randrange(KEYS_EACH)}"
        number = self._next[topic, who] = self._next.get((topic, who), 0) + 1
        payload = _payload(topic, who, number)
        return envelope.encode(payload, id=ids.derived_id("faults", topic, who, number), time_s=1_800_000_000)


class Lines:
    """A file to which lines are added whole."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def add(self, values: Sequence[object]) -> None:
        data = b"".join(msgspec.json.encode(value) + b"\n" for value in values)
        while data:
            data = data[os.write(self._descriptor, data) :]


def persistently(act: Callable[[], None]) -> int:
    """Do it until it is done; how often it was begun."""
    attempts = 0
    while True:
        attempts += 1
        try:
            act()
        except UnreachableError:
            continue
        return attempts


@contextmanager
def calmly() -> Iterator[None]:
    """In here this process waits for whatever is away, and does not spin."""
    began, before = time.monotonic(), _switches()
    try:
        yield
    finally:
        took_s, made = time.monotonic() - began, _switches() - before
        assert made <= MOST_SWITCHES * (1 + took_s), f"{made:,} context switches in {took_s:.1f} s: a thread spins"


def _switches() -> int:
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_nvcsw + used.ru_nivcsw


def opened(task: Task) -> KafkaLog:
    found: list[KafkaLog] = []
    persistently(lambda: found.append(KafkaLog(task.url, timeout_s=task.timeout_s)))
    return found[0]


def produce(task: Task, stop: threading.Event) -> None:
    log, work, lines = opened(task), Workload(task.name, task.seed), Lines(task.output)
    began = time.monotonic()
    sent = 0
    while not stop.is_set():
        events = work.batch()
        at = time.monotonic()
        attempts = persistently(lambda batch=events: log.append(batch))  # type: ignore[misc]
        lines.add([Call(task.name, at, time.monotonic(), attempts, [mark(event) for event in events])])
        sent += len(events)
        stop.wait(began + sent / task.rate - time.monotonic())


class Folded:
    """A fold over everything: it counts an id once."""

    topics = TOPICS

    def __init__(self, lines: Lines) -> None:
        self._lines, self._known = lines, set[str]()
        self.fresh: list[Seen] = []

    def apply(self, record: Record, payload: types.Payload) -> None:
        if record.id not in self._known:
            self._known.add(record.id)
            self.fresh.append(seen(record))

    def flush(self) -> None:
        self._lines.add(self.fresh)
        self.fresh.clear()


def seen(record: Record) -> Seen:
    return Seen(record.stream, record.offset, mark(record))


def confirm(task: Task, stop: threading.Event) -> None:
    """Append one event after another, and read each back at once: what was acknowledged is there for whoever begins to read."""
    log, work, lines = opened(task), Workload(task.name, task.seed), Lines(task.output)
    position = START
    while not stop.is_set():
        event = work.one(topics.ROUNDS)
        at = time.monotonic()
        attempts = persistently(lambda event=event: log.append([event]))  # type: ignore[misc]
        lines.add([Call(task.name, at, time.monotonic(), attempts, [mark(event)])])
        found = False
        while True:
            try:
                batch = log.read((topics.ROUNDS,), position)
            except UnreachableError:
                continue
            position = batch.position
            found |= any(record.id == event.id for record in batch.records)
            if not batch.records:
                break
        assert found, f"event {event.id} was acknowledged and not read"
        stop.wait(1 / task.rate)


def follow(task: Task, stop: threading.Event) -> None:
    """Fold from the beginning; once the end was announced, until nothing more comes."""
    fold = Folded(Lines(task.output))
    reader = Reader(opened(task), fold)
    while True:
        ending = stop.is_set()
        try:
            with calmly():
                count = reader.wait(_NEWS_S)
        except UnreachableError:
            continue
        fold.flush()
        if ending and not count:
            break
        stop.wait(_PAUSE_S)
    assert reader.refused == reader.unknown == 0


def resume(task: Task, stop: threading.Event) -> None:
    """Read `leg` events on from where the last process came to; with status 3 if there may be more.

    Events are written down before the position, as a projection and its position are in one snapshot: after a kill between the
    two the next process would see some again, so what was written beyond the position is cut off first.
    """
    position, size, kept = START, 0, task.output.with_suffix(".position")
    if kept.exists():
        position, size = msgspec.json.decode(kept.read_bytes(), type=tuple[Position, int])
    task.output.touch()
    os.truncate(task.output, size)
    lines, log = Lines(task.output), opened(task)
    left = task.leg
    while left > 0:
        try:
            ending = stop.is_set()
            with calmly():
                batch = log.read(TOPICS, position, limit=min(left, _PAGE), wait_s=_NEWS_S)
        except UnreachableError:
            continue
        lines.add([seen(record) for record in batch.records])
        position, left = batch.position, left - len(batch.records)
        fresh = kept.with_suffix(".new")
        fresh.write_bytes(msgspec.json.encode((position, task.output.stat().st_size)))
        fresh.replace(kept)
        if ending and not batch.records:
            return
        if not batch.records:
            stop.wait(_PAUSE_S)
    sys.exit(3)


def main() -> None:
    stop = threading.Event()

    def listen() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=listen, daemon=True).start()
    what = {"produce": produce, "confirm": confirm, "follow": follow, "resume": resume}[sys.argv[1]]
    what(msgspec.json.decode(sys.argv[2], type=Task), stop)


if __name__ == "__main__":
    main()
