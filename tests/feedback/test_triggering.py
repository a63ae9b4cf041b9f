"""Why a round opens by itself: each kind of trigger, what holds it back, and that it asks once whatever crashes."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
import pytest
import samples
from devices import World
from fedloop_events import topics, types
from fedloop_events.folds.admit import Admit
from fedloop_events.folds.releases import ReleasesView
from fedloop_events.folds.rounds import RoundsView
from fedloop_events.logs.port import read_all
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_events.types import Payload
from fedloop_server.feedback.operator import Emit
from fedloop_server.feedback.operators.triggering import MAX_REASON_CHARS, MAX_USE_CASES, Triggering, TriggeringState
from fedloop_server.feedback.pipeline import Pipeline
from fedloop_server.feedback.states import States
from fedloop_server.feedback.under_way import UnderWay
from fedloop_server.triggers import (
    AccuracyTrigger,
    DriftTrigger,
    EventTrigger,
    FeedbackTrigger,
    ForecastTrigger,
    SatisfactionTrigger,
    ScheduleTrigger,
    Trigger,
)
from hypothesis import given, settings
from hypothesis import strategies as st

START_MS = int(datetime(2026, 5, 4, 12, tzinfo=UTC).timestamp() * 1000)
HOUR_MS = 3_600_000
RECORDED = Path(__file__).parents[1] / "events" / "recorded" / "deployments"
ENOUGH = FeedbackTrigger(name="enough", count=3)


def scored(
    satisfaction: float | None = None, use_case: str = "support", release: str = "r0", **more: Any
) -> types.FeedbackScored:
    reaction = types.Reaction(
        samples.masked("where is it"), **{key: more.pop(key) for key in ("label", "predicted") if key in more}
    )
    return types.FeedbackScored(
        samples.ORIGIN, use_case, "0" * 32, "device-1", "f1", "a1", release, 0, 0, reaction, satisfaction, **more
    )


def drift(metric: Any = "satisfaction", before: float | None = 0.83, after: float | None = 0.61) -> types.DriftDetected:
    return types.DriftDetected(samples.ORIGIN, "support", metric, ["adwin", "page-hinkley"], 0, before, after)


def forecast(expected: float, **more: Any) -> types.MetricForecast:
    return types.MetricForecast(samples.ORIGIN, "support", "satisfaction", "1m", 0, 30, expected, 0.0, 1.0, **more)


def published(release: str) -> types.ReleasePublished:
    return types.ReleasePublished(samples.ORIGIN, "default", 1, release, 1, types.BlobRef("0" * 64, 1))


def proposed(release: str, round_id: str) -> types.ReleaseProposed:
    return types.ReleaseProposed(samples.ORIGIN, "default", 1, release, 1, types.BlobRef("0" * 64, 1), round_id)


def opened(request_id: str, round_id: str) -> types.RoundOpened:
    return types.RoundOpened(
        samples.ORIGIN, 1, "main", round_id, request_id, 1, "default", "r0", types.BlobRef("0" * 64, 1), "ffa", ["ann"], 1, 1.0,
        [], 1, 1.0
    )  # fmt: skip


class Played:
    """An operator that takes in what is given to it, at the log's time `now_ms`; killed and restored after each event."""

    def __init__(self, *triggers: Trigger, time_zone: str = "UTC", state: TriggeringState | None = None, number: int = 0) -> None:
        self.operator, self.state = Triggering(triggers, time_zone), state or TriggeringState()
        self.now_ms, self.number = START_MS, number
        self.requests: list[types.RoundRequested] = []

    def take(self, *payloads: Payload) -> list[types.RoundRequested]:
        """What each makes it ask for."""
        before = len(self.requests)
        for payload in payloads:
            self.number += 1
            record = samples.record(samples.event(payload, self.number), self.number, appended_ms=self.now_ms)
            assert self.operator.key(record, payload) == "main"
            self._asked(self.operator.apply(self.state, record, payload))
        return self.requests[before:]

    def pass_ms(self, milliseconds: int) -> list[types.RoundRequested]:
        self.now_ms += milliseconds
        before = len(self.requests)
        self._asked(self.operator.advance("main", self.state, self.now_ms))
        return self.requests[before:]

    def _asked(self, emitted: Iterable[Emit]) -> None:
        for each in emitted:
            assert isinstance(each.payload, types.RoundRequested)
            assert each.of == (each.payload.request_id,)
            self.requests.append(each.payload)
        self.state = msgspec.msgpack.decode(msgspec.msgpack.encode(self.state), type=TriggeringState)

    def serve(self, release: str = "r1", round_id: str = "r0001") -> None:
        """The server opens the round that was asked for last, and publishes a release."""
        self.take(self.requests[-1], opened(self.requests[-1].request_id, round_id))
        self.take(proposed(release, round_id), published(release))


