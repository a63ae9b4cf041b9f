"""What is expected holds nine times of ten, a fall is seen before it is deep, and a restart changes nothing."""

from __future__ import annotations

import random
import statistics
from collections.abc import Iterator, Sequence

import msgspec
import pytest
from fedloop_events.types import MetricForecast, MetricsWindowed
from fedloop_server.feedback import forecasting
from fedloop_server.feedback.forecasting import Forecast, Series
from fedloop_server.feedback.operators.expecting import HORIZON, Expect, ExpectState
from feedback.driving import USE_CASE, Emitted, drive, recorded
from hypothesis import given, settings
from hypothesis import strategies as st
from samples import ORIGIN

MINUTE_MS = 60_000


def window(number: int, satisfied: float, count: int, *, release: str = "release-1", **fields: object) -> MetricsWindowed:
    whole = {"width": "1m", "start_ms": number * MINUTE_MS, "satisfied": satisfied, "satisfied_of": count} | fields
    return msgspec.convert({"origin": ORIGIN, "use_case": USE_CASE, "release": release, **whole}, MetricsWindowed)


def counts(seed: int, rates: Sequence[float], size: int = 60) -> Iterator[tuple[int, int]]:
    """Of each window how many were satisfied, and of how many."""
    source = random.Random(seed)
    for rate in rates:
        count = source.randrange(size // 2, size + size // 2)
        yield sum(source.random() < rate for _ in range(count)), count


def forecasts(emitted: Sequence[Emitted]) -> list[MetricForecast]:
    payloads = [each.emit.payload for each in emitted]
    assert all(isinstance(each, MetricForecast) for each in payloads)
    return payloads  # type: ignore[return-value]


def expected(seed: int, rates: Sequence[float], horizon: int) -> list[tuple[float, Forecast]]:
    """By window: its rate, and what is expected after it."""
    series = Series()
    found = []
    for number, (satisfied, count) in enumerate(counts(seed, rates)):
        forecast = forecasting.observe(series, number, satisfied, count, horizon)
        if forecast is not None:
            found.append((satisfied / count, forecast))
    return found


def test_windows_of_one_start_are_added_up_and_expected_of_when_a_later_one_comes() -> None:
    rows = list(counts(1, [0.8] * 20))
    whole = [window(number, satisfied, count) for number, (satisfied, count) in enumerate(rows)]
    parts = []
    for number, (satisfied, count) in enumerate(rows):
        parts += [
            window(number, satisfied - 10, count - 12, language="de"),
            window(number, 10, 12, release="release-2"),
            window(number, 0, 0, release="release-3", answers=7),
        ]
    assert forecasts(drive(Expect(), parts)) == forecasts(drive(Expect(), whole))
    emitted = forecasts(drive(Expect(), whole))
    # The last window is not complete, and the first nine say too little.
    assert [each.after_ms for each in emitted] == [number * MINUTE_MS for number in range(forecasting.FEWEST, 20)]
    assert {(each.metric, each.width, each.horizon, each.bound) for each in emitted} == {
        ("satisfaction", "1m", HORIZON["1m"], None)
    }


def test_a_forecast_is_named_after_its_window_and_metric() -> None:
    rows = [
        window(n, satisfied, count, correct=count // 2, correct_of=count)
        for n, (satisfied, count) in enumerate(counts(1, [0.8] * 12))
    ]
    emitted = drive(Expect(), rows)
    assert [each.emit.of for each in emitted[:2]] == [(USE_CASE, "1m", 9 * MINUTE_MS, m) for m in ("satisfaction", "accuracy")]
    assert len({each.emit.of for each in emitted}) == len(emitted) == 4


def test_hours_are_expected_of_apart_from_minutes_and_days_are_not() -> None:
    rows = list(counts(1, [0.8] * 14))
    hours = [window(n, s, c, width="1h", start_ms=n * 60 * MINUTE_MS) for n, (s, c) in enumerate(rows)]
    days = [window(n, s, c, width="1d", start_ms=n * 24 * 60 * MINUTE_MS) for n, (s, c) in enumerate(rows)]
    minutes = [window(n, s, c) for n, (s, c) in enumerate(rows)]
    mixed = [each for triple in zip(hours, days, minutes, strict=True) for each in triple]
    emitted = forecasts(drive(Expect(), mixed))
    assert [each for each in emitted if each.width == "1m"] == forecasts(drive(Expect(), minutes))
    assert [each for each in emitted if each.width == "1h"] == forecasts(drive(Expect(), hours))
    assert {each.width for each in emitted} == {"1m", "1h"}


def test_a_window_that_comes_after_a_later_one_is_not_counted() -> None:
    rows = [window(n, s, c) for n, (s, c) in enumerate(counts(1, [0.8] * 14))]
    stray = [*rows[:8], window(3, 0, 1000), *rows[8:]]
    assert forecasts(drive(Expect(), stray)) == forecasts(drive(Expect(), rows))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([1, 3, 50]), st.lists(st.integers(1, 5), min_size=60, max_size=60))
def test_a_restart_after_any_event_changes_no_emission_and_no_id(seed: int, every: int, gaps: list[int]) -> None:
    number, rows = 0, []
    for gap, (satisfied, count) in zip(gaps, counts(seed, [0.9] * 30 + [0.9 - n / 60 for n in range(30)]), strict=True):
        number += gap
        rows.append(window(number, satisfied, count, correct=count - 3, correct_of=count))
    operator = Expect({"satisfaction": 0.5})
    assert drive(operator, rows, restored_after=every) == drive(operator, rows)


def fallen(shape: str) -> list[float]:
    if shape == "quiet":
        return [0.85] * 400
    return [0.85 - (0.1 if shape == "abrupt" else min(0.2, 0.002 * (n - 200))) * (n >= 200) for n in range(400)]


@pytest.mark.parametrize("horizon", [1, 15])
@pytest.mark.parametrize("shape", ["quiet", "abrupt", "gradual"])
def test_the_interval_holds_about_nine_times_of_ten_and_the_error_is_less_than_that_of_no_change(
    shape: str, horizon: int
) -> None:
    held, errors, unchanged = [], [], []
    for seed in range(5):
        found = expected(seed, fallen(shape), horizon)
        for (rate, forecast), (came, _) in zip(found, found[horizon:], strict=False):
            held.append(forecast.low <= came <= forecast.high)
            errors.append(abs(forecast.expected - came))
            unchanged.append(abs(rate - came))
    assert 0.86 <= statistics.mean(held) <= 0.94
    assert statistics.mean(unchanged) / statistics.mean(errors) > 1.15


def test_a_metric_that_falls_is_said_to_cross_its_bound_before_it_does_and_a_quiet_one_never() -> None:
    """From window 40 on it falls by half a point a window, and is at the bound in window 80."""
    rates = [0.9] * 40 + [0.9 - 0.005 * n for n in range(60)]
    said_early, said_late = [], []
    for seed in range(10):
        rows = [window(n, s, c) for n, (s, c) in enumerate(counts(seed, rates, size=200))]
        emitted = forecasts(drive(Expect({"satisfaction": 0.7}), rows))
        quiet = [each for each in emitted if each.after_ms <= 40 * MINUTE_MS]
        assert {(each.bound, each.crosses_ms) for each in quiet} == {(0.7, None)}
        crosses = {each.after_ms // MINUTE_MS: each.crosses_ms // MINUTE_MS for each in emitted if each.crosses_ms is not None}
        said_early.append(min(crosses))
        said_late.append(crosses[72])
        assert emitted[-1].crosses_ms == emitted[-1].after_ms
    assert statistics.median(said_early) <= 65
    assert statistics.median(said_late) == pytest.approx(80, abs=15)


def test_a_window_unlike_the_others_is_an_anomaly_and_few_of_the_usual_ones_are() -> None:
    rows = list(counts(3, [0.85] * 200))
    rows[150] = (rows[150][1] // 2, rows[150][1])
    series = Series()
    found = [forecasting.observe(series, number, s, c, 1) for number, (s, c) in enumerate(rows)]
    assert found[150] is not None
    assert found[150].anomaly > 0.999
    usual = [each.anomaly for number, each in enumerate(found) if each is not None and number != 150]
    assert statistics.mean(anomaly > 0.99 for anomaly in usual) < 0.05


def test_few_observations_are_less_unusual_than_many() -> None:
    anomalies = []
    for count in (4, 100):
        series = Series()
        for number, (satisfied, of) in enumerate(counts(4, [0.85] * 50)):
            forecasting.observe(series, number, satisfied, of, 1)
        found = forecasting.observe(series, 50, count // 2, count, 1)
        assert found is not None
        anomalies.append(found.anomaly)
    assert anomalies[0] < 0.97 < anomalies[1]


def test_a_state_does_not_grow_with_what_was_taken_in() -> None:
    operator, state, most = Expect({"satisfaction": 0.7}), ExpectState(), 0
    rows = [window(n, s, c, correct=s, correct_of=c) for n, (s, c) in enumerate(counts(5, [0.8] * 1500))]
    for record, payload in recorded(rows):
        list(operator.apply(state, record, payload))
        most = max([most, *(len(each.scores) for each in state.widths["1m"].series.values())])
    assert most == forecasting.SCORES
    assert len(msgspec.json.encode(state)) < 16 << 10
