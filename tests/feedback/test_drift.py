"""Drift is found in the order of the log, soon and seldom in vain, and a restart changes nothing."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

import msgspec
import pytest
from fedloop_events.types import DriftDetected, FeedbackScored, ScoreWithdrawn
from fedloop_server.feedback import detectors, label_shift
from fedloop_server.feedback.detectors import Jury, Watched
from fedloop_server.feedback.operators.drift import Drift
from feedback.driving import USE_CASE, drive, scored
from hypothesis import given, settings
from hypothesis import strategies as st
from river import drift as river_drift
from samples import ORIGIN

QUIET_STREAMS = 25
ALARMS = 0
"""Promised are 2 of each hundred quiet streams of 4,000; measured is less than one."""


def coins(seed: int, *rates: tuple[int, float]) -> Iterator[float]:
    """Zeros and ones, so many of each rate."""
    source = random.Random(seed)
    for count, rate in rates:
        yield from (float(source.random() < rate) for _ in range(count))


def found(*rates: tuple[int, float], seed: int) -> list[tuple[int, detectors.Change]]:
    """The changes, and after how many observations each was found."""
    jury, watched = Jury(), Watched()
    changes = ((number, jury.observe(watched, value)) for number, value in enumerate(coins(seed, *rates), 1))
    return [(number, change) for number, change in changes if change is not None]


def test_drift_is_emitted_with_the_feedback_that_shows_it_from_what_to_what() -> None:
    values = list(coins(1, (1000, 0.9), (1000, 0.6)))
    payloads = [scored(n, value, correct=not n % 2) for n, value in enumerate(values)]
    (emitted,) = drive(Drift(), payloads)
    drift = emitted.emit.payload
    assert isinstance(drift, DriftDetected)
    assert (drift.metric, drift.use_case, drift.detectors) == ("satisfaction", USE_CASE, ["adwin", "page-hinkley"])
    assert 1000 < drift.seen < 1300
    assert drift.at_ms == payloads[drift.seen - 1].given_ms
    assert drift.before == pytest.approx(0.9, abs=0.05)
    assert drift.after == pytest.approx(0.6, abs=0.1)
    assert emitted.emit.of == ()


def test_a_fall_of_accuracy_is_found_apart_from_satisfaction() -> None:
    accuracy = coins(2, (1000, 0.9), (1000, 0.6))
    payloads = [scored(n, 1.0, correct=bool(value)) for n, value in enumerate(accuracy)]
    assert [each.emit.payload.metric for each in drive(Drift(), payloads)] == ["accuracy"]  # type: ignore[attr-defined]


def test_feedback_that_says_nothing_of_a_metric_changes_nothing() -> None:
    values = list(coins(1, (1000, 0.9), (1000, 0.6)))
    alone = [scored(n, value) for n, value in enumerate(values)]
    mixed: list[FeedbackScored | ScoreWithdrawn] = []
    for each in alone:
        mixed += [each, scored(10_000 + len(mixed)), ScoreWithdrawn(ORIGIN, USE_CASE, each.client_id, each.feedback_id)]
    assert [each.emit.payload for each in drive(Drift(), mixed)] == [each.emit.payload for each in drive(Drift(), alone)]


@settings(max_examples=8, deadline=None)
@given(st.integers(0, 1000), st.integers(300, 900), st.sampled_from([0.0, 0.3, 0.6]), st.sampled_from([1, 2, 7, 501]))
def test_a_restart_after_any_event_changes_no_emission_and_no_id(seed: int, falls_at: int, fall: float, every: int) -> None:
    source = random.Random(seed)
    rates = [0.95 if n < falls_at else 0.95 - fall for n in range(1200)]
    payloads = [
        scored(n, float(source.random() < rate), correct=source.random() < rate, predicted=source.choice("abc"))
        for n, rate in enumerate(rates)
    ]
    uninterrupted = drive(Drift(), payloads)
    assert drive(Drift(), payloads, restored_after=every) == uninterrupted
    assert bool(uninterrupted) == bool(fall)


def test_restored_after_every_observation_the_detectors_see_what_rivers_own_see_that_never_stop() -> None:
    watched = Watched()
    adwin, hinkley = river_drift.ADWIN(delta=detectors.ADWIN_DELTA), river_drift.PageHinkley(100, detectors.HINKLEY_DELTA)  # type: ignore[no-untyped-call]
    cuts = []
    # Up and down and so often that one sees what the other does not, and their votes are kept apart.
    for value in coins(3, *[(700, 0.9), (300, 0.75)] * 4):
        watched = msgspec.json.decode(msgspec.json.encode(watched), type=Watched)
        before = dict(watched.votes)
        changed = Jury().observe(watched, value)
        adwin.update(value)  # type: ignore[no-untyped-call]
        voted = {name for name, vote in watched.votes.items() if vote != before.get(name)}
        if changed is None:
            hinkley.threshold = detectors.HINKLEY_VARIANCES * watched.variance
            hinkley.update(value)  # type: ignore[no-untyped-call]
            assert voted == {name for name, detector in (("adwin", adwin), ("page-hinkley", hinkley)) if detector.drift_detected}
            continue
        cuts.append(changed)
        adwin, hinkley = river_drift.ADWIN(delta=detectors.ADWIN_DELTA), river_drift.PageHinkley(100, detectors.HINKLEY_DELTA)  # type: ignore[no-untyped-call]
    assert cuts


def test_what_was_kept_is_what_river_gives_today() -> None:
    """If river's bytes change, `Drift.version` has to rise: states of before cannot be read."""
    jury, watched = Jury(), Watched()
    for value in coins(4, (500, 0.8)):
        assert jury.observe(watched, value) is None
    assert hashlib.sha256(watched.adwin).hexdigest()[:16] == "aa5f5ab5bce72e0b"


