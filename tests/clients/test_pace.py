"""Many devices: they check in and come back spread out, each at a time of its own."""

from __future__ import annotations

import random
from collections import Counter
from itertools import pairwise

from fedloop_clients.pace import RETRY_MAX_S, Backoff, Heartbeats
from hypothesis import given
from hypothesis import strategies as st


def times(client_id: str, until_s: float, *, every_s: float = 30.0, start_s: float = 1000.0, step_s: float = 0.25) -> list[float]:
    """When a device that runs from `start_s` on reports, seconds after its start."""
    heartbeats, found, now = Heartbeats(client_id, every_s), [], start_s
    heartbeats.begin(start_s, 8)
    while now <= start_s + until_s:
        if heartbeats.due(now, 8):
            heartbeats.sent(now, 8)
            found.append(now - start_s)
        now += step_s
    return found


def test_devices_that_start_together_check_in_spread_over_the_whole_period() -> None:
    for time in (0, 1):
        found = [times(f"phone-{number}", 61.0)[time] - time * 30.0 for number in range(600)]
        tenths = Counter(min(int(each / 3.0), 9) for each in found)
        assert sorted(tenths) == list(range(10))
        assert all(35 < count < 90 for count in tenths.values())


def test_a_device_has_the_same_times_in_each_run_and_keeps_its_period() -> None:
    assert times("phone", 200.0) == times("phone", 200.0, start_s=77.0)
    found = times("phone", 200.0)
    assert 0.0 < found[0] <= 30.25
    assert all(29.5 <= two - one <= 30.5 for one, two in pairwise(found))


def test_a_device_that_starts_with_something_to_append_or_to_report_does_so_at_once_and_once() -> None:
    heartbeats = Heartbeats("phone", 30.0)
    heartbeats.begin(0.0, 8)
    assert not heartbeats.due(0.0, 8)
    assert heartbeats.due(0.0, 8, appends=True)
    heartbeats.sent(0.0, 8)
    assert not heartbeats.due(0.0, 8, appends=True)
    for reported in (None, 0):
        heartbeats = Heartbeats("phone", 30.0)
        heartbeats.begin(0.0, reported)
        assert heartbeats.due(0.0, 8)


def test_a_change_is_reported_at_once_and_moves_no_later_report() -> None:
    heartbeats = Heartbeats("phone", 30.0)
    heartbeats.begin(0.0, 1)
    own = next(each / 4 for each in range(1000) if heartbeats.due(each / 4, 1))
    assert 0 < own <= 30.25
    assert heartbeats.due(own - 0.25, 2)
    heartbeats.sent(own - 0.25, 2)
    assert not heartbeats.due(own - 0.25, 2)
    assert heartbeats.due(own, 2)


def test_a_report_that_came_late_moves_no_later_one() -> None:
    heartbeats = Heartbeats("phone", 30.0)
    heartbeats.sent(0.0, 1)
    own = next(each / 4 for each in range(1000) if heartbeats.due(each / 4, 1))
    heartbeats.sent(own + 40.0, 1)
    assert not heartbeats.due(own + 59.5, 1)
    assert heartbeats.due(own + 60.0, 1)


@given(gaps=st.lists(st.floats(0.0, 500.0), min_size=1, max_size=30), every_s=st.just(0.0) | st.floats(0.01, 60.0))
def test_a_device_that_slept_reports_once_and_is_never_silent_for_longer_than_its_period(
    gaps: list[float], every_s: float
) -> None:
    heartbeats, now = Heartbeats("phone", every_s), 0.0
    heartbeats.begin(now, 1)
    for gap in gaps:
        now += gap
        if heartbeats.due(now, 1):
            heartbeats.sent(now, 1)
        assert not every_s or not heartbeats.due(now, 1)
        assert heartbeats.due(now + every_s * 1.000001 + 1e-6, 1)


def test_devices_that_lose_the_log_together_come_back_apart() -> None:
    waits = []
    for seed in range(400):
        backoff = Backoff(2.0, random.Random(seed))
        waits.append([backoff.failed() for _ in range(8)])
    for tries, bound_s in enumerate((2.0, 4.0, 8.0, 16.0, RETRY_MAX_S, RETRY_MAX_S)):
        found = [each[tries] for each in waits]
        assert max(found) <= bound_s
        assert min(found) < 0.1 * bound_s
        assert 0.4 * bound_s < sum(found) / len(found) < 0.6 * bound_s


def test_waits_begin_anew_after_a_try_that_worked_and_are_bounded_for_ever() -> None:
    backoff = Backoff(2.0, random.Random(1))
    assert all(backoff.failed() <= RETRY_MAX_S for _ in range(5000))
    backoff.succeeded()
    assert backoff.failed() <= 2.0
