"""The embedded runner: whatever kills it, and wherever, the log holds what an uninterrupted run emits, each event once."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path

import pytest
import samples
from fedloop_events import envelope, topics, types
from fedloop_events.envelope import Event, Record
from fedloop_events.errors import LogChangedError, UnreachableError
from fedloop_events.logs.kafka.log import KafkaLog
from fedloop_events.logs.port import START, Batch, EventLog, Position, read_all
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_events.types import Payload
from fedloop_events.writer import EventWriter
from fedloop_server.feedback import exposed
from fedloop_server.feedback.operator import Emit
from fedloop_server.feedback.pipeline import Pipeline
from fedloop_server.feedback.states import States
from fedloop_server.telemetry.metrics import MeteredLog
from msgspec import Struct
from prometheus_client import generate_latest

WINDOW_MS = 1_000


class Count(Struct):
    seen: int = 0
    until_ms: int = 0


class Forwarding:
    """Of every piece of feedback a scored one, which says how many of its client's came before."""

    name, version, topics = "forwarding", 1, (topics.FEEDBACK,)
    state_type = Count

    def key(self, record: Record, payload: Payload) -> str | None:
        return record.key if isinstance(payload, types.FeedbackRecorded) else None

    def apply(self, state: Count, record: Record, payload: Payload) -> Iterator[Emit]:
        assert isinstance(payload, types.FeedbackRecorded)
        reaction = types.Reaction(payload.text, thumb=payload.thumb)
        yield Emit(
            types.FeedbackScored(
                payload.origin,
                payload.use_case,
                record.id,
                payload.client_id,
                payload.feedback_id,
                payload.response_id,
                payload.release,
                record.time_s * 1000,
                record.appended_ms,
                reaction,
                masked=state.seen,
            )
        )
        state.seen += 1

    def advance(self, key: str, state: Count, now_ms: int) -> Iterator[Emit]:
        raise AssertionError("time does nothing to what is kept by client")


class Counting:
    """How many were scored, once time has come to the end of a window after the last one."""

    name, version, topics = "counting", 1, (topics.SCORED,)
    state_type = Count

    def key(self, record: Record, payload: Payload) -> str | None:
        return record.key

    def apply(self, state: Count, record: Record, payload: Payload) -> Iterator[Emit]:
        assert isinstance(payload, types.FeedbackScored)
        state.seen += 1
        state.until_ms = max(state.until_ms, payload.recorded_ms + WINDOW_MS)
        return iter(())

    def advance(self, key: str, state: Count, now_ms: int) -> Iterator[Emit]:
        if state.until_ms and now_ms >= state.until_ms:
            found = types.MetricsWindowed(samples.ORIGIN, key, "r0", "1m", 0, feedback=state.seen)
            yield Emit(found, (key, state.until_ms), state.until_ms)
            state.until_ms = 0


class KilledError(Exception):
    pass


class Dying:
    """A log in front of which the process dies: before or after the n-th append."""

    def __init__(self, log: EventLog, appends: int, *, after: bool) -> None:
        self._log, self._left, self._after = log, appends, after

    def append(self, events: Sequence[Event]) -> None:
        self._left -= 1
        if self._left == 0 and not self._after:
            raise KilledError
        self._log.append(events)
        if self._left == 0:
            raise KilledError

    def read(
        self, topics: Collection[str] = topics.ALL, after: Position = START, *, limit: int = 1000, wait_s: float = 0.0
    ) -> Batch:
        return self._log.read(topics, after, limit=limit, wait_s=wait_s)

    def end(self) -> Position:
        return self._log.end()

    def close(self) -> None:
        pass


@pytest.fixture
def log(tmp_path: Path) -> Iterator[EventLog]:
    log = SqliteLog(tmp_path / "log.sqlite")
    yield filled(log)
    log.close()


@pytest.fixture(params=["file", "kafka"])
def any_log(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EventLog]:
    if request.param == "file":
        log: EventLog = SqliteLog(tmp_path / "log.sqlite")
    else:
        log = KafkaLog(request.getfixturevalue("kafka_url"), create=True)
    yield filled(log)
    log.close()


def filled(log: EventLog) -> EventLog:
    """With two clients and a few hundred pieces of feedback."""
    clients = ("device-1", "device-2")
    log.append([samples.signed(samples.created(), "server")])
    log.append([samples.signed(samples.enrolled(name, str(11 + number))) for number, name in enumerate(clients)])
    log.append([samples.signed(samples.feedback(number, clients[number % 2]), number=number) for number in range(600)])
    return log


def pipeline(log: EventLog, states: States, wall: Callable[[], float] = lambda: 4e9) -> Pipeline:
    return Pipeline(log, EventWriter(log, samples.key("server")), [Forwarding(), Counting()], states, wall=wall)


def emitted(log: EventLog) -> list[tuple[str, bytes]]:
    return [(record.id, record.data) for record in read_all(log, (topics.SCORED, topics.METRICS, topics.QUARANTINE))]


