"""100,000 acknowledged events through the faults of a cluster: none lost, none twice after folding, in order within each key.

And no reader spins meanwhile, which would keep the processor from the brokers.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import secrets
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec
import pytest
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, TopicPartition
from faults import checker, workers
from faults.checker import Call, Reading, Seen
from faults.cluster import CutCluster
from faults.nemesis import Happened, Nemesis, schedule
from faults.workers import TOPICS, Task
from fedloop_events import topics
from fedloop_events.kafka import KafkaLog, codec

ACKNOWLEDGED: Final = 100_000
PRODUCERS: Final = ("p1", "p2", "p3", "p4")
GIVE_UP_S: Final = 8.0
"""Of the producers: shorter than some faults, so that they have to append the same events again."""
EXPECTED_S: Final = 60.0
"""How long the faults take together; the producers spread their events over it."""
ALL_IN_S: Final = 180.0
"""By when the rest must be acknowledged and read, once nothing goes wrong any more."""
TESTS: Final = Path(__file__).parents[1]
PREFIX: Final = "faults"


class History:
    """What happened, in a folder, and what is to be said of it."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        self.happened: list[Happened] = []
        self._began = time.monotonic()

    def now_s(self) -> float:
        return time.monotonic() - self._began

    def calls(self, name: str) -> list[Call]:
        return [msgspec.json.decode(line, type=Call) for line in lines(self.folder / name)]

    def reading(self, name: str, *, folded: bool) -> Reading:
        return Reading(name, [msgspec.json.decode(line, type=Seen) for line in lines(self.folder / name)], folded)

    def acknowledged(self) -> int:
        return sum(len(call.events) for name in PRODUCERS for call in self.calls(name))

    def summary(self, calls: list[Call], raw: Reading, violations: int) -> str:
        ended = sorted(call.ended_s - self._began for call in calls)
        gaps = [(later - earlier, earlier) for earlier, later in itertools.pairwise(ended)]
        longest, at = max(gaps)
        slow = sorted(call.ended_s - call.began_s for call in calls)
        text = [
            f"seed {self.seed}, history in {self.folder}",
            f"{sum(len(call.events) for call in calls):,} events acknowledged in {len(calls):,} calls; "
            f"{sum(call.attempts > 1 for call in calls)} of them had to be made again",
            f"{len(raw.seen):,} events in the log, {checker.duplicates(raw):,} of them twice",
            f"longest time without any progress {longest:.1f} s, at {at:.1f} s; longest call {slow[-1]:.1f} s, "
            f"median {slow[len(slow) // 2] * 1000:.0f} ms",
            *(f"{each.began_s:6.1f} s  {each.fault}, node {each.node}, over after {each.away_s:.1f} s" for each in self.happened),
            f"{violations} violations",
        ]
        return "\n".join(text)


def lines(path: Path) -> list[bytes]:
    """The whole ones: another process may be writing."""
    return path.read_bytes().split(b"\n")[:-1] if path.exists() else []