def test_nothing_fires_where_nothing_is_configured() -> None:
    play = Played()
    assert play.take(*[scored(0.0)] * 300, drift(), forecast(0.0), published("r1")) == []
    assert play.pass_ms(48 * HOUR_MS) == []


def test_enough_new_feedback_asks_for_a_round_and_after_its_release_the_count_begins_anew() -> None:
    play = Played(FeedbackTrigger(name="enough", count=3, rounds=2, cooldown_s=0))
    assert play.take(scored(), scored()) == []
    (asked,) = play.take(scored())
    assert (asked.run_id, asked.rounds, asked.reason) == (
        "main", 2, "feedback: 3 pieces of feedback of support since the last release",
    )  # fmt: skip
    assert asked.request_id.startswith("t-enough-")
    assert play.take(*[scored()] * 10) == [], "the round that was asked for is to learn from them"
    play.take(asked, opened(asked.request_id, "r0001"), proposed("r1", "r0001"), published("r1"))
    assert play.take(*[scored()] * 10) == [], "a second round was asked for"
    play.take(opened(asked.request_id, "r0002"), proposed("r2", "r0002"), published("r2"))
    assert play.take(scored(), scored()) == []
    assert play.take(scored())[0].request_id != asked.request_id


@pytest.mark.parametrize(
    ("of", "counts", "does_not"),
    [
        ("high", {"lane": "high"}, {"lane": "normal"}),
        ("corrections", {"label": "late", "predicted": "lost"}, {"label": "lost", "predicted": "lost"}),
    ],
)
def test_feedback_counts_by_lane_or_as_a_correction(of: Any, counts: dict[str, Any], does_not: dict[str, Any]) -> None:
    play = Played(FeedbackTrigger(name="enough", count=2, of=of))
    assert play.take(*[scored(**does_not) for _ in range(9)], scored(**counts)) == []
    assert len(play.take(scored(**counts))) == 1


def test_use_cases_count_each_by_itself_and_a_trigger_of_one_watches_no_other() -> None:
    play = Played(ENOUGH, FeedbackTrigger(name="finance", count=2, use_case="finance"))
    assert play.take(scored(), scored(), scored(use_case="finance"), scored(use_case="other")) == []
    assert "of finance" in play.take(scored(use_case="finance"))[0].reason


def test_a_metric_below_its_bound_fires_once_chance_does_not_explain_it() -> None:
    play = Played(SatisfactionTrigger(name="unhappy", below=0.7, over=50))
    assert play.take(*[scored(0.0)] * 49) == [], "fewer than it takes"
    (asked,) = play.take(scored(0.0))
    assert asked.reason == "satisfaction: 0.00 of support over the last 50, and the bound is 0.7"
    narrow = Played(AccuracyTrigger(name="wrong", below=0.7, over=50))
    assert narrow.take(*[scored(correct=number % 3 > 0) for number in range(200)]) == [], "0.67 is below by chance alone"
    assert len(narrow.take(*[scored(correct=number % 2 > 0) for number in range(100)])) == 1


@pytest.mark.parametrize(("true", "most", "least"), [(0.75, 4, 0), (0.5, 100, 100)])
def test_a_bound_is_quiet_five_points_above_and_sure_twenty_below(true: float, most: int, least: int) -> None:
    """In 100 streams of 300: see docs/feedback.md for the figures."""
    fired = 0
    for seed in range(100):
        draw, play = random.Random(seed), Played(SatisfactionTrigger(name="unhappy", below=0.7, over=50))
        play.state.origin = samples.ORIGIN
        operator, state = play.operator, play.state
        for number in range(300):
            payload = scored(float(draw.random() < true))
            record = samples.record(samples.event(payload, number), number, appended_ms=START_MS)
            if list(operator.apply(state, record, payload)):
                fired += 1
                break
    assert least <= fired <= most, fired


def test_answers_by_a_release_that_was_superseded_say_nothing_about_the_one_in_force() -> None:
    play = Played(SatisfactionTrigger(name="unhappy", below=0.7, over=10, cooldown_s=0))
    play.take(published("r0"))
    assert len(play.take(*[scored(0.0)] * 10)) == 1
    play.serve("r1")
    assert play.take(*[scored(0.0, release="r0")] * 50) == []
    assert play.take(*[scored(1.0, release="r1")] * 50) == []
    play.take(types.ReleaseRolledBack(samples.ORIGIN, "default", "r0", "r1", "worse"))
    assert play.take(*[scored(0.0, release="r1")] * 50) == []
    assert len(play.take(*[scored(0.0, release="r0")] * 10)) == 1


