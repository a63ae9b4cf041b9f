"""Windows of feedback and of devices' counts: what is in each, whatever order, duplicates and restarts there were."""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import msgspec
import samples
from fedloop_events import envelope, topics
from fedloop_events.envelope import Record
from fedloop_events.types import (
    EventQuarantined,
    FeedbackScored,
    MetricsWindowed,
    Payload,
    UsageCounted,
    UsageSummarised,
    Width,
)
from fedloop_events.types.scored import Reaction
from fedloop_server.feedback.operator import Emit
from fedloop_server.feedback.operators import measuring
from fedloop_server.feedback.operators.counting import Counting, Nothing
from fedloop_server.feedback.operators.measuring import GRACE_MS, Measuring, Windows
from fedloop_server.feedback.operators.sums import WIDTHS_MS
from hypothesis import given, settings
from hypothesis import strategies as st

MINUTE, HOUR, DAY = 60_000, 3_600_000, 24 * 3_600_000
NOON: Final = 20_000 * DAY + 12 * HOUR
OPERATOR: Final = Measuring()


class Came(NamedTuple):
    """A payload, its event's id, and when the log had it."""

    payload: FeedbackScored | UsageCounted
    id: str
    recorded_ms: int


def scored(
    given_ms: int,
    recorded_ms: int | None = None,
    *,
    satisfaction: float | None = 1.0,
    correct: bool | None = None,
    sentiment: float | None = None,
    release: str = "r1",
    language: str | None = "en",
    signal: str | None = None,
    masked: int = 0,
) -> FeedbackScored:
    return FeedbackScored(
        samples.ORIGIN,
        "support",
        event_id="0" * 32,
        client_id="device-1",
        feedback_id="f",
        response_id="r",
        release=release,
        given_ms=given_ms,
        recorded_ms=given_ms if recorded_ms is None else recorded_ms,
        reaction=Reaction(text=samples.masked("hello"), signal=signal),
        satisfaction=satisfaction,
        correct=correct,
        sentiment=sentiment,
        language=language,
        masked=masked,
    )


def usage(from_ms: int, to_ms: int, recorded_ms: int, answers: int = 0, quarantined: int = 0, **latency: int) -> UsageCounted:
    bins = {name.removeprefix("bin"): count for name, count in latency.items()}
    return UsageCounted(samples.ORIGIN, "support", "r1", from_ms, to_ms, recorded_ms, answers, bins, quarantined)


def record(payload: Payload, number: int, appended_ms: int) -> Record:
    event = envelope.encode(payload, id=f"{number:032x}", time_s=0)
    return Record(
        *(getattr(event, name) for name in event.__struct_fields__),
        stream=f"{payload.topic}-0",
        offset=number,
        appended_ms=appended_ms,
    )


def fed(state: Windows, *payloads: FeedbackScored | UsageCounted) -> list[Emit]:
    return [
        each for number, payload in enumerate(payloads) for each in OPERATOR.apply(state, record(payload, number, 0), payload)
    ]


def closed(state: Windows, now_ms: int) -> dict[Width, list[MetricsWindowed]]:
    found: dict[Width, list[MetricsWindowed]] = {"1m": [], "1h": [], "1d": []}
    for emitted in OPERATOR.advance("support", state, now_ms):
        assert isinstance(emitted.payload, MetricsWindowed)
        found[emitted.payload.width].append(emitted.payload)
    return found


