"""Rounds at set times, in set hours."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import pytest
from cronsim import CronSim
from devices import CONFIG, World, evaluate
from fedloop_events import types
from fedloop_events.errors import FencedError, UsageError
from fedloop_events.folds.rounds import RoundRequest, RoundsView
from fedloop_events.hours import DayHours
from fedloop_server.config import ServerConfig, decode
from fedloop_server.rounds import actions
from fedloop_server.rounds.loop import Server
from fedloop_server.schedules import due
from fedloop_tasks.classification.plan import ClassificationPlan
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

BERLIN = "Europe/Berlin"


def at(moment: str) -> float:
    return datetime.fromisoformat(moment).timestamp()


def scheduled(schedule: str, start: str, end: str, *, step_min: int = 1, time_zone: str = BERLIN) -> list[str]:
    """What is requested by a server that is up all the time, and serves each request at once."""
    rounds, made, moment = RoundsView(epoch_ms=int(at(start) * 1000)), [], at(start)
    while moment <= at(end):
        if (found := due(rounds, schedule, time_zone, moment)) is not None:
            rounds.requests[found.request_id] = RoundRequest(found.request_id, 1, int(moment * 1000), numbers=[1])
            made.append(found.reason.removeprefix("scheduled for "))
        moment += step_min * 60
    return made


def test_a_time_that_spring_skips_comes_at_once_and_one_that_autumn_repeats_comes_once() -> None:
    spring = scheduled("30 2 * * *", "2026-03-28T00:00:00+01:00", "2026-03-30T12:00:00+02:00")
    assert spring == ["2026-03-28T02:30+01:00", "2026-03-29T03:00+02:00", "2026-03-30T02:30+02:00"]
    autumn = scheduled("30 2 * * *", "2026-10-24T00:00:00+02:00", "2026-10-26T12:00:00+01:00")
    assert autumn == ["2026-10-24T02:30+02:00", "2026-10-25T02:30+02:00", "2026-10-26T02:30+01:00"]


def test_an_hourly_schedule_goes_by_time_that_passes() -> None:
    assert len(scheduled("0 * * * *", "2026-03-29T00:00:00+01:00", "2026-03-29T23:59:00+02:00")) == 23
    assert len(scheduled("0 * * * *", "2026-10-25T00:00:00+02:00", "2026-10-25T23:59:00+01:00")) == 25


@given(
    schedule=st.sampled_from(["30 2 * * *", "*/20 * * * *", "15 1-3 * * *", "0 0 * * 0", "0 */2 * * *", "59 23 L * *"]),
    time_zone=st.sampled_from([BERLIN, "America/New_York", "Australia/Lord_Howe", "Asia/Kathmandu", "UTC"]),
    start=st.integers(0, 365 * 24 * 60),
    asked_after_min=st.integers(0, 3 * 24 * 60),
)
@settings(max_examples=150, deadline=None)
def test_what_is_due_is_the_last_time_that_has_come(schedule: str, time_zone: str, start: int, asked_after_min: int) -> None:
    begun = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=start)
    now = begun + timedelta(minutes=asked_after_min)
    times = []
    for each in CronSim(schedule, (begun - timedelta(days=33)).astimezone(ZoneInfo(time_zone))):
        if each.timestamp() > now.timestamp():
            break
        times.append(each.timestamp())
    found = due(RoundsView(), schedule, time_zone, now.timestamp())
    assert found is not None
    assert at(found.reason.removeprefix("scheduled for ")) == times[-1]


def test_of_the_times_that_were_missed_one_is_made_up_and_a_new_schedule_makes_up_none() -> None:
    rounds = RoundsView(epoch_ms=int(at("2026-05-05T12:00:00+02:00") * 1000))
    assert due(rounds, "0 * * * *", BERLIN, at("2026-05-05T12:30:00+02:00")) is not None, "12:00 is not before the start"
    assert due(rounds, "0 9 * * *", BERLIN, at("2026-05-05T12:30:00+02:00")) is None
    before = due(RoundsView(), "0 9 * * *", BERLIN, at("2026-05-01T09:00:00+02:00"))
    assert before is not None
    rounds.requests[before.request_id] = RoundRequest(before.request_id, 1, 0, numbers=[1])
    made_up = due(rounds, "0 9 * * *", BERLIN, at("2026-05-05T12:30:00+02:00"))
    assert made_up is not None
    assert made_up.reason == "scheduled for 2026-05-05T09:00+02:00"
    rounds.requests[made_up.request_id] = RoundRequest(made_up.request_id, 1, 0, numbers=[2])
    assert due(rounds, "0 9 * * *", BERLIN, at("2026-05-05T23:30:00+02:00")) is None
    assert due(rounds, "30 9 * * *", BERLIN, at("2026-05-05T12:30:00+02:00")) is None, "another schedule is a new one"


class Clock:
    def __init__(self, moment: str) -> None:
        self.time_s = at(moment)

    def __call__(self) -> float:
        return self.time_s


def served(world: World, clock: Clock, **changes: object) -> Server:
    config = replace(CONFIG, **({"time_zone": BERLIN} | changes))
    return Server(world.log, world.blobs, world.writer, config, evaluate=evaluate, wall=clock)


def until_waiting(server: Server) -> str:
    for _ in range(50):
        if isinstance(action := server.step(0.0), actions.Wait):
            return action.reason
    raise AssertionError


@pytest.fixture
def soon() -> datetime:
    """Three hours from now: the same time of the day before lies before the server's start."""
    return (datetime.now(UTC) + timedelta(hours=3)).replace(second=0, microsecond=0)


