"""The feedback pipeline: how fast it takes feedback in, how soon what it found can be read, and what it keeps in memory."""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import quantiles
from typing import Final

import msgspec
from fedloop_events import envelope, ids, signatures, topics, types
from fedloop_events.envelope import Event, Record
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_events.masked import MaskedText
from fedloop_events.signatures import SigningKey
from fedloop_events.writer import EventWriter
from fedloop_server.config import ServerConfig
from fedloop_server.feedback.pipeline import Pipeline
from fedloop_server.feedback.running import operators
from fedloop_server.feedback.states import States
from fedloop_tasks.classification.plan import ClassificationPlan

from benchmarks.harness import MIN_RUNS, Row, costs, in_turn, peak_rss_bytes, per_second, rates, scratch, seconds

ORIGIN: Final = "bench"
CLIENTS: Final = 50
ANSWERS: Final = 40
RATE: Final = 500
WITHIN_S: Final = 1.0
"""95 of 100 pieces of feedback can be read as scored so soon after they were appended."""
_WORDS: Final = (
    "my",
    "card",
    "has",
    "not",
    "come",
    "yet",
    "and",
    "nobody",
    "answers",
    "please",
    "tell",
    "me",
    "what",
    "to",
    "do",
)


def rows(quick: bool) -> Iterator[Row]:
    count, runs = (1_000, 1) if quick else (20_000, MIN_RUNS)
    with scratch() as folder:
        filled(folder / "log.sqlite", count).close()
        pairs = [(ours, theirs) for ours, theirs in in_turn([partial(piped, folder), partial(folded, folder, count)], runs=runs)]
    what = f"feedback of 1 KB through all operators, {count:,} events"
    yield rates(what, "read, decode and fold", per_second(count, pairs), "/s", 0.1)
    found = [soon(2 if quick else 20) for _ in range(runs)]
    what = f"from appended to scored, {RATE} events a second, 95 of 100"
    yield costs(what, "the bound", [(each, WITHIN_S) for each in found], "s", 1.0)
    small, large = (1_000, 2_000) if quick else (20_000, 100_000)
    used = [(memory(large), memory(small)) for _ in range(runs)]
    yield costs(f"memory of the pipeline after {large:,} events", f"after {small:,}", used, "MB", None if quick else 0.9)


class Clients:
    """Signs feedback of 1 KB or so of clients that are enrolled."""

    def __init__(self, seed: int = 0) -> None:
        self.keys = [SigningKey.from_private_bytes(bytes([number + 1]) * 32) for number in range(CLIENTS)]
        self.server = SigningKey.from_private_bytes(b"\xff" * 32)
        self._random = random.Random(seed)
        self._number = 0

    def enrolments(self) -> Iterator[Event]:
        yield self._signed(types.DeploymentCreated(origin=ORIGIN, public_key=self.server.public_key), self.server)
        for number, key in enumerate(self.keys):
            client = types.ClientEnrolled(
                origin=ORIGIN,
                client_id=f"c{number}",
                seq=0,
                public_key=key.public_key,
                node_id=str(number + 1),
                epsilon=8.0,
                delta=1e-5,
            )
            yield self._signed(client, key)

    def feedback(self, count: int) -> list[Event]:
        return [self._feedback() for _ in range(count)]

    def _feedback(self) -> Event:
        self._number += 1
        number, draw = self._number % CLIENTS, self._random
        right = draw.random() < 0.8
        answer = f"answer_{draw.randrange(ANSWERS)}"
        payload = types.FeedbackRecorded(
            origin=ORIGIN,
            client_id=f"c{number}",
            seq=self._number,
            feedback_id=f"f{self._number}",
            response_id=f"r{self._number}",
            release="0001-0123456789ab",
            use_case="default",
            text=self._text(60),
            predicted=answer,
            thumb="up" if right else "down",
            label=None if right else f"answer_{draw.randrange(ANSWERS)}",
            comment=self._text(20),
        )
        return self._signed(payload, self.keys[number])

    def _text(self, words: int) -> MaskedText:
        text = " ".join(self._random.choices(_WORDS, k=words)) + f" <PERSON_1> {self._number}"
        return msgspec.convert({"text": text, "counts": {"PERSON": 1}}, MaskedText)

    def _signed(self, payload: types.Payload, key: SigningKey) -> Event:
        return signatures.sign(envelope.encode(payload, id=ids.new_id(), time_s=int(time.time())), key)


