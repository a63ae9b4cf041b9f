"""Each piece of feedback is scored once or held back, and what is retracted is withdrawn, however long ago it was given."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import msgspec
import pytest
import samples
from fedloop_events import types
from fedloop_events.envelope import MAX_EVENT_BYTES, Event, Record, expect, size_bytes
from fedloop_events.locations import open_log
from fedloop_events.masked import MaskedText, MaskedTurn
from fedloop_events.types import FeedbackRecorded, FeedbackScored, Payload
from fedloop_events.writer import EventWriter
from fedloop_privacy.masking import MaskingError
from fedloop_server.feedback.operator import event_of
from fedloop_server.feedback.operators import scoring
from fedloop_server.feedback.operators.novelty import MAX_SAMPLED
from fedloop_server.feedback.operators.scoring import ClientFeedback, Scoring
from fedloop_server.feedback.operators.sentiment import MAX_CHARS, sentiment
from hypothesis import given, settings
from hypothesis import strategies as st
from msgspec.structs import replace

MAIL = "write to jo@example.org"
BARE = replace(samples.feedback(), thumb=None)


def masked(text: str, **counts: int) -> MaskedText:
    return msgspec.convert({"text": text, "counts": counts}, MaskedText)


class Driver:
    """Feeds one client's events to the operator, as a runner does: its state is packed and unpacked in between."""

    def __init__(self, operator: Scoring | None = None) -> None:
        self.operator, self._state, self._count = operator or Scoring(), msgspec.msgpack.encode(ClientFeedback()), 0

    def __call__(self, payload: Payload) -> list[Payload]:
        self._count += 1
        record = samples.record(samples.event(payload, self._count), self._count, appended_ms=1_900_000_000_000 + self._count)
        return self.read(record, payload)

    def read(self, record: Record, payload: Payload) -> list[Payload]:
        state = msgspec.msgpack.decode(self._state, type=ClientFeedback)
        assert self.operator.key(record, payload) == payload.key
        emitted = [each.payload for each in self.operator.apply(state, record, payload)]
        self._state = msgspec.msgpack.encode(state)
        return emitted

    @property
    def state(self) -> bytes:
        return self._state


def retracted(feedback_id: str) -> types.FeedbackRetracted:
    return types.FeedbackRetracted(samples.ORIGIN, "device-1", 99, feedback_id)


def scored(feedback: FeedbackRecorded, operator: Scoring | None = None) -> FeedbackScored:
    (found,) = Driver(operator)(feedback)
    assert isinstance(found, FeedbackScored)
    return found


def held(feedback: FeedbackRecorded, operator: Scoring | None = None) -> types.EventQuarantined:
    (found,) = Driver(operator)(feedback)
    assert isinstance(found, types.EventQuarantined)
    return found


def test_what_passes_is_handed_on_with_its_scores() -> None:
    turn = MaskedTurn(role="user", text=masked("<PERSON_1> asks", PERSON=1))
    feedback = replace(
        samples.feedback(7),
        context=[turn],
        correction=masked("stolen_card"),
        comment=masked("<PERSON_1>, that is useless and wrong", PERSON=1),
        thumb="down",
    )
    found = scored(feedback)
    assert (found.origin, found.use_case, found.client_id, found.feedback_id) == ("demo", "default", "device-1", "f7")
    assert (found.release, found.response_id) == (feedback.release, "r7")
    assert (found.given_ms, found.recorded_ms) == (1_800_000_000_000, 1_900_000_000_001)
    names = types.Reaction.__struct_fields__
    assert {name: getattr(found.reaction, name) for name in names} == {name: getattr(feedback, name) for name in names}
    assert (found.satisfaction, found.correct, found.language, found.novelty, found.masked) == (0.0, False, None, None, 3)
    assert found.sentiment is not None
    assert found.sentiment < -0.5
    assert found.lane == "high"
    assert "useless" not in str(found)


def test_what_looks_personal_is_held_back_without_its_content() -> None:
    found = held(replace(samples.feedback(), comment=masked(f"{MAIL}, or ask <PERSON_1>")))
    assert (found.source_topic, found.reason, found.found) == ("feedback", "looks-personal", {"EMAIL_ADDRESS": 1})
    assert (found.client_id, found.use_case, found.release) == ("device-1", "default", "0001-0123456789ab")
    assert (found.given_ms, found.recorded_ms) == (1_800_000_000_000, 1_900_000_000_001)
    assert "jo@" not in str(found)


