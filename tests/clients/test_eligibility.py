"""When the owner lets a device take part: decided on the device, before anything is spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from clients.conftest import answered
from fedloop_clients import Agent, eligibility
from fedloop_clients.device import Settings
from fedloop_clients.eligibility import Conditions, Eligibility, Joined, Surroundings, of_platform
from fedloop_clients.store import Store
from fedloop_events import types
from fedloop_events.errors import UsageError
from fedloop_events.hours import DayHours
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from hypothesis import given
from hypothesis import strategies as st

if TYPE_CHECKING:
    from clients.conftest import Deployment, DigitMasker

MINUTE, HOUR, DAY = 60_000, 3_600_000, 86_400_000


class Place:
    """Where a device is now; a test moves it."""

    def __init__(self) -> None:
        self.now = Conditions(charging=True, unmetered=True, idle=True)
        self.time_s = datetime.fromisoformat("2026-03-01T12:00:00+00:00").timestamp()

    def conditions(self) -> Conditions:
        return self.now

    def clock(self) -> float:
        return self.time_s


Enrol = Callable[..., Agent]


@pytest.fixture
def place() -> Place:
    return Place()


@pytest.fixture
def enrol(deployment: Deployment, tmp_path: Path, masker: DigitMasker, place: Place) -> Iterator[Enrol]:
    agents: list[Agent] = []
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        import numpy as np

        arrays = ArrayRecord({"x": Array(np.zeros(3, np.float32))})
        return Message(RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})}), reply_to=message)

    def enrol(conditions: Callable[[], Conditions] = place.conditions, epsilon: float | None = 100.0, **terms: Any) -> Agent:
        agents.append(
            Agent.enrol(
                deployment.folder,
                tmp_path / "store",
                client_id="phone",
                key_from="file",
                apps={"main": app},
                masker=masker,
                epsilon=epsilon,
                settings=Settings(eligibility=Eligibility(**terms)),
                conditions=conditions,
                clock=place.clock,
            )
        )
        return agents[-1]

    yield enrol
    for agent in agents:
        agent.close()


def reasons(deployment: Deployment) -> list[str]:
    return [each.reason for each in deployment.appended(types.RoundDeclined)]


ONLY = [
    ("only_charging", "charging", "not-charging"),
    ("only_unmetered", "unmetered", "metered-network"),
    ("only_idle", "idle", "not-idle"),
]


@pytest.mark.parametrize(("term", "condition", "code"), ONLY)
@pytest.mark.parametrize("holds", [False, None])
def test_a_condition_that_fails_or_is_unknown_declines_before_anything_is_spent(
    deployment: Deployment, enrol: Enrol, place: Place, term: str, condition: str, code: str, holds: bool | None
) -> None:
    place.now = place.now._replace(**{condition: holds})
    agent = enrol(**{term: True})
    deployment.ask("phone")
    agent.run(until=answered(1))
    assert (reasons(deployment), deployment.appended(types.BudgetSpent)) == ([code], [])
    assert agent.status().answers == {code: 1}
    place.now = place.now._replace(**{condition: True})
    deployment.ask("phone")
    agent.run(until=answered(2))
    assert agent.status().answers == {code: 1, "submitted": 1}


def test_without_terms_no_condition_matters(deployment: Deployment, enrol: Enrol) -> None:
    def broken() -> Conditions:
        raise AssertionError

    agent = enrol(broken)
    deployment.ask("phone")
    agent.run(until=answered())
    assert agent.status().answers == {"submitted": 1}


def test_an_application_that_fails_to_tell_declines(deployment: Deployment, enrol: Enrol) -> None:
    def broken() -> Conditions:
        raise ValueError("no sensor")

    agent = enrol(broken, only_charging=True)
    deployment.ask("phone")
    agent.run(until=answered())
    assert reasons(deployment) == ["not-charging"]


def test_hours_go_by_the_wall_clock_of_the_device(deployment: Deployment, enrol: Enrol, place: Place) -> None:
    agent = enrol(hours=DayHours.parse("22-06", "UTC"))
    deployment.ask("phone")
    agent.run(until=answered())
    assert reasons(deployment) == ["outside-hours"]
    place.time_s += 10 * 3600
    deployment.ask("phone")
    agent.run(until=answered(2))
    assert agent.status().answers == {"outside-hours": 1, "submitted": 1}


@pytest.mark.parametrize("epsilon", [100.0, None])
def test_rounds_keep_their_distance_with_and_without_privacy(deployment: Deployment, enrol: Enrol, epsilon: float | None) -> None:
    agent = enrol(epsilon=epsilon, min_gap_s=3600.0)
    for _ in range(2):
        deployment.ask("phone", **({"mechanism": None} if epsilon is None else {}))
    agent.run(until=answered(2))
    assert (reasons(deployment), agent.status().answers) == (["too-soon"], {"too-soon": 1, "submitted": 1})


def test_a_further_step_of_a_round_is_no_further_round(deployment: Deployment, enrol: Enrol) -> None:
    agent = enrol(epsilon=None, min_gap_s=3600.0, rounds_per_day=1)
    opened = deployment.opened("phone", mechanism=None)
    deployment.server.append(opened)
    for step in range(2):
        deployment.instruct("phone", opened, step=step)
    agent.run(until=answered(2))
    assert agent.status().answers == {"submitted": 2}


def test_rounds_a_day_hold_without_privacy_and_after_a_restart(deployment: Deployment, enrol: Enrol) -> None:
    for count in (1, 2, 3):
        with enrol(epsilon=None, rounds_per_day=2) as agent:
            deployment.ask("phone", mechanism=None)
            agent.run(until=answered(count))
    assert reasons(deployment) == ["too-many-rounds"]


def test_the_gap_and_the_day_are_measured_between_what_the_server_asked() -> None:
    terms = Eligibility(min_gap_s=600, rounds_per_day=2)
    assert terms.too_often({}, DAY) is None
    assert terms.too_often({"a": DAY}, DAY + 10 * MINUTE - 1) == "too-soon"
    assert terms.too_often({"a": DAY}, DAY + 10 * MINUTE) is None
    assert terms.too_often({"a": DAY, "b": DAY + HOUR}, 2 * DAY - 1) == "too-many-rounds"
    assert terms.too_often({"a": DAY, "b": DAY + HOUR}, 2 * DAY) is None
    assert terms.too_often({"a": 99 * DAY, "b": 99 * DAY}, DAY) is None, "a clock that was ahead once locks nobody out"


def test_a_round_counts_from_its_first_instruction_and_the_oldest_rounds_give_way(
    deployment: Deployment, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eligibility, "MAX_JOINED", 3)
    joined, now = Joined(Store.create(tmp_path / "store.db", bytes(32))), deployment.opened("phone")
    terms = [deployment.opened("phone") for _ in range(4)]
    for number, opened in enumerate(terms):
        joined.add(opened, number)
        joined.add(opened, number + 1000)
    assert dict(joined.others(now)) == {f"main/{each.round_id}": number for number, each in enumerate(terms) if number}


# --- hours ---


def test_hours_follow_their_time_zone_through_summer_time() -> None:
    hours = DayHours.parse("22-06", "Europe/Berlin")
    for moment, inside in (
        ("2026-03-28T20:59:00+00:00", False),
        ("2026-03-28T21:00:00+00:00", True),
        ("2026-03-29T03:59:00+00:00", True),
        ("2026-03-29T04:00:00+00:00", False),
        ("2026-03-29T19:59:00+00:00", False),
        ("2026-03-29T20:00:00+00:00", True),
        ("2026-10-25T04:59:00+00:00", True),
        ("2026-10-25T05:00:00+00:00", False),
    ):
        assert hours.contain(datetime.fromisoformat(moment).timestamp()) is inside, moment


@given(st.integers(0, 1439), st.integers(0, 1439), st.integers(0, 1439))
def test_a_window_and_its_reverse_cover_the_day_once(start: int, end: int, minute: int) -> None:
    def clock(at: int) -> str:
        return f"{at // 60}:{at % 60:02d}"

    if start == end:
        with pytest.raises(UsageError):
            DayHours.parse(f"{clock(start)}-{clock(end)}")
        return
    moment = (datetime.fromisoformat("2026-01-05T00:00:00+00:00") + timedelta(minutes=minute)).timestamp()
    one, other = (DayHours.parse(f"{clock(a)}-{clock(b)}", "UTC") for a, b in ((start, end), (end, start)))
    assert one.contain(moment) is not other.contain(moment)


@pytest.mark.parametrize("text", ["", "22", "22-22", "25-06", "22-06,", "22:60-23", "7-24:30", "-1-5", "a-b"])
def test_hours_that_are_none_are_named(text: str) -> None:
    with pytest.raises(UsageError, match="no part of a day"):
        DayHours.parse(text)


@pytest.mark.parametrize("name", ["", "Mars/Base", "../etc/passwd", "Europe"])
def test_a_time_zone_that_is_none_is_named(name: str) -> None:
    with pytest.raises(UsageError, match="no time zone"):
        DayHours.parse("22-06", name)


def test_hours_without_a_time_zone_are_the_machine_s(monkeypatch: pytest.MonkeyPatch) -> None:
    noon_utc = datetime.fromisoformat("2026-01-05T12:00:00+00:00").timestamp()
    with monkeypatch.context() as patched:
        patched.setenv("TZ", "Asia/Tokyo")
        time.tzset()
        assert DayHours.parse("21-22").contain(noon_utc)
        assert not DayHours.parse("12-13").contain(noon_utc)
    time.tzset()


def test_several_windows_and_the_whole_day() -> None:
    hours = DayHours.parse("12:30-13:15, 22-6", "UTC")
    noon = datetime.fromisoformat("2026-01-05T12:00:00+00:00").timestamp()
    assert [hours.contain(noon + minute * 60) for minute in (29, 30, 74, 75, 600)] == [False, True, True, False, True]
    assert DayHours.parse("0-24").contain(noon)


# --- the platform ---


def test_what_the_platform_does_not_tell_is_unknown_and_refused_where_it_is_required() -> None:
    found = of_platform()
    assert found.unmetered is None
    assert found.idle in (True, False)
    with pytest.raises(UsageError, match="does not tell whether its network is metered"):
        Eligibility(only_unmetered=True).check_known(found)
    Eligibility(only_idle=True).check_known(found)
    assert Eligibility(only_unmetered=True).unmet(Surroundings(of_platform)) == "metered-network"


@pytest.mark.parametrize(
    "terms", [{"min_gap_s": -1.0}, {"min_gap_s": float("nan")}, {"rounds_per_day": 0}, {"rounds_per_day": 1001}]
)
def test_terms_that_cannot_be_meant_are_refused(terms: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        Eligibility(**terms)