class Count:
    """The peer's fold."""

    topics = (topics.FEEDBACK,)

    def __init__(self) -> None:
        self.up = self.down = 0

    def apply(self, record: Record, payload: types.Payload) -> None:
        if isinstance(payload, types.FeedbackRecorded):
            self.up += payload.thumb == "up"
            self.down += payload.thumb == "down"


def filled(path: Path, count: int) -> SqliteLog:
    log, clients = SqliteLog(path), Clients()
    log.append(list(clients.enrolments()))
    for first in range(0, count, 1_000):
        log.append(clients.feedback(min(1_000, count - first)))
    return log


def pipeline(log: SqliteLog, states: States) -> Pipeline:
    config = ServerConfig(plan=ClassificationPlan())
    return Pipeline(log, EventWriter(log, Clients().server), operators(config), states)


def piped(folder: Path) -> float:
    """Seconds of the pipeline, whose log nothing has read yet."""
    with scratch() as fresh:
        shutil.copy(folder / "log.sqlite", fresh)
        log = SqliteLog(fresh / "log.sqlite")
        with States(fresh / "states.sqlite") as states:
            took_s = seconds(partial(pipeline(log, states).run, threading.Event(), until_idle=True))
        log.close()
    return took_s


def folded(folder: Path, count: int) -> float:
    """Seconds of the peer."""
    log = SqliteLog(folder / "log.sqlite")
    reader = Reader(log, Count(), identities=Identities())
    took_s = seconds(reader.catch_up)
    log.close()
    assert reader.fold.up + reader.fold.down == count
    return took_s


def soon(lasts_s: int) -> float:
    """Seconds within which 95 of 100 pieces of feedback were there to be read as scored."""
    stop, appended, took = threading.Event(), dict[str, float](), list[float]()
    with scratch() as folder:
        clients, log = Clients(), filled(folder / "log.sqlite", 0)
        with States(folder / "states.sqlite") as states:
            run = threading.Thread(target=pipeline(log, states).run, args=(stop,))
            append = threading.Thread(target=_append, args=(log, clients, lasts_s, appended))
            run.start()
            append.start()
            position = log.end()
            while append.is_alive() or len(took) < len(appended):
                batch = log.read((topics.SCORED,), position, wait_s=0.1)
                position, now_s = batch.position, time.perf_counter()
                took += [now_s - appended[envelope.expect(each, types.FeedbackScored).event_id] for each in batch.records]
            append.join()
            stop.set()
            run.join()
        log.close()
    return quantiles(took, n=20)[-1]


def _append(log: SqliteLog, clients: Clients, lasts_s: int, appended: dict[str, float]) -> None:
    """`RATE` events a second, ten at a time."""
    began_s = time.perf_counter()
    for number in range(lasts_s * RATE // 10):
        time.sleep(max(0.0, began_s + number * 10 / RATE - time.perf_counter()))
        events = clients.feedback(10)
        appended |= dict.fromkeys((each.id for each in events), time.perf_counter())
        log.append(events)


def memory(count: int) -> float:
    """MB that a process has in use at its most, which takes in so many events; they are made by another."""
    with scratch() as folder:
        filled(folder / "log.sqlite", count).close()
        run = subprocess.run(
            [sys.executable, "-m", "benchmarks.pipeline", str(folder)], check=True, stdout=subprocess.PIPE, text=True
        )
    return float(run.stdout)


def main(folder: Path) -> None:
    log = SqliteLog(folder / "log.sqlite")
    with States(folder / "states.sqlite") as states:
        pipeline(log, states).run(threading.Event(), until_idle=True)
    print(peak_rss_bytes() / 1e6)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