def test_a_fall_that_detectors_found_fires_and_a_rise_does_not() -> None:
    play = Played(DriftTrigger(name="drifted"))
    assert play.take(drift(before=0.61, after=0.83)) == []
    (asked,) = play.take(drift())
    assert asked.reason == "drift: satisfaction of support fell from 0.83 to 0.61 (ADWIN, Page-Hinkley)"
    narrow = Played(DriftTrigger(name="drifted", metrics=("labels",)))
    assert narrow.take(drift(), drift("embeddings", None, None)) == []
    assert narrow.take(drift("labels", None, None))[0].reason == "drift: labels of support changed (ADWIN, Page-Hinkley)"


def test_a_drift_fires_once_enough_feedback_came_after_it_unless_a_release_came_first() -> None:
    play = Played(DriftTrigger(name="drifted", after=3, cooldown_s=0))
    assert not play.take(scored(), scored(), scored(), drift(), scored(), scored(use_case="other"), scored())
    assert [each.reason for each in play.take(scored())] == [
        "drift: satisfaction of support fell from 0.83 to 0.61 (ADWIN, Page-Hinkley)"
    ]
    assert not play.take(scored(), scored(), scored())
    play.serve()
    assert not play.take(drift(), published("r2"), scored(), scored(), scored())


def test_a_forecast_fires_if_the_bound_is_crossed_soon_enough() -> None:
    trigger = ForecastTrigger(name="soon", metric="satisfaction", below=0.7, within_s=1800)
    assert Played(trigger).take(forecast(0.71)) == []
    assert Played(trigger).take(forecast(0.71, bound=0.7, crosses_ms=1_800_001)) == []
    assert len(Played(trigger).take(forecast(0.71, bound=0.7, crosses_ms=1_800_000))) == 1
    (asked,) = Played(trigger).take(forecast(0.69))
    assert asked.reason == "forecast: satisfaction of support is expected below 0.7 within 30 minutes"
    assert Played(ForecastTrigger(name="soon", metric="satisfaction", below=0.7, within_s=60)).take(forecast(0.69)) == []
    assert Played(ForecastTrigger(name="soon", metric="accuracy", below=0.7)).take(forecast(0.69)) == []


def test_a_schedule_fires_as_time_passes_once_for_each_time_and_makes_up_the_last_that_was_missed() -> None:
    play = Played(ScheduleTrigger(name="nightly", cron="30 2 * * *"), time_zone="Europe/Berlin")
    play.take(published("r0"))
    assert play.pass_ms(1_000) == [], "a new schedule makes up none"
    assert play.pass_ms(12 * HOUR_MS) == []
    (asked,) = play.pass_ms(HOUR_MS)
    assert asked.reason == "schedule: 2026-05-05T02:30+02:00"
    play.serve()
    assert play.pass_ms(1_000) == []
    (made_up,) = play.pass_ms(72 * HOUR_MS)
    assert made_up.reason == "schedule: 2026-05-08T02:30+02:00"


def test_whoever_fires_an_event_is_served_once_and_gives_the_reason() -> None:
    play = Played(EventTrigger(name="report"), ENOUGH)
    assert play.take(types.TriggerFired(samples.ORIGIN, "default", "enough")) == [], "that one waits for feedback"
    (asked,) = play.take(types.TriggerFired(samples.ORIGIN, "default", "report", "the report of May is there"))
    assert asked.reason == "event: the report of May is there"


def test_of_triggers_that_fire_together_the_first_by_priority_gives_the_reason_and_names_the_others() -> None:
    low = FeedbackTrigger(name="enough", count=10, rounds=5)
    high = SatisfactionTrigger(name="unhappy", below=0.7, over=10, priority=80)
    (asked,) = Played(low, high).take(*[scored(0.0)] * 10)
    assert asked.reason == "satisfaction: 0.00 of support over the last 10, and the bound is 0.7; also enough"
    assert (asked.request_id[:10], asked.rounds) == ("t-unhappy-", 5)