class Worker:
    """One process of `workers`. It is told to end by `end`."""

    def __init__(self, what: str, task: Task) -> None:
        paths = [str(TESTS), os.environ.get("PYTHONPATH", "")]
        self.name = task.name
        self._errors = task.output.with_suffix(".errors")
        with self._errors.open("ab") as errors:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "faults.workers", what, msgspec.json.encode(task).decode()],
                stdin=subprocess.PIPE,
                stderr=errors,
                env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)), "OMP_NUM_THREADS": "1"},
            )

    def end(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()
        self.end()

    def check(self, *expected: int) -> None:
        status = self.process.poll()
        assert status in (None, *expected), f"{self.name} ended with {status}: {self._errors.read_text()[-2000:]}"


class Resumed:
    """A reader whose process ends, or is killed, again and again; the next one goes on from the position on disk."""

    def __init__(self, task: Task) -> None:
        self._task, self._ending = task, False
        self.processes = 0
        self._start()

    def _start(self) -> None:
        self._worker = Worker("resume", self._task)
        self.processes += 1
        if self._ending:
            self._worker.end()

    def tick(self) -> bool:
        """Whether it still runs."""
        self._worker.check(0, 3, -9)
        status = self._worker.process.poll()
        if status in (3, -9):
            self._worker.kill()
            self._start()
        return status != 0

    def kill(self) -> None:
        self._worker.kill()

    def end(self) -> None:
        self._ending = True
        self._worker.end()


@pytest.mark.slow
@pytest.mark.kafka
@pytest.mark.timeout(600)
def test_what_was_acknowledged_survives_the_faults_of_a_cluster(tmp_path: Path) -> None:
    seed = int(os.environ.get("FEDLOOP_TEST_SEED", secrets.randbelow(1_000_000)))
    history = History(tmp_path / "history", seed)
    history.folder.mkdir()
    print(f"seed {seed} (FEDLOOP_TEST_SEED repeats its schedule)")
    with contextlib.ExitStack() as stack:
        cluster = CutCluster(tmp_path / "cluster")
        for proxy in cluster.proxies:
            stack.enter_context(proxy)
        stack.enter_context(cluster)
        print(f"{history.now_s():6.1f} s  three brokers have started")
        KafkaLog(f"kafka://{cluster.bootstrap}/{PREFIX}", create=True, timeout_s=60.0).close()
        played(cluster, history)
        raw = Reading("raw", dump(cluster.bootstrap), folded=False)
    print(f"{history.now_s():6.1f} s  all was read")
    calls = [call for name in (*PRODUCERS, "confirm") for call in history.calls(name)]
    readings = [history.reading("folded", folded=True), history.reading("resumed", folded=False), raw]
    violations = checker.check(calls, readings)
    summary = history.summary(calls, raw, len(violations))
    (history.folder / "summary.txt").write_text(summary)
    print(summary)
    assert not violations, f"{violations[:10]}\n{summary}"
    assert history.acknowledged() >= ACKNOWLEDGED


def played(cluster: CutCluster, history: History) -> None:
    """Let the producers and readers work while the schedule is played, and until all is acknowledged and read."""

    def task(name: str, timeout_s: float, *, cut: bool = False, rate: float = 0.0, leg: int = 0) -> Task:
        url = f"kafka://{cluster.cut_bootstrap if cut else cluster.bootstrap}/{PREFIX}"
        return Task(url, name, str(history.folder), timeout_s, history.seed, rate, leg)

    rate = 1.1 * ACKNOWLEDGED / EXPECTED_S / len(PRODUCERS)
    with contextlib.ExitStack() as stack:
        producers = [Worker("produce", task(name, GIVE_UP_S, cut=True, rate=rate)) for name in PRODUCERS]
        producers.append(Worker("confirm", task("confirm", GIVE_UP_S, rate=10.0)))
        follower = Worker("follow", task("folded", 2 * GIVE_UP_S))
        resumed = Resumed(task("resumed", 2 * GIVE_UP_S, leg=25_000))
        for worker in (*producers, follower):
            stack.callback(worker.kill)
        stack.callback(resumed.kill)

        def wait(seconds: float) -> None:
            """Go on as soon as it is over; a worker that has ended is an error at once."""
            deadline = time.monotonic() + seconds
            while True:
                for worker in (*producers, follower):
                    worker.check()
                resumed.tick()
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return
                time.sleep(min(left_s, 0.1))

        pids = {worker.name: worker.process.pid for worker in producers}
        nemesis = Nemesis(cluster, PREFIX, pids, wait, history.now_s)
        until(wait, lambda: all(history.calls(name) for name in PRODUCERS))
        for fault in schedule(history.seed, TOPICS, PRODUCERS):
            print(f"{history.now_s():6.1f} s  {fault}", flush=True)
            history.happened.append(nemesis.inflict(fault))
            resumed.kill()
        until(wait, lambda: history.acknowledged() >= ACKNOWLEDGED)
        for worker in producers:
            worker.end()
        for worker in producers:
            assert worker.process.wait(ALL_IN_S) == 0
        follower.end()
        resumed.end()
        assert follower.process.wait(ALL_IN_S) == 0
        deadline = time.monotonic() + ALL_IN_S
        while resumed.tick():
            assert time.monotonic() < deadline
            time.sleep(0.05)
        print(f"{history.now_s():6.1f} s  the resumed reader took {resumed.processes} processes")


def until(wait: Callable[[float], None], condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + ALL_IN_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        wait(0.2)


def dump(bootstrap: str) -> list[Seen]:
    """Everything that lies in the topics, as a consumer that knows nothing of the log finds it."""
    places = [
        TopicPartition(f"{PREFIX}.{name}", number, OFFSET_BEGINNING)
        for name in TOPICS
        for number in range(topics.DECLARED[name].partitions)
    ]
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "none", "enable.partition.eof": True, "log_level": 0})
    consumer.assign(places)
    found, open_places = list[Seen](), len(places)
    deadline = time.monotonic() + ALL_IN_S
    while open_places:
        assert time.monotonic() < deadline
        for message in consumer.consume(1000, 1.0):
            error = message.error()
            if error is not None:
                open_places -= error.code() == KafkaError._PARTITION_EOF
                continue
            record = codec.record(
                message.topic().removeprefix(f"{PREFIX}."),
                message.key(),
                message.value(),
                message.headers(),
                stream=f"{message.topic()}-{message.partition()}",
                offset=message.offset() + 1,
                appended_ms=0,
            )
            found.append(workers.seen(record))
    consumer.close()
    return found