def test_a_window_has_what_was_given_in_it_and_is_closed_once_its_grace_has_passed() -> None:
    state = Windows()
    assert not fed(
        state,
        scored(NOON, satisfaction=0.75, correct=True, masked=2),
        scored(NOON + 59_999, satisfaction=0.25, correct=False, sentiment=-0.5, signal="copied"),
        scored(NOON + MINUTE, satisfaction=None, signal="escalated"),
    )
    assert closed(state, NOON + MINUTE + GRACE_MS["1m"]) == {"1m": [], "1h": [], "1d": []}
    (first,) = closed(state, NOON + MINUTE + GRACE_MS["1m"] + 1)["1m"]
    assert (first.start_ms, first.release, first.language, first.use_case) == (NOON, "r1", "en", "support")
    assert (first.feedback, first.satisfied, first.satisfied_of, first.satisfaction) == (2, 1.0, 2, 0.5)
    assert (first.correct, first.correct_of, first.accuracy) == (1, 2, 0.5)
    assert (first.sentiment_sum, first.sentiment_of, first.masked, first.signals) == (-0.5, 1, 2, {"copied": 1})
    later = closed(state, NOON + 2 * DAY)
    (second,), (hour,), (day,) = later["1m"], later["1h"], later["1d"]
    assert (second.feedback, second.satisfaction, second.signals) == (1, None, {"escalated": 1})
    assert hour.signals == day.signals == {"copied": 1, "escalated": 1}
    assert (hour.feedback, hour.start_ms, day.feedback, day.start_ms) == (3, NOON, 3, NOON - 12 * HOUR)
    assert closed(state, NOON + 9 * DAY) == {"1m": [], "1h": [], "1d": []}


def test_releases_and_languages_have_windows_of_their_own() -> None:
    state = Windows()
    fed(state, scored(NOON), scored(NOON, release="r2"), scored(NOON, language="de"), scored(NOON, language=None), scored(NOON))
    found = [(each.release, each.language, each.feedback) for each in closed(state, NOON + DAY)["1m"]]
    assert found == [("r1", None, 1), ("r1", "de", 1), ("r1", "en", 2), ("r2", "en", 1)]


def test_what_is_recorded_after_the_grace_counts_as_late_where_it_was_recorded_and_only_for_widths_that_are_over() -> None:
    late = NOON + MINUTE + GRACE_MS["1m"] + 1
    state = Windows()
    fed(state, scored(NOON, late - 1), scored(NOON, late))
    windows = closed(state, NOON + 2 * DAY)
    assert [(each.start_ms, each.feedback, each.late) for each in windows["1m"]] == [
        (NOON, 1, 0),
        (late - late % MINUTE, 0, 1),
    ]
    assert [(each.feedback, each.late) for each in (*windows["1h"], *windows["1d"])] == [(2, 0), (2, 0)]


def test_a_devices_clock_that_is_ahead_counts_as_the_logs() -> None:
    state = Windows()
    fed(state, scored(NOON + 400 * DAY, NOON), scored(2**53 - 1, NOON))
    assert {
        width: [(each.start_ms, each.feedback) for each in found] for width, found in closed(state, NOON + 2 * DAY).items()
    } == {
        "1m": [(NOON, 2)],
        "1h": [(NOON, 2)],
        "1d": [(NOON - 12 * HOUR, 2)],
    }
    assert state.open == {"1m": {}, "1h": {}, "1d": {}}


def test_a_summary_counts_in_windows_that_are_at_least_as_long_with_its_quantiles_merged() -> None:
    state = Windows()
    fed(
        state,
        usage(NOON, NOON + HOUR, NOON + HOUR, 3, bin0=2, bin35=1),
        usage(NOON, NOON + HOUR, NOON + HOUR + 5, 97, bin0=97),
        usage(NOON, NOON, NOON, quarantined=1),
    )
    windows = closed(state, NOON + 2 * DAY)
    assert [(each.answers, each.quarantined) for found in windows.values() for each in found] == [(0, 1), (100, 1), (100, 1)]
    latency = windows["1h"][0].latency
    assert latency is not None
    assert latency == windows["1d"][0].latency
    assert (latency.count, round(latency.p50, 1), round(latency.p99, 1)) == (100, 1.0, 1.0)


def test_counts_that_devices_exaggerate_stay_what_an_event_can_hold() -> None:
    state = Windows()
    most = 2**53 - 1
    fed(
        state,
        *(usage(NOON, NOON, NOON, most, most, bin9999=most) for _ in range(2)),
        scored(NOON, masked=most),
        scored(NOON, masked=most),
    )
    for found in closed(state, NOON + 2 * DAY).values():
        for each in found:
            assert envelope.decode(envelope.encode(each, id="0" * 32, time_s=0)) == each