def test_a_whole_masker_reads_what_the_fast_gate_passes() -> None:
    read: list[str] = []

    def full(text: str) -> Mapping[str, int]:
        read.append(text)
        return {"PERSON": text.count("Ann")}

    operator = Scoring(full=full)
    feedback = replace(samples.feedback(), text=masked("Ann asked"), comment=masked("Ann and Ann"))
    assert held(feedback, operator).found == {"PERSON": 3}
    assert scored(samples.feedback(), operator).use_case == "default"
    read.clear()
    held(replace(feedback, comment=masked(MAIL)), operator)
    assert read == []


def test_where_the_whole_masker_fails_feedback_is_held_back() -> None:
    def full(text: str) -> Mapping[str, int]:
        raise MaskingError("the text could not be masked, so nothing of it is used")

    found = held(samples.feedback(), Scoring(full=full))
    assert (found.reason, found.detail) == ("not-checked", "the text could not be masked, so nothing of it is used")


@pytest.mark.parametrize(
    ("changes", "satisfaction", "correct"),
    [
        ({"thumb": "up"}, 1.0, True),
        ({"thumb": "down"}, 0.0, False),
        ({"thumb": "down", "predicted": None, "response": masked("so it is")}, 0.0, None),
        ({"thumb": "up", "label": "x"}, 1.0, False),
        ({"rating": 1}, 0.0, None),
        ({"rating": 4}, 0.75, None),
        ({"rating": 5, "signal": "abandoned"}, 1.0, None),
        ({"label": "lost_card"}, 1.0, True),
        ({"label": "other"}, 0.0, False),
        ({"correction": masked("lost_card ")}, 1.0, True),
        ({"correction": masked("other")}, 0.0, False),
        ({"predicted": None, "response": masked("so it is"), "correction": masked("so it is not")}, 0.0, False),
        ({"predicted": None, "correction": masked("so it is")}, 0.0, False),
        ({"predicted": None, "label": "other"}, None, None),
        ({"preferred_over": "r9"}, 1.0, None),
        ({"signal": "copied"}, 1.0, None),
        ({"signal": "regenerated"}, 0.0, None),
        ({"signal": "abandoned"}, 0.0, None),
        ({"signal": "escalated"}, 0.0, None),
        ({"signal": "clicked"}, None, None),
        ({"comment": masked("fine")}, None, None),
    ],
)
def test_what_a_reaction_says(changes: dict[str, object], satisfaction: float | None, correct: bool | None) -> None:
    found = scored(replace(BARE, **changes))
    assert (found.satisfaction, found.correct) == (satisfaction, correct)


def test_what_teaches_most_comes_first() -> None:
    angry = masked("this is a horrible, useless answer and I hate it")
    ascending = [
        BARE,
        replace(BARE, rating=2),
        replace(BARE, thumb="down"),
        replace(BARE, thumb="down", comment=angry),
        replace(BARE, label="other"),
        replace(BARE, label="other", comment=angry),
    ]
    found = [scored(each) for each in ascending]
    assert [each.priority for each in found] == sorted({each.priority for each in found})
    assert [each.lane for each in found] == ["normal"] * 3 + ["high"] * 3
    assert scored(ascending[2], Scoring(high_at=0.4)).lane == "high"


@pytest.mark.parametrize(
    ("comment", "sign"),
    [
        ("This is great, thank you!", 1),
        ("great!", 1),
        ("not good at all, I hate this", -1),
        ("<HATE_1> was kind to me and I love it", 1),
        ("I would die without this", -1),
        ("I have a question about the fee", 0),
        ("Die Antwort war gut", None),
        ("c'est une bonne réponse", None),
        ("no es una buena respuesta", None),
        ("Überweisung", None),
        ("よくできました", None),
        ("", None),
    ],
)
def test_sentiment_is_that_of_english_comments(comment: str, sign: int | None) -> None:
    found = sentiment(comment)
    assert (found if found is None else (found > 0) - (found < 0)) == sign


def test_sentiment_reads_the_beginning_of_a_long_comment() -> None:
    assert sentiment("the " * MAX_CHARS + "worst") == 0.0


def test_feedback_taken_back_is_withdrawn_once_and_by_its_use_case() -> None:
    driver = Driver()
    driver(replace(samples.feedback(1), use_case="support"))
    driver(replace(samples.feedback(2), use_case="search"))
    driver(replace(samples.feedback(3), use_case="search", comment=masked(MAIL)))
    assert driver(retracted("f1")) == [types.ScoreWithdrawn("demo", "support", "device-1", "f1")]
    assert driver(retracted("f1")) == driver(retracted("unknown")) == []
    # An operator may release what was held back: that is withdrawn as well.
    assert driver(retracted("f3")) == [types.ScoreWithdrawn("demo", "search", "device-1", "f3")]


def test_feedback_that_was_taken_back_before_is_left_out() -> None:
    driver = Driver()
    assert driver(retracted("f1")) == driver(samples.feedback(1)) == []