@pytest.mark.parametrize("rate", [0.5, 0.85, 0.97])
def test_a_quiet_stream_raises_no_alarm_whatever_its_level(rate: float) -> None:
    alarms = sum(bool(found((4000, rate), seed=seed)) for seed in range(QUIET_STREAMS))
    assert alarms <= ALARMS


@pytest.mark.parametrize(("fall", "fewest", "latest"), [(0.05, 11, 1500), (0.1, 19, 600), (0.2, 19, 250)])
def test_a_fall_is_found_the_sooner_the_deeper_it_is(fall: float, fewest: int, latest: int) -> None:
    firsts = [changes[0] for seed in range(20) if (changes := found((2000, 0.85), (2000, 0.85 - fall), seed=100 + seed))]
    delays = sorted(number - 2000 for number, _ in firsts if number > 2000)
    assert len(delays) >= fewest
    assert delays[len(delays) // 2] <= latest


def test_after_a_drift_the_new_level_is_the_usual_one_and_the_way_back_is_a_drift_too() -> None:
    changes = found((1000, 0.9), (2000, 0.6), (1000, 0.9), seed=6)
    assert [change.after < change.before for _, change in changes] == [True, False]
    assert [2000 > changes[0][0] > 1000, 4000 > changes[1][0] > 3000] == [True, True]


def test_a_state_does_not_grow_with_what_was_taken_in() -> None:
    jury, watched, labels = Jury(), Watched(), label_shift.Labels()
    source, most = random.Random(7), 0
    for number, value in enumerate(coins(7, (60_000, 0.85))):
        jury.observe(watched, value)
        label_shift.observe(labels, f"label {source.randrange(1000)}" if number % 2 else "usual")
        most = max(most, len(labels.names), len(labels.reference))
    assert watched.seen == 60_000
    assert len(msgspec.json.encode(watched)) < 8 << 10
    assert most == label_shift.MAX_LABELS + 1
    assert len(labels.recent) <= label_shift.PARTS


def shares(seed: int, labels: int, moved: float) -> Iterator[str]:
    """2,000 labels, the first of them the most frequent, and 2,000 of which a part went over to another one."""
    source, names = random.Random(seed), [f"label {n}" for n in range(labels)]
    usual = [1 / (n + 1) for n in range(labels)]
    yield from source.choices(names, usual, k=2000)
    usual = [weight * (1 - moved) for weight in usual]
    usual[labels // 2] += moved * sum(usual) / (1 - moved)
    yield from source.choices(names, usual, k=2000)


def label_alarms(seed: int, labels: int, moved: float) -> list[int]:
    state = label_shift.Labels()
    return [n for n, label in enumerate(shares(seed, labels, moved), 1) if label_shift.observe(state, label) is not None]


@pytest.mark.parametrize("labels", [2, 10, 77])
def test_the_same_labels_as_before_are_no_drift_however_many_they_are(labels: int) -> None:
    assert sum(bool(label_alarms(seed, labels, 0.0)) for seed in range(25)) <= 1


@pytest.mark.parametrize("labels", [5, 77])
def test_a_fifth_that_asks_something_else_is_found_within_two_windows(labels: int) -> None:
    for seed in range(10):
        alarms = label_alarms(seed, labels, 0.2)
        assert alarms
        assert 2000 < alarms[0] <= 3000


def test_label_drift_says_the_index() -> None:
    payloads = [scored(n, predicted=label) for n, label in enumerate(shares(0, 10, 0.3))]
    emitted = drive(Drift(), payloads)
    drift = emitted[0].emit.payload
    assert isinstance(drift, DriftDetected)
    assert (drift.metric, drift.detectors, drift.before) == ("labels", ["psi"], None)
    assert drift.statistic is not None
    assert drift.statistic > label_shift.LEAST_INDEX