def test_more_releases_and_signals_than_are_told_apart_are_counted_together() -> None:
    state = Windows()
    names = [f"{a}{b}" for a in "abcdefghijkl" for b in "abcdefghij"]
    fed(state, *(scored(NOON, release=name) for name in names), *(scored(NOON, release="aa", signal=name) for name in names))
    found = {each.release: each for each in closed(state, NOON + DAY)["1m"]}
    assert len(found) == measuring.MAX_GROUPS + 1
    assert sum(each.feedback for each in found.values()) == 2 * len(names)
    assert found["other"].feedback == len(names) - measuring.MAX_GROUPS
    assert found["aa"].signals["other"] == len(names) - 64
    assert len(found["aa"].signals) == 65


def test_a_runner_that_never_advances_closes_the_first_window_early_and_loses_nothing() -> None:
    state = Windows()
    count = measuring.MAX_OPEN + 50
    emitted = fed(state, *(scored(NOON + number * MINUTE) for number in range(count)))
    assert state.groups <= measuring.MAX_OPEN
    assert emitted[0].payload == closed_first(emitted)
    emitted += OPERATOR.advance("support", state, NOON + 9 * DAY)
    by_width: dict[Width, int] = {"1m": 0, "1h": 0, "1d": 0}
    for each in emitted:
        assert isinstance(each.payload, MetricsWindowed)
        by_width[each.payload.width] += each.payload.feedback
    assert by_width == {"1m": count, "1h": count, "1d": count}
    assert len({each.of for each in emitted}) == len(emitted)


def closed_first(emitted: Iterable[Emit]) -> MetricsWindowed:
    return min(
        (each.payload for each in emitted if isinstance(each.payload, MetricsWindowed)),
        key=lambda each: each.start_ms + WIDTHS_MS[each.width],
    )


def test_what_comes_after_its_window_was_closed_makes_no_second_one() -> None:
    state = Windows()
    fed(state, scored(NOON))
    first = closed(state, NOON + 3 * DAY)
    fed(state, scored(NOON))
    second = closed(state, NOON + 9 * DAY)
    for width in WIDTHS_MS:
        assert [(each.feedback, each.late) for each in (*first[width], *second[width])] == [(1, 0), (0, 1)]
        assert first[width][0].start_ms < second[width][0].start_ms


GIVEN = st.sampled_from([NOON, NOON + 1, NOON + MINUTE, NOON + HOUR]) | st.integers(0, 4 * HOUR).map(lambda ms: NOON + ms)
LATER_BY = st.sampled_from([0, 1, MINUTE, 3 * MINUTE, 3 * MINUTE + 1, 90 * MINUTE, 90 * MINUTE + 1, 18 * HOUR, DAY])
SCORED = st.builds(
    lambda given_ms, by, satisfaction, correct, sentiment, release, language, signal, masked: scored(
        given_ms,
        max(given_ms + by, 0),
        satisfaction=satisfaction,
        correct=correct,
        sentiment=sentiment,
        release=release,
        language=language,
        signal=signal,
        masked=masked,
    ),
    GIVEN,
    LATER_BY,
    st.none() | st.floats(0, 1),
    st.none() | st.booleans(),
    st.none() | st.floats(-1, 1),
    st.sampled_from(["r1", "r2"]),
    st.sampled_from([None, "en"]),
    st.sampled_from([None, "copied", "abandoned"]),
    st.integers(0, 3),
)
USAGE = st.builds(
    lambda from_ms, took, by, answers, number, quarantined: usage(
        from_ms, from_ms + took, max(from_ms + took + by, 0), answers, quarantined, **{f"bin{number}": answers}
    ),
    GIVEN,
    st.sampled_from([0, MINUTE, HOUR, DAY, 2 * DAY]),
    LATER_BY,
    st.integers(0, 5),
    st.integers(-900, 900),
    st.integers(0, 1),
)