def test_what_fires_while_a_round_is_asked_for_or_runs_goes_into_it() -> None:
    play = Played(DriftTrigger(name="drifted", cooldown_s=0))
    by_hand = types.RoundRequested(samples.ORIGIN, "main", "q-1", 1, "operator")
    assert play.take(by_hand, drift(), opened("q-1", "r0001"), drift(), proposed("r1", "r0001"), drift()) == []
    assert (play.state.triggers["drifted"].fired, play.state.triggers["drifted"].request_id) == (1, "q-1")
    play.take(published("r1"))
    assert len(play.take(drift())) == 1


@pytest.mark.parametrize(
    "ends",
    [
        [types.RoundRequestWithdrawn(samples.ORIGIN, "main", "q-1")],
        [types.RoundAborted(samples.ORIGIN, 1, "main", "r0001", "quorum")],
        [opened("q-1", "r0001"), types.RoundAborted(samples.ORIGIN, 1, "main", "r0001", "quorum")],
        [opened("q-1", "r0001"), proposed("r1", "r0001"), types.ReleaseRejected(samples.ORIGIN, "default", 1, "r1", "worse")],
        # The two topics have no order between them.
        [proposed("r1", "r0001"), published("r1"), opened("q-1", "r0001")],
    ],
)
def test_a_round_is_no_longer_waited_for_however_it_ends(ends: list[Payload]) -> None:
    play = Played(DriftTrigger(name="drifted", cooldown_s=0))
    play.take(types.RoundRequested(samples.ORIGIN, "main", "q-1", 1, "operator"), drift())
    play.take(*ends)
    assert len(play.take(drift())) == 1


def test_a_trigger_cools_down_and_asks_no_more_often_than_it_may_in_a_day() -> None:
    play = Played(DriftTrigger(name="drifted", cooldown_s=3600, max_per_day=2))
    asked = 0
    for hour in range(72):
        if play.take(drift()):
            asked += 1
            play.serve(f"r{hour}", f"r{hour:04d}")
        assert play.take(drift()) == [], "it has just fired"
        play.now_ms += HOUR_MS
    assert asked == 6


def test_a_muted_trigger_asks_for_nothing_until_its_time_or_until_it_may_again() -> None:
    def muted(until_ms: int) -> types.TriggerMuted:
        return types.TriggerMuted(samples.ORIGIN, "default", "drifted", until_ms)

    play = Played(DriftTrigger(name="drifted"), EventTrigger(name="report"))
    play.take(muted(START_MS + 2 * HOUR_MS))
    assert play.take(drift()) == []
    again = Played(*play.operator.triggers, state=play.state, number=play.number)
    again.take(muted(0))
    assert len(again.take(drift())) == 1
    play.now_ms += 2 * HOUR_MS
    assert len(play.take(drift())) == 1


def test_a_reason_is_one_line_whatever_fires() -> None:
    many = [DriftTrigger(name=f"drifted-{number:02d}-{'x' * 20}") for number in range(50)]
    play = Played(EventTrigger(name="report", priority=99), *many)
    (long,) = play.take(types.TriggerFired(samples.ORIGIN, "default", "report", "y" * 200))
    play.serve()
    (crowded,) = play.take(drift())
    assert max(len(long.reason), len(crowded.reason)) <= MAX_REASON_CHARS
    assert crowded.reason.startswith("drift: satisfaction of support fell from 0.83 to 0.61 (ADWIN, Page-Hinkley)")


def test_the_state_is_bounded() -> None:
    operator, state = Triggering([SatisfactionTrigger(name="unhappy", below=0.01, over=20), ENOUGH]), TriggeringState()
    sizes = []
    for number in range(30_000):
        payload = scored(1.0, use_case=f"case-{number % 500:03d}")
        record = samples.record(samples.event(payload, number), number, appended_ms=START_MS + number)
        list(operator.apply(state, record, payload))
        if number in (14_999, 29_999):
            sizes.append(len(msgspec.msgpack.encode(state)))
    assert len(state.new) == MAX_USE_CASES
    assert sizes[1] <= sizes[0] * 1.1


STEPS = st.one_of(
    st.tuples(st.just("scored"), st.booleans(), st.sampled_from(["support", "finance"]), st.sampled_from(["r0", "r1"])),
    st.tuples(st.just("drift"), st.booleans()),
    st.tuples(st.just("fire")),
    st.tuples(st.just("mute"), st.integers(0, 4)),
    st.tuples(st.just("serve"), st.booleans()),
    st.tuples(st.just("pass"), st.integers(1, 30)),
)