def test_a_scheduled_round_is_requested_once_whoever_serves(tmp_path: Path, soon: datetime) -> None:
    world, clock = World(tmp_path / "deployment"), Clock((soon - timedelta(minutes=1)).isoformat())
    schedule = f"{soon.minute} {soon.hour} * * *"
    first = served(world, clock, schedule=schedule, time_zone="UTC")
    assert until_waiting(first) == "no round is requested"
    clock.time_s += 90
    assert "quorum is 2" in until_waiting(first)
    second = served(world, clock, schedule=schedule, time_zone="UTC")
    assert "quorum is 2" in until_waiting(second)
    clock.time_s += 3600
    until_waiting(second)
    ((_, requested),) = world.records(types.RoundRequested)
    assert requested.reason == f"scheduled for {soon.isoformat(timespec='minutes')}"
    with pytest.raises(FencedError):
        first._decide(actions.RequestRound(requested.request_id, requested.reason))
    assert len(world.records(types.RoundRequested)) == 1, "a server that was taken over from makes the same event"


def test_scheduled_requests_do_not_pile_up_while_one_waits(tmp_path: Path) -> None:
    world, clock = World(tmp_path / "deployment"), Clock("2126-05-05T09:00:00+02:00")
    server = served(world, clock, schedule="*/5 * * * *")
    for _ in range(6):
        until_waiting(server)
        clock.time_s += 300
    assert len(world.payloads(types.RoundRequested)) == 1


def test_rounds_open_in_their_hours_and_wait_for_clients_from_their_beginning(tmp_path: Path) -> None:
    world, clock = World(tmp_path / "deployment"), Clock("2026-03-28T21:30:00+01:00")
    world.request()
    server = served(world, clock, windows="22-06")
    assert until_waiting(server) == "rounds open in the hours 22-06, next at 2026-03-28 22:00+01:00"
    for minutes, expected in ((35, actions.Wait), (60, actions.AbortRound)):
        action = actions.next_action(
            server.state,
            server.planner,
            model=server.model,
            epoch=1,
            now_ms=server._now_ms() + 10**7,
            wall_s=clock() + minutes * 60,
        )
        assert isinstance(action, expected)
    clock.time_s += 31 * 60
    for name in ("ann", "bob"):
        world.device(name)
    with world.serving():
        assert server.run(rounds=1) == 1
    assert [each.state for each in world.rounds.rounds.values()] == ["closed"]


def test_the_wait_for_clients_begins_with_the_hours() -> None:
    hours = DayHours.parse("22-06", BERLIN)
    assert hours.opened_within(600, at("2026-03-28T22:09:00+01:00"))
    assert not hours.opened_within(600, at("2026-03-28T22:11:00+01:00"))
    assert not DayHours.parse("0-24", BERLIN).opened_within(10**6, at("2026-03-29T00:00:00+01:00"))
    assert hours.next_start(at("2026-03-28T21:59:30+01:00")) == datetime.fromisoformat("2026-03-28T22:00:00+01:00")
    assert hours.next_start(at("2026-03-29T21:59:30+02:00")) == datetime.fromisoformat("2026-03-29T22:00:00+02:00")


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("schedule", "30 2 * *", "five fields"),
        ("schedule", "0 30 2 * * *", "five fields"),
        ("schedule", "61 2 * * *", "Bad minute"),
        ("schedule", "0 0 30 2 *", "30 2"),
        ("windows", "22", "no part of a day"),
        ("time_zone", "Mars", "no time zone"),
    ],
)
def test_what_names_no_time_is_refused_when_the_configuration_is_read(key: str, value: str, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        decode({key: value}, ClassificationPlan)
    never = decode({"schedule": "none", "windows": "none"}, ClassificationPlan)
    assert never == ServerConfig(plan=ClassificationPlan())