def run_to_its_end(log: EventLog, states: States) -> Pipeline:
    """Until time, which is far ahead, has done what it can."""
    run = pipeline(log, states)
    run.run(threading.Event(), until_idle=True)
    return run


def test_pipeline_takes_in_what_its_operators_emit_and_tells_them_the_time(any_log: EventLog, tmp_path: Path) -> None:
    with States(tmp_path / "states") as states:
        run = run_to_its_end(any_log, states)
    assert (run.emitted, run.refused) == (601, 0)
    (window,) = [envelope.expect(each, types.MetricsWindowed) for each in read_all(any_log, (topics.METRICS,))]
    assert window.feedback == 600


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("appends", [1, 2, 3, 4])
def test_pipeline_killed_at_any_append_and_started_again_emits_the_same(
    any_log: EventLog, tmp_path: Path, appends: int, after: bool
) -> None:
    with States(tmp_path / "states") as states, pytest.raises(KilledError):
        run_to_its_end(Dying(any_log, appends, after=after), states)
    with States(tmp_path / "states") as states:
        run_to_its_end(any_log, states)
    found = emitted(any_log)
    scored = [envelope.expect(each, types.FeedbackScored) for each in read_all(any_log, (topics.SCORED,))]
    assert [each.masked for each in scored if each.client_id == "device-1"] == list(range(300))
    assert len(found) == len({identity for identity, _ in found}) == 601


def test_pipeline_that_lost_its_states_emits_nothing_new(log: EventLog, tmp_path: Path) -> None:
    with States(tmp_path / "states") as states:
        run_to_its_end(log, states)
    before = emitted(log)
    with States(tmp_path / "others") as states:
        run_to_its_end(log, states)
    assert emitted(log) == before


def test_pipeline_counts_an_event_once_that_the_log_shows_twice(log: EventLog, tmp_path: Path) -> None:
    class Doubling(Dying):
        def read(
            self, topics: Collection[str] = topics.ALL, after: Position = START, *, limit: int = 1000, wait_s: float = 0.0
        ) -> Batch:
            batch = super().read(topics, after, limit=limit, wait_s=wait_s)
            return Batch([each for record in batch.records for each in (record, record)], batch.position)

    with States(tmp_path / "states") as states:
        run_to_its_end(Doubling(log, 10**9, after=True), states)
    assert len(emitted(log)) == 601


def test_feedback_that_its_author_did_not_sign_is_quarantined_without_its_content(log: EventLog, tmp_path: Path) -> None:
    forged = samples.signed(samples.feedback(600, "device-1"), "device-2", number=600)
    log.append([forged])
    with States(tmp_path / "states") as states:
        run = run_to_its_end(log, states)
    (found,) = [envelope.expect(each, types.EventQuarantined) for each in read_all(log, (topics.QUARANTINE,))]
    assert (found.event_id, found.reason, found.client_id, run.refused) == (forged.id, "not-authentic", None, 1)


def test_windows_close_while_more_keeps_coming(log: EventLog, tmp_path: Path) -> None:
    """No read is ever empty: before each there is a new event."""
    clock = itertools.count(4_000_000_000)
    with States(tmp_path / "states") as states:
        run = pipeline(log, states, lambda: next(clock))
        for number in range(600, 620):
            log.append([samples.signed(samples.feedback(number, "device-1"), number=number)])
            assert run.step() > 0
    assert list(read_all(log, (topics.METRICS,)))


def test_pipeline_shows_prometheus_what_it_did_and_how_far_it_is_behind(log: EventLog, tmp_path: Path) -> None:
    metered, found = MeteredLog(log), exposed.Found()
    log.append([samples.signed(samples.feedback(600, "device-1"), "device-2", number=600)])
    with States(tmp_path / "states") as states:
        run = Pipeline(
            metered,
            EventWriter(log, samples.key("server")),
            [Forwarding(), Counting()],
            states,
            wall=lambda: 4e9,
            on_emitted=found.add,
        )
        run.run(threading.Event(), until_idle=True)
        shown = generate_latest(exposed.registry(run, found, metered)).decode()
    for line in (
        'fedloop_feedback_read_total{topic="feedback"} 601.0',
        'fedloop_feedback_emitted_total{type="feedback.scored.v1"} 600.0',
        'fedloop_feedback_emitted_total{type="metrics.windowed.v1"} 1.0',
        "fedloop_feedback_refused_total 1.0",
        "fedloop_feedback_behind_seconds ",
    ):
        assert f"\n{line}" in shown


def test_states_are_one_pipelines_at_a_time(tmp_path: Path) -> None:
    with States(tmp_path / "states"), pytest.raises(UnreachableError, match="another pipeline has"):
        States(tmp_path / "states")
    with States(tmp_path / "states"):
        pass


def test_pipeline_refuses_another_log_than_its_states_are_of(log: EventLog, tmp_path: Path) -> None:
    other = SqliteLog(tmp_path / "other.sqlite")
    with States(tmp_path / "states") as states:
        run_to_its_end(log, states)
        with pytest.raises(LogChangedError):
            pipeline(other, states)
    other.close()
