"""What every `EventLog` promises. An adapter joins by adding an opener to `OPENERS`."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import msgspec
import pytest
import samples
from fedloop_events import ids, topics
from fedloop_events.envelope import Event
from fedloop_events.errors import InvalidEventError
from fedloop_events.logs.kafka import KafkaLog
from fedloop_events.logs.port import START, EventLog, Position, read_all
from fedloop_events.logs.sqlite import SqliteLog
from gateway import contract

Open = Callable[[], EventLog]


class Opener:
    """How to open one log again and again, from any process: it must survive being sent to a spawned one."""

    def __init__(self, kind: str, where: str) -> None:
        self.kind, self.where = kind, where

    def __call__(self) -> EventLog:
        return OPENERS[self.kind](self.where)


OPENERS: dict[str, Callable[[str], EventLog]] = {
    "sqlite": lambda where: SqliteLog(Path(where) / "log.sqlite"),
    "kafka": lambda where: KafkaLog(where, create=True),
    "gateway": contract.open_gateway,
}


@pytest.fixture(
    params=["sqlite", "gateway", *(pytest.param(kind, marks=pytest.mark.kafka) for kind in ("kafka", "gateway before kafka"))]
)
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Opener]:
    kind, _, behind = request.param.partition(" before ")
    where = request.getfixturevalue("kafka_url") if "kafka" in request.param else str(tmp_path)
    if kind != "gateway":
        yield Opener(kind, where)
        return
    with contract.gateway(tmp_path, OPENERS[behind or "sqlite"](where)) as served:
        yield Opener(kind, contract.where(served))


@pytest.fixture
def log(opener: Opener) -> Iterator[EventLog]:
    log = opener()
    yield log
    log.close()


def test_it_is_an_event_log(log: EventLog) -> None:
    assert isinstance(log, EventLog)


def test_what_was_appended_is_read_in_order_and_whole(log: EventLog) -> None:
    events = [samples.signed(samples.feedback(number)) for number in range(5)]
    log.append(events[:2])
    log.append(events[2:])
    records = list(read_all(log))
    assert events == [Event(**{name: getattr(record, name) for name in Event.__struct_fields__}) for record in records]
    assert all(one.offset < other.offset and one.stream == other.stream for one, other in itertools.pairwise(records))
    assert all(0 < one.appended_ms <= other.appended_ms for one, other in itertools.pairwise(records))


def test_an_empty_append_is_nothing(log: EventLog) -> None:
    log.append([])
    assert log.read().records == []


def test_an_event_that_is_appended_again_counts_once(log: EventLog) -> None:
    first, second = samples.signed(samples.feedback(1), number=7), samples.signed(samples.feedback(3))
    log.append([first])
    log.append([first, second, first])
    assert [record.data for record in read_all(log)] == [first.data, second.data]


def test_of_two_events_under_one_id_the_first_comes_first(log: EventLog) -> None:
    first, second = samples.signed(samples.feedback(1), number=7), samples.signed(samples.feedback(2), number=7)
    log.append([first])
    log.append([second, samples.signed(samples.feedback(3))])
    read = [record.data for record in read_all(log)]
    assert read[0] == first.data
    assert read[-1] == samples.signed(samples.feedback(3)).data


def test_the_same_id_twice_in_one_batch_counts_once(log: EventLog) -> None:
    event = samples.signed(samples.feedback())
    log.append([event, event])
    assert len(list(read_all(log))) == 1


def test_a_large_batch_keeps_its_order_and_each_id_once(log: EventLog) -> None:
    numbers = [*range(130), *range(60, 190), 5, 5]
    log.append([samples.signed(samples.feedback(number), number=number) for number in numbers])
    assert [record.data for record in read_all(log)] == [samples.signed(samples.feedback(number)).data for number in range(190)]


def test_a_batch_with_one_bad_event_appends_nothing(log: EventLog) -> None:
    good = samples.signed(samples.feedback())
    for change in ({"id": "0" * 31}, {"id": "A" * 32}, {"id": " " * 32}, {"data": b""}, {"data": b"x" * 62_000}, {"topic": "x"}):
        with pytest.raises(InvalidEventError):
            log.append([good, msgspec.structs.replace(good, **change)])
    assert list(read_all(log)) == []


def test_reading_goes_on_from_a_position(log: EventLog) -> None:
    log.append([samples.signed(samples.feedback(number)) for number in range(5)])
    first = log.read(limit=2)
    second = log.read(after=first.position, limit=2)
    third = log.read(after=second.position, limit=2)
    assert [len(batch.records) for batch in (first, second, third)] == [2, 2, 1]
    assert len({record.id for batch in (first, second, third) for record in batch.records}) == 5
    assert log.read(after=third.position).records == []


def test_a_position_survives_json(log: EventLog) -> None:
    log.append([samples.signed(samples.feedback(number)) for number in range(3)])
    position = msgspec.json.decode(msgspec.json.encode(log.read(limit=1).position), type=Position)
    assert len(log.read(after=position).records) == 2


def test_only_the_topics_asked_for_are_read_in_the_order_of_each_key(log: EventLog) -> None:
    payloads = [samples.feedback(1), samples.epoch(1), samples.seen(), samples.feedback(2), samples.epoch(2), samples.feedback(3)]
    log.append([samples.signed(payload) for payload in payloads])
    for wanted in ((topics.ROUNDS,), (topics.ROUNDS, topics.CLIENTS), (topics.FEEDBACK, topics.ROUNDS), topics.ALL, ()):
        expected = [payload for payload in payloads if payload.topic in wanted]
        records = list(read_all(log, wanted))
        for topic in wanted:
            assert [r.data for r in records if r.topic == topic] == [
                samples.signed(p, number=0).data for p in expected if p.topic == topic
            ]
        assert len(records) == len(expected)


def test_limits_hold_with_topics_too(log: EventLog) -> None:
    log.append(
        [samples.signed(p) for number in range(9) for p in (samples.feedback(number), samples.epoch(number), samples.seen())]
    )
    after, offsets = START, list[tuple[str, int]]()
    while records := (batch := log.read((topics.ROUNDS, topics.CLIENTS), after, limit=4)).records:
        assert len(records) <= 4
        offsets += [(record.stream, record.offset) for record in records]
        after = batch.position
    assert len(offsets) == len(set(offsets)) == 18


def test_the_position_passes_what_other_topics_hold(log: EventLog) -> None:
    log.append([samples.signed(samples.feedback(number)) for number in range(3)])
    position = log.read((topics.ROUNDS,)).position
    log.append([samples.signed(samples.epoch())])
    (record,) = log.read((topics.ROUNDS,), position).records
    assert log.end().covers(record.stream, record.offset)


def test_end_covers_everything_so_far(log: EventLog) -> None:
    log.append([samples.signed(samples.feedback(number)) for number in range(3)])
    end = log.end()
    assert all(end.covers(record.stream, record.offset) for record in read_all(log))
    log.append([samples.signed(samples.feedback(3))])
    assert not all(end.covers(record.stream, record.offset) for record in read_all(log))


def test_events_survive_closing_and_opening(opener: Opener) -> None:
    log = opener()
    log.append([samples.signed(samples.feedback())])
    log.close()
    again = opener()
    assert len(list(read_all(again))) == 1
    again.append([samples.signed(samples.feedback(1))])
    assert len(list(read_all(again))) == 2
    again.close()


def test_waiting_ends_at_its_deadline_without_burning_a_core(log: EventLog) -> None:
    wall, cpu = time.monotonic(), time.thread_time()
    assert log.read(wait_s=0.5).records == []
    assert 0.45 < time.monotonic() - wall < 5
    assert time.thread_time() - cpu < 0.1


def test_a_waiting_reader_wakes_when_another_thread_appends(log: EventLog) -> None:
    got: list[int] = []
    reader = threading.Thread(target=lambda: got.append(len(log.read((topics.ROUNDS,), wait_s=20).records)))
    reader.start()
    log.append([samples.signed(samples.feedback())])
    log.append([samples.signed(samples.epoch())])
    reader.join(10)
    assert got == [1]


def test_a_batch_that_was_read_can_be_read_again(log: EventLog) -> None:
    log.append([samples.signed(payload) for number in range(3) for payload in (samples.feedback(number), samples.epoch(number))])
    first = log.read(limit=4)
    again = log.read(limit=2)
    assert again.records == first.records[:2]
    assert log.read(after=again.position, limit=2).records == first.records[2:]
    assert list(read_all(log)) == list(read_all(log))


def test_events_of_several_topics_come_in_the_order_of_the_logs_clock(log: EventLog) -> None:
    for number in range(20):
        for payload in (samples.epoch(number), samples.feedback(number), samples.seen(seq=number)):
            log.append([samples.signed(payload)])
    records = list(read_all(log))
    assert [record.appended_ms for record in records] == sorted(record.appended_ms for record in records)
    assert len(records) == 60


def test_threads_share_one_log(log: EventLog) -> None:
    def work(base: int) -> None:
        for number in range(20):
            log.append([samples.signed(samples.feedback(base + number))])
            log.read(limit=5)

    threads = [threading.Thread(target=work, args=(100 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(list(read_all(log))) == 80


# --- several processes -----------------------------------------------------------------------------------------------

_spawn = multiprocessing.get_context("spawn")


def _append_shared_and_own(opener: Opener, name: str, count: int) -> None:
    log = opener()
    for number in range(count):
        own = samples.signed(samples.feedback(number, client_id=name))
        log.append([samples.signed(samples.epoch(number), number=number), own])
    log.close()


def _append_for_ever(opener: Opener, sent: Connection) -> None:
    log = opener()
    for number in range(1_000_000):
        events = [samples.signed(samples.feedback(number, client_id=f"device-{part}")) for part in range(3)]
        log.append(events)
        sent.send([event.id for event in events])


def _wait_for_one(opener: Opener, ready: Connection) -> None:
    log = opener()
    ready.send(None)
    ready.send(len(log.read((topics.ROUNDS,), wait_s=30).records))
    log.close()


def test_processes_append_at_once_and_nothing_is_lost_or_doubled(opener: Opener) -> None:
    """They open a log that does not exist yet, all at once, and say the same things under the same ids."""
    processes = [_spawn.Process(target=_append_shared_and_own, args=(opener, f"device-{number}", 40)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    log = opener()
    records = list(read_all(log))
    assert len([record for record in records if record.topic == topics.ROUNDS]) == 40
    for number in range(3):
        mine = [record for record in records if record.key == f"device-{number}"]
        assert [record.data for record in mine] == [
            samples.signed(samples.feedback(seq, client_id=f"device-{number}")).data for seq in range(40)
        ]
    log.close()


def test_a_killed_appender_leaves_everything_it_was_told_and_no_gap_in_a_key(opener: Opener) -> None:
    log = opener()
    receiver, sender = _spawn.Pipe(duplex=False)
    process = _spawn.Process(target=_append_for_ever, args=(opener, sender))
    process.start()
    sender.close()
    acknowledged = [receiver.recv() for _ in range(20)]
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join(30)
    while receiver.poll():
        try:
            acknowledged.append(receiver.recv())
        except EOFError:
            break
    own = samples.signed(samples.feedback())
    assert {identifier for batch in acknowledged for identifier in batch} <= {record.id for record in read_all(log)}
    log.append([own])
    # What the killed one had under way through a gateway may still come: it comes whole.
    records = list(read_all(log))
    assert [record.id for record in records if record.id == own.id] == [own.id]
    for part in range(3):
        mine = [record.data for record in records if record.key == f"device-{part}" and record.id != own.id]
        assert mine == [samples.signed(samples.feedback(number, client_id=f"device-{part}")).data for number in range(len(mine))]
    log.close()


def test_a_waiting_reader_wakes_when_another_process_appends(opener: Opener) -> None:
    log = opener()
    ours, theirs = _spawn.Pipe()
    process = _spawn.Process(target=_wait_for_one, args=(opener, theirs))
    process.start()
    ours.recv()
    start = time.monotonic()
    log.append([samples.signed(samples.epoch())])
    assert ours.poll(20)
    assert ours.recv() == 1
    assert time.monotonic() - start < 5
    process.join(30)
    log.close()


def test_new_ids_rise_and_are_unique() -> None:
    made = [ids.new_id() for _ in range(10_000)]
    assert made == sorted(set(made))
    assert all(len(identifier) == 32 and identifier[12] == "7" and identifier[16] in "89ab" for identifier in made)


def test_derived_ids_are_a_function_of_their_parts() -> None:
    assert ids.derived_id("a", 1) == ids.derived_id("a", 1)
    assert len({ids.derived_id(*parts) for parts in (("a", 1), ("a1",), ("a", 2), ("b", 1), ("a", 1, ""))}) == 5
    assert ids.derived_id("a")[12] == "8"