def test_what_is_not_remembered_any_more_is_withdrawn_wherever_it_may_have_been() -> None:
    driver = Driver()
    driver(replace(samples.feedback(0), use_case="support"))
    for number in range(1, scoring.MAX_REMEMBERED + 5):
        driver(samples.feedback(number))
    withdrawn = driver(retracted("f0"))
    assert withdrawn == [types.ScoreWithdrawn("demo", use_case, "device-1", "f0") for use_case in ("support", "default")]


def test_one_id_in_two_use_cases_is_withdrawn_from_both() -> None:
    driver = Driver()
    for use_case in ("support", "search"):
        driver(replace(samples.feedback(1), use_case=use_case))
    assert [each.use_case for each in driver(retracted("f1")) if isinstance(each, types.ScoreWithdrawn)] == ["support", "search"]


def test_a_client_with_too_many_use_cases_is_held_back_and_its_state_bounded() -> None:
    driver = Driver(Scoring(embed=lambda text: [1.0, float(len(text))]))
    for number in range(1_000):
        found = driver(replace(samples.feedback(number), use_case=f"case{number}"))
        assert isinstance(found[0], FeedbackScored) == (number < scoring.MAX_USE_CASES)
    assert isinstance(found[0], types.EventQuarantined)
    assert found[0].reason == "too-many-use-cases"
    state = msgspec.msgpack.decode(driver.state, type=ClientFeedback)
    assert len(state.use_cases) == scoring.MAX_USE_CASES
    for number in range(1_000):
        driver(replace(samples.feedback(number), use_case="case0"))
    state = msgspec.msgpack.decode(driver.state, type=ClientFeedback)
    assert (len(state.remembered), len(state.sample)) == (scoring.MAX_REMEMBERED, MAX_SAMPLED)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 250), st.sampled_from(["x", "\x01", "ß", "\U0001f600"]), st.sampled_from(["context", "response", "text"]))
def test_whatever_fits_into_feedback_fits_into_what_is_made_of_it(spare: int, char: str, where: str) -> None:
    feedback = replace(BARE, context=[MaskedTurn(role="user", text=masked(f"turn {n}")) for n in range(3)])
    unit = len(msgspec.json.encode(char)) - 2

    def filled(size: int) -> FeedbackRecorded:
        parts = [masked(char * min(12_000, size - at)) for at in range(0, max(size, 1), 12_000)]
        if where == "text":
            return replace(feedback, text=parts[0], response=parts[1] if len(parts) > 1 else None)
        if where == "response":
            return replace(feedback, response=parts[0], correction=parts[1] if len(parts) > 1 else None)
        return replace(feedback, context=[*feedback.context, *(MaskedTurn(role="user", text=each) for each in parts)])

    size = MAX_EVENT_BYTES // unit if where == "context" else 24_000
    while (over := size_bytes(full := filled(size)) - MAX_EVENT_BYTES + spare) > 0:
        size -= over // unit + 1
    (found,) = Driver()(full)
    assert size_bytes(found) <= MAX_EVENT_BYTES
    if isinstance(found, FeedbackScored):
        assert found.reaction.text == full.text
        kept = found.reaction.context
        assert kept == full.context[len(full.context) - len(kept) :]
    else:
        assert isinstance(found, types.EventQuarantined)
        assert (found.reason, where) == ("too-large", "text")


def test_novelty_is_the_distance_from_the_nearest_of_the_sample() -> None:
    vectors = {"a": [1.0, 0.0], "b": [0.0, 2.0], "c": [1.0, 1.0]}
    driver = Driver(Scoring(embed=lambda text: vectors[text]))
    found = [driver(replace(samples.feedback(n), text=masked(text)))[0] for n, text in enumerate("abca")]
    novelties = [each.novelty for each in found if isinstance(each, FeedbackScored)]
    assert novelties == [1.0, 1.0, pytest.approx(1 - 0.5**0.5), pytest.approx(0.0)]


def test_a_release_from_quarantine_is_an_event_of_its_own_and_the_same_whenever_it_is_made(tmp_path: Path) -> None:
    operator, feedback = Scoring(), replace(samples.feedback(1), comment=masked(MAIL))
    record = samples.record(samples.event(feedback, 1), 1)
    with closing(open_log(str(tmp_path / "log"), create=True)) as log:
        writer = EventWriter(log, samples.key("server"))

        def made() -> list[Event]:
            (held_back,), released = operator.apply(ClientFeedback(), record, feedback), operator.released(record, feedback, 7)
            assert released is not None
            return [event_of(writer, operator, each, record, 0) for each in (held_back, released)]

        first, second = made(), made()
    assert first == second
    assert expect(first[1], FeedbackScored).recorded_ms == 7
    assert len({each.id for each in first}) == 2