def run(events: Sequence[Came], advances: Sequence[int], how: random.Random | None = None) -> dict[tuple[str | int, ...], bytes]:
    """What is emitted, by what it is of: before a call of `advance` everything that was recorded earlier is taken in.

    With `how` the rest is too, in part, in any order and some of it again, and the state is written and read anywhere.
    """
    state, seen, found = Windows(), set[str](), dict[tuple[str | int, ...], bytes]()
    left = list(events)
    if how is not None and left:
        left += how.choices(left, k=len(left) // 2)
        how.shuffle(left)

    def keep(emitted: Iterable[Emit]) -> None:
        for each in emitted:
            assert each.of not in found
            found[each.of] = msgspec.json.encode((each.payload, each.time_ms))

    for now_ms in (*advances, NOON + 100 * DAY):
        due = [each for each in left if each.recorded_ms < now_ms or (how is not None and how.random() < 0.5)]
        left = [each for each in left if each not in due]
        for each in due:
            if each.id not in seen:
                seen.add(each.id)
                keep(OPERATOR.apply(state, record(each.payload, int(each.id, 16), each.recorded_ms), each.payload))
            if how is not None and how.random() < 0.2:
                state = msgspec.msgpack.decode(msgspec.msgpack.encode(state), type=Windows)
                state = msgspec.json.decode(msgspec.json.encode(state), type=Windows)
        keep(OPERATOR.advance("support", state, now_ms))
    assert not left
    return found


@settings(max_examples=200, deadline=None)
@given(
    st.lists(SCORED | USAGE, max_size=25),
    st.lists(GIVEN, max_size=3),
    st.randoms(use_true_random=False),
)
def test_any_order_any_duplicates_and_any_restart_give_the_same_windows(
    payloads: list[FeedbackScored | UsageCounted], advances: list[int], how: random.Random
) -> None:
    events = [Came(each, f"{number:032x}", each.recorded_ms) for number, each in enumerate(payloads)]
    advances += [each.recorded_ms + how.randint(0, 1) for each in events if how.random() < 0.5]
    once = run(sorted(events, key=lambda each: each.recorded_ms), [])
    assert run(events, sorted(advances), how) == once
    for width in WIDTHS_MS:
        windows = [msgspec.json.decode(each, type=tuple[MetricsWindowed, int])[0] for of, each in once.items() if of[3] == width]
        given_feedback = sum(isinstance(each, FeedbackScored) for each in payloads)
        fitting = sum(isinstance(each, UsageCounted) and each.to_ms - each.from_ms <= WIDTHS_MS[width] for each in payloads)
        late = sum(each.late for each in windows)
        assert given_feedback <= sum(each.feedback for each in windows) + late <= given_feedback + fitting


def summary(**changed: object) -> UsageSummarised:
    whole: dict[str, object] = {
        "origin": samples.ORIGIN, "client_id": "device-1", "seq": 1, "use_case": "support", "release": "r1",
        "from_ms": NOON, "to_ms": NOON + HOUR, "answers": 3, "latency": {"0": 2, "35": 1},
        "signals": {"copied": 1}, "masked": {"PERSON": 2},
    }  # fmt: skip
    return msgspec.convert(whole | changed, UsageSummarised)


def test_a_summary_and_a_quarantined_event_are_passed_on_by_use_case() -> None:
    counting, said = Counting(), summary()
    assert counting.key(record(said, 1, 0), said) == "device-1"
    (emitted,) = counting.apply(Nothing(), record(said, 1, NOON + HOUR + 7), said)
    assert emitted == Emit(usage(NOON, NOON + HOUR, NOON + HOUR + 7, 3, bin0=2, bin35=1))
    assert emitted.payload.key == "support"
    held = EventQuarantined(
        samples.ORIGIN,
        topics.FEEDBACK,
        "1" * 32,
        "personal",
        use_case="support",
        release="r1",
        given_ms=NOON,
        recorded_ms=NOON + 3,
    )
    assert counting.key(record(held, 1, 0), held) == topics.FEEDBACK
    assert list(counting.apply(Nothing(), record(held, 1, NOON + 9), held)) == [Emit(usage(NOON, NOON, NOON + 3, quarantined=1))]
    unknown = EventQuarantined(samples.ORIGIN, topics.FEEDBACK, "1" * 32, "personal")
    assert not list(counting.apply(Nothing(), record(unknown, 1, NOON), unknown))


def test_a_summary_that_contradicts_itself_counts_for_nothing() -> None:
    for wrong in (
        summary(to_ms=NOON),
        summary(to_ms=NOON + 8 * DAY),
        summary(to_ms=NOON + 2),
        summary(answers=2),
        summary(answers=2**53 - 1),
    ):
        assert not list(Counting().apply(Nothing(), record(wrong, 1, NOON), wrong))