@given(steps=st.lists(STEPS, max_size=60), cut=st.integers(0, 60))
@settings(max_examples=100, deadline=None)
def test_restored_anywhere_it_asks_for_the_same_and_never_for_two_rounds_at_once(steps: list[Any], cut: int) -> None:
    triggers: list[Trigger] = [
        FeedbackTrigger(name="enough", count=4, cooldown_s=600),
        SatisfactionTrigger(name="unhappy", below=0.9, over=10, priority=60, max_per_day=2),
        DriftTrigger(name="drifted", priority=80, cooldown_s=0),
        EventTrigger(name="report"),
        ScheduleTrigger(name="hourly", cron="0 * * * *"),
    ]

    def step(play: Played, number: int, kind: str, *values: Any) -> None:
        match kind, values:
            case "scored", (bool(good), use_case, release):
                play.take(scored(float(good), use_case=use_case, release=release))
            case "drift", (bool(fell),):
                play.take(drift(before=0.8, after=0.6 if fell else 0.9))
            case "fire", ():
                play.take(types.TriggerFired(samples.ORIGIN, "default", "report", "asked"))
            case "mute", (int(which),):
                play.take(types.TriggerMuted(samples.ORIGIN, "default", triggers[which].name, play.now_ms + HOUR_MS))
            case "serve", (bool(aborted),):
                waits = play.state.under_way.request
                if waits:
                    play.take(opened(waits, f"r{number:04d}"))
                    over: list[Payload] = [proposed(f"r{number}", f"r{number:04d}"), published(f"r{number}")]
                    play.take(*([types.RoundAborted(samples.ORIGIN, 1, "main", f"r{number:04d}", "quorum")] if aborted else over))
            case _:
                play.pass_ms(values[0] * 600_000)

    play = Played(*triggers)
    served = 0
    for number, each in enumerate(steps):
        if number == cut:
            saved = msgspec.msgpack.encode(play.state), play.now_ms, play.number, len(play.requests)
        served += each[0] == "serve"
        step(play, number, *each)
        assert len(play.requests) <= served + 1, "one waits, and a second one was asked for"
    assert len({asked.request_id for asked in play.requests}) == len(play.requests)
    if cut < len(steps):
        state, now_ms, taken, before = saved
        again = Played(*triggers, state=msgspec.msgpack.decode(state, type=TriggeringState), number=taken)
        again.now_ms = now_ms
        for number, each in enumerate(steps[cut:], cut):
            step(again, number, *each)
        assert again.requests == play.requests[before:]


def test_in_a_deployment_a_trigger_opens_a_round_and_the_pipeline_made_anew_asks_for_no_other(tmp_path: Path) -> None:
    world = World(tmp_path / "deployment")
    for name in ("ann", "bob"):
        world.device(name)
    origin = world.payloads(types.DeploymentCreated)[0].origin

    def run(file: str) -> None:
        with States(tmp_path / file) as states:
            Pipeline(world.log, world.writer, [Triggering([ENOUGH])], states).run(threading.Event(), until_idle=True)

    for number in range(5):
        world.writer.append(msgspec.structs.replace(scored(), origin=origin, feedback_id=f"f{number}"))
    run("feedback.sqlite")
    run("feedback.sqlite")
    (asked,) = world.payloads(types.RoundRequested)
    with world.serving():
        world.server().run(rounds=1)
    (round_opened,) = world.payloads(types.RoundOpened)
    assert round_opened.request_id == asked.request_id
    run("feedback.sqlite")
    run("anew.sqlite")
    assert world.payloads(types.RoundRequested) == [asked]


@pytest.mark.parametrize("name", ["open", "private"])
def test_what_is_under_way_is_what_the_folds_of_a_recorded_deployment_say(name: str, tmp_path: Path) -> None:
    file = tmp_path / "log.sqlite"
    file.write_bytes((RECORDED / name / "log.sqlite").read_bytes())
    under_way, rounds, releases, admit = UnderWay(), RoundsView(), ReleasesView(), Admit()
    ended = 0
    for record in read_all(SqliteLog(file), (topics.ROUNDS, topics.UPDATES, topics.RELEASES)):
        payload = admit(record)
        if payload is None:
            continue
        rounds.apply(record, payload)
        releases.apply(record, payload)
        if getattr(payload, "run_id", "main") == "main":
            under_way.apply(payload)
        assert under_way.requests == {each.request_id: each.rounds - len(each.numbers) for each in rounds.queued}
        last = rounds.last
        release = None if last is None else releases.releases.get(releases.by_round.get(last.round_id, ""))
        runs = last is not None and last.aborted is None and (release is None or release.status == "proposed")
        assert under_way.round_id == (last.round_id if last is not None and runs else "")
        ended += not runs
    assert ended
