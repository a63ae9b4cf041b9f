"""Drift and forecasts on seeded streams of zeros and ones: falls found and how late, and errors of what was expected."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from fedloop_server.feedback import forecasting
from fedloop_server.feedback.detectors import Jury, Watched
from river import base as river_base
from river import drift, linear_model, optim, preprocessing, time_series

from benchmarks.harness import Pair, Row, counted

LENGTH: Final = 4000
FALLS_AT: Final = 2000
GRADUALLY: Final = 1000
"""Observations that a gradual fall takes."""
USUAL: Final = 0.85
QUIET: Final = (0.5, USUAL, 0.97)
DROPS: Final = (0.05, 0.1, 0.2)
WINDOW: Final = 40
LEARNT: Final = 20
"""Windows before errors are compared."""
HELD: Final = 0.9

Stream = Sequence[float]
PEERS: Final[dict[str, Callable[[], river_base.DriftDetector]]] = {
    "ADWIN alone, as it comes": drift.ADWIN,
    "Page-Hinkley alone, as it comes": drift.PageHinkley,
}


def rows(quick: bool) -> Iterator[Row]:
    count, jury = 2 if quick else 200, Jury()
    for rate in QUIET:
        streams = [stream(seed, rate, 0.0, gradual=False) for seed in range(count)]
        silent = sum(first_alarm(jury, values) is None for values in streams)
        what = f"{count} quiet streams of {LENGTH:,} at {rate:.0%}: without an alarm"
        yield counted(what, "98 of 100, the bound", silent, 0.98 * count, "", None if quick else 1.0)
        for peer, make in PEERS.items():
            yield counted(what, peer, silent, sum(first_of(make(), values) is None for values in streams), "")
    forecasts: dict[int, list[Errors]] = {1: [], 15: []}
    for drop in DROPS:
        for gradual in (False, True):
            streams = [stream(1000 + seed, USUAL, drop, gradual=gradual) for seed in range(count)]
            what = f"{count} {'gradual' if gradual else 'abrupt'} falls of {100 * drop:.0f} points"
            yield from _found(what, jury, streams)
            for horizon, errors in forecasts.items():
                errors += [compare(values, horizon) for values in streams]
    for horizon, errors in forecasts.items():
        yield from _forecasts(f"forecast {horizon} windows ahead" if horizon > 1 else "forecast of the next window", errors)


def stream(seed: int, rate: float, drop: float, *, gradual: bool) -> Stream:
    """Zeros and ones; the rate falls after half of them, at once or evenly."""
    source = random.Random(seed)
    parts = [min(1.0, max(0.0, (n - FALLS_AT) / GRADUALLY)) if gradual else float(n >= FALLS_AT) for n in range(LENGTH)]
    return [float(source.random() < rate - drop * part) for part in parts]


def first_alarm(jury: Jury, values: Stream) -> int | None:
    """After how many observations drift is found first."""
    watched = Watched()
    return next((number for number, value in enumerate(values, 1) if jury.observe(watched, value) is not None), None)


def first_of(detector: river_base.DriftDetector, values: Stream) -> int | None:
    for number, value in enumerate(values, 1):
        detector.update(value)
        if detector.drift_detected:
            return number
    return None


def _found(what: str, jury: Jury, streams: Sequence[Stream]) -> Iterator[Row]:
    """How many alarms came after the fall, and how long after: in the middle, of those that did."""
    ours = _delays(first_alarm(jury, values) for values in streams)
    for peer, make in PEERS.items():
        theirs = _delays(first_of(make(), values) for values in streams)
        if ours and theirs:
            yield counted(f"{what}: found", peer, len(ours), len(theirs), "")
            middle = Pair(statistics.median(ours), statistics.median(theirs))
            yield Row(f"{what}: delay", peer, (middle,), "observations", less_is_better=True, counted=True)


def _delays(firsts: Iterable[int | None]) -> list[int]:
    return [first - FALLS_AT for first in firsts if first is not None and first > FALLS_AT]


class Errors(NamedTuple):
    """Mean absolute errors of one stream, and the share of intervals that held."""

    ours: float
    unchanged: float
    smoothed: float
    snarimax: float
    held: float


def compare(values: Stream, horizon: int) -> Errors:
    """Forecasts of the share of ones in windows of `WINDOW`, ours, the last window, and river's."""
    rates = [statistics.fmean(values[start : start + WINDOW]) for start in range(0, len(values), WINDOW)]
    series = forecasting.Series()
    smoothed, snarimax = time_series.HoltWinters(alpha=0.15), _snarimax()  # type: ignore[no-untyped-call]
    errors: list[tuple[float, ...]] = []
    for index, rate in enumerate(rates[:-horizon]):
        forecast = forecasting.observe(series, index, rate * WINDOW, WINDOW, horizon)
        smoothed.learn_one(rate)  # type: ignore[no-untyped-call]
        snarimax.learn_one(rate)  # type: ignore[no-untyped-call]
        if index >= LEARNT and forecast is not None:
            came = rates[index + horizon]
            expected = (forecast.expected, rate, _last(smoothed, horizon), _last(snarimax, horizon))
            errors.append((*(abs(each - came) for each in expected), float(forecast.low <= came <= forecast.high)))
    return Errors(*map(statistics.fmean, zip(*errors, strict=True)))


def _snarimax() -> time_series.SNARIMAX:
    slow = linear_model.LinearRegression(optimizer=optim.SGD(0.01), intercept_init=USUAL, intercept_lr=0.3)
    return time_series.SNARIMAX(p=4, d=0, q=0, regressor=preprocessing.StandardScaler() | slow)


def _last(forecaster: time_series.base.Forecaster, horizon: int) -> float:
    return float(forecaster.forecast(horizon)[-1])


def _forecasts(what: str, errors: Sequence[Errors]) -> Iterator[Row]:
    peers: dict[str, Callable[[Errors], float]] = {
        "the last window again": lambda each: each.unchanged,
        "river's HoltWinters, level alone": lambda each: each.smoothed,
        "river's SNARIMAX, p = 4": lambda each: each.snarimax,
    }
    ours = statistics.fmean(each.ours for each in errors)
    for peer, theirs in peers.items():
        pair = Pair(100 * ours, 100 * statistics.fmean(map(theirs, errors)))
        yield Row(f"{what}: error", peer, (pair,), "points", less_is_better=True, counted=True)
    held = statistics.fmean(each.held for each in errors)
    yield counted(f"{what}: intervals that held", "9 of 10", held, HELD, "")
