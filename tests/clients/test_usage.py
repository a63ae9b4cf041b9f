"""What a device counts of its use: once an interval it publishes counts, of which a crash loses none and doubles none."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec
import pytest
from clients.chatted import chatted_in
from clients.conftest import Deployment, settled
from fedloop_clients import Agent
from fedloop_clients.device import Settings
from fedloop_clients.store import Store
from fedloop_clients.usage import KEPT_MS, Timed
from fedloop_events import sketch
from fedloop_events.envelope import Event
from fedloop_events.errors import UsageError
from fedloop_events.types import FeedbackRecorded, UsageSummarised
from sqlcipher3 import dbapi2

if TYPE_CHECKING:
    from clients.conftest import DigitMasker

HOUR = 3600.0
CONNECT = dbapi2.connect
InChild = Callable[[Callable[[], object]], int]


class Clock:
    """The wall clock of a device, which a test sets."""

    def __init__(self) -> None:
        self.now_s = 480_000 * HOUR

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def phone(deployment: Deployment, store_dir: Path, masker: DigitMasker, clock: Clock) -> Iterator[Agent]:
    with Agent.enrol(deployment.folder, store_dir, client_id="phone", key_from="file", masker=masker, clock=clock) as agent:
        yield agent


def answer(agent: Agent, took_s: float | None = None, *, count: int = 1, release: str = "0000-a") -> None:
    """Answers that were kept, as far as what is counted of them goes."""
    for number in range(count):
        with agent._device.usage.answered(release, took_s):
            agent._device.interactions.respond(f"where is card {number}", None, "loan", release, ("loan",))


def summarised(deployment: Deployment) -> list[UsageSummarised]:
    return deployment.appended(UsageSummarised)


def test_an_hour_is_published_as_counts_once_it_is_over(deployment: Deployment, phone: Agent, clock: Clock) -> None:
    began_ms = int(clock.now_s * 1000)
    answer(phone, 0.5, count=3)
    answer(phone, 2.0)
    answer(phone)
    clock.now_s += HOUR - 1
    phone.record("my card 4711", "loan")
    phone.run(until=settled)
    assert summarised(deployment) == []
    clock.now_s += 0.2 * HOUR
    phone.run(until=settled)
    first, second = summarised(deployment)
    assert {first.release, second.release} == {"0000-a", deployment.base_release}
    counted = first if first.release == "0000-a" else second
    assert (counted.answers, counted.use_case, counted.from_ms, counted.to_ms) == (5, "default", began_ms, began_ms + 3_600_000)
    assert counted.latency == {str(sketch.bin_of(0.5)): 3, str(sketch.bin_of(2.0)): 1}
    assert b"card" not in msgspec.json.encode([first, second])
    phone.run(until=settled)
    assert len(summarised(deployment)) == 2


def test_an_hour_without_anything_publishes_nothing(deployment: Deployment, phone: Agent, clock: Clock) -> None:
    answer(phone)
    clock.now_s += 5 * HOUR
    phone.run(until=settled)
    clock.now_s += 50 * HOUR
    phone.run(until=settled)
    assert [each.answers for each in summarised(deployment)] == [1]


def test_signals_that_are_published_and_what_the_masker_found_are_counted(
    deployment: Deployment, phone: Agent, clock: Clock
) -> None:
    for signal in ("copied", "copied", "escalated"):
        phone.feedback(phone.record("my card 4711", "loan").response_id, signal=signal, comment="12 and 34")
    phone.feedback(phone.record("unmaskable", "loan").response_id, signal="clicked")
    phone.run(until=settled)
    taken_back = phone.feedback(phone.record("my card", "loan").response_id, signal="abandoned")
    phone.retract(taken_back.feedback_id)
    clock.now_s += 2 * HOUR
    phone.run(until=settled)
    (summary,) = summarised(deployment)
    assert (summary.answers, summary.signals, summary.masked) == (5, {"copied": 2, "escalated": 1}, {"NUMBER": 9})


def test_more_signals_than_an_event_holds_are_counted_as_other(deployment: Deployment, phone: Agent, clock: Clock) -> None:
    names = [f"{a}{b}" for a in "abcdefgh" for b in "abcdefghij"]
    for name in (*names, "zz", "zz"):
        phone._device.usage.signalled("0000-a", name)
    clock.now_s += 2 * HOUR
    phone.run(until=settled)
    (summary,) = summarised(deployment)
    assert len(summary.signals) == 64
    assert (summary.signals["zz"], summary.signals["other"], sum(summary.signals.values())) == (2, 18, 82)


def test_a_clock_that_is_set_back_holds_nothing_up(deployment: Deployment, phone: Agent, clock: Clock) -> None:
    answer(phone)
    clock.now_s -= 1000 * HOUR
    answer(phone)
    phone.run(until=settled)
    assert [each.answers for each in summarised(deployment)] == [1]
    clock.now_s += 2 * HOUR
    phone.run(until=settled)
    assert [each.answers for each in summarised(deployment)] == [1, 1]


def test_a_device_that_publishes_nothing_keeps_a_bounded_number_of_counts(phone: Agent, clock: Clock) -> None:
    answer(phone)
    clock.now_s += KEPT_MS / 1000 + HOUR
    answer(phone)
    assert phone._device.store.rows("SELECT count(*) FROM usage") == [(1,)]


def test_feedback_and_counts_are_published_under_the_applications_use_case(
    deployment: Deployment, tmp_path: Path, masker: DigitMasker, clock: Clock
) -> None:
    settings = Settings(use_case="support")
    with Agent.enrol(
        deployment.folder, tmp_path / "named", key_from="file", masker=masker, clock=clock, settings=settings
    ) as agent:
        agent.feedback(agent.record("my card", "loan").response_id, thumb="up")
        agent.run(until=settled)
        clock.now_s += 2 * HOUR
        agent.run(until=settled)
    assert [each.use_case for each in deployment.appended(FeedbackRecorded)] == ["support"]
    assert [each.use_case for each in summarised(deployment)] == ["support"]
    with pytest.raises(UsageError, match="use_case must be 1 to 80"):
        Settings(use_case="what users ask")


def test_an_owner_who_wants_nothing_counted_has_nothing_counted(
    deployment: Deployment, tmp_path: Path, masker: DigitMasker, clock: Clock
) -> None:
    settings = Settings(summary_s=None)
    with Agent.enrol(
        deployment.folder, tmp_path / "off", key_from="file", masker=masker, clock=clock, settings=settings
    ) as agent:
        agent.feedback(agent.record("my card", "loan").response_id, signal="copied")
        clock.now_s += 9 * HOUR
        agent.run(until=settled)
        assert agent._device.store.rows("SELECT * FROM usage") == []
    assert summarised(deployment) == []
    for wrong in (0.0, -1.0, 90_000.0):
        with pytest.raises(UsageError, match="cannot be summarised"):
            Settings(summary_s=wrong)


def test_an_answer_and_its_count_are_kept_both_or_neither(phone: Agent) -> None:
    answer(phone)
    with pytest.raises(UsageError):
        phone.record("", "loan")
    phone.record("my card", "loan", response_id="mine")
    with pytest.raises(UsageError, match="taken"):
        phone.record("my card", "loan", response_id="mine")
    rows = phone._device.store.rows("SELECT (SELECT count(*) FROM responses), (SELECT sum(count) FROM usage)")
    assert rows == [(2, 2)]


def test_a_process_killed_anywhere_counts_and_publishes_each_answer_once(
    deployment: Deployment, store_dir: Path, phone: Agent, clock: Clock, in_child: InChild
) -> None:
    answer(phone, 0.5, count=2)
    answer(phone, 0.5, release="0000-b")
    key = phone._device.store._key

    def total() -> tuple[int, int]:
        """The answers that were kept, and those that are counted or in the outbox."""
        store = Store.open(store_dir / "store.db", key)
        ((kept,),) = store.rows("SELECT count(*) FROM responses")
        ((counted,),) = store.rows("SELECT coalesce(sum(count), 0) FROM usage WHERE kind = 'answer'")
        for (event,) in store.rows("SELECT event FROM outbox WHERE event IS NOT NULL"):
            found = msgspec.msgpack.decode(event, type=Event)
            counted += msgspec.json.decode(found.data)["answers"] if found.type == UsageSummarised.type_name else 0
        store.close()
        return kept, counted

    def one_more_and_the_last_hour(fatal: int) -> Callable[[], None]:
        def work() -> None:
            left = iter(range(fatal))

            def die(_: str) -> None:
                if next(left, None) is None:
                    os.kill(os.getpid(), 9)

            def connect(*terms: Any, **more: Any) -> Any:
                db = CONNECT(*terms, **more)
                db.set_trace_callback(die)
                return db

            dbapi2.connect = connect
            with Agent.open(store_dir, deployment.folder, clock=clock) as agent:
                answer(agent, 0.5)
                clock.now_s += 1.2 * HOUR
                agent._device.usage.summarise(agent._device.outbox, agent.identity)

        return work

    for fatal in range(20, 10_000):
        ended = in_child(one_more_and_the_last_hour(fatal))
        kept, counted = total()
        assert counted == kept
        if ended == 0:
            break
        assert ended == -9
    clock.now_s += 9 * HOUR
    phone.run(until=settled)
    assert sum(each.answers for each in summarised(deployment)) == kept == total()[0]


def test_chats_are_timed_until_they_are_written_however_slowly_they_are_read(tmp_path: Path, clock: Clock) -> None:
    deployment = chatted_in(tmp_path / "deployment")
    with deployment.enrol(tmp_path / "store", clock=clock) as agent:
        hello = [{"role": "user", "content": "hello"}]
        begun_s = time.monotonic()
        agent.chat(hello)
        whole_s = time.monotonic() - begun_s
        with agent.chat(hello, stream=True) as stream:
            list(stream)
        agent.record_answer(hello, "hi", took_s=30.0)
        clock.now_s += 2 * HOUR
        agent.run(until=settled)
        (summary,) = summarised(deployment)
    deployment.log.close()
    assert (summary.answers, sum(summary.latency.values())) == (3, 3)
    bins = sorted(int(each) for each in summary.latency)
    assert bins[-1] == sketch.bin_of(30.0)
    assert bins[0] <= sketch.bin_of(whole_s)


def test_the_time_of_what_was_written_stands_still() -> None:
    timed = Timed()
    timed.written()
    took_s = timed.seconds
    while time.monotonic() <= timed._begun_s + took_s:
        pass
    assert timed.seconds == took_s
