"""Curating: no example of retracted feedback counts, each counts once, no class is out of proportion, the state is bounded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, Final, Self

import msgspec
import pytest
import samples
from fedloop_events import envelope, types
from fedloop_events.envelope import MAX_EVENT_BYTES, Record
from fedloop_events.folds.training import TrainingView
from fedloop_events.ids import derived_id
from fedloop_events.masked import MaskedText, MaskedTurn
from fedloop_server.feedback import teaching
from fedloop_server.feedback.operator import Emit
from fedloop_server.feedback.operators import curating
from fedloop_server.feedback.operators.curating import Curating, Curation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

USE_CASE: Final = "support"
ANY_MACHINE: Final = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
"""How long an example takes on a machine that others use is nothing that is promised."""
Given = types.FeedbackScored | types.ScoreWithdrawn


def plain(text: str) -> MaskedText:
    return msgspec.convert({"text": text}, MaskedText)


def scored(
    number: int = 0,
    *,
    to: str | None = None,
    client: str = "c1",
    feedback: str | None = None,
    lane: Any = "high",
    priority: float = 0.5,
    text: str = "Where is my card?",
    **reaction: Any,
) -> types.FeedbackScored:
    """Feedback on the response `to`."""
    texts = {name: plain(reaction[name]) for name in ("response", "correction") if reaction.get(name) is not None}
    return types.FeedbackScored(
        samples.ORIGIN,
        USE_CASE,
        derived_id("feedback", number),
        client,
        feedback or f"f{number}",
        to or f"r{number}",
        "0001-0123456789ab",
        0,
        0,
        types.Reaction(plain(text), **(reaction | texts)),
        priority=priority,
        lane=lane,
    )


def retracted(feedback: int, client: str = "c1") -> types.ScoreWithdrawn:
    return types.ScoreWithdrawn(samples.ORIGIN, USE_CASE, client, f"f{feedback}")


def record(payload: types.Payload, at: int, ms: int) -> Record:
    return samples.record(envelope.encode(payload, id=derived_id("at", at), time_s=0), at, appended_ms=ms)


class Run:
    """One use case's curation, driven event by event. With `advancing` time is advanced before each event too; with `restoring`
    the state goes through its encoded form after each."""

    def __init__(self, operator: Curating | None = None, *, advancing: bool = False, restoring: bool = False) -> None:
        self.operator, self.state, self.view = operator or Curating(), Curation(), TrainingView()
        self.emitted: list[Emit] = []
        self._advancing, self._restoring, self._at = advancing, restoring, 0

    def feed(self, *given: Given, ms: int = 0) -> Self:
        for payload in given:
            taken = record(payload, self._at, ms)
            assert self.operator.key(taken, payload) == USE_CASE
            if self._advancing:
                self.advance(ms)
            self._keep(self.operator.apply(self.state, taken, payload), ms)
            self._at += 1
            if self._restoring:
                self.state = msgspec.msgpack.decode(msgspec.msgpack.encode(self.state), type=Curation)
        return self

    def advance(self, ms: int) -> Self:
        self._keep(self.operator.advance(USE_CASE, self.state, ms))
        return self

    def _keep(self, emitted: Iterable[Emit], ms: int | None = None) -> None:
        for each in emitted:
            assert each.of
            self.emitted.append(each._replace(time_ms=ms if each.time_ms is None else each.time_ms))
            assert self.emitted[-1].time_ms is not None
            self.view.apply(record(each.payload, 0, 0), each.payload)

    @property
    def live(self) -> list[types.ExampleCurated]:
        return list(self.view.examples.values())

    @property
    def kinds(self) -> list[str]:
        return [each.kind for each in self.live]

    @property
    def labels(self) -> list[str | None]:
        return [each.label for each in self.live]

    @property
    def reasons(self) -> list[str]:
        return [each.payload.reason for each in self.emitted if isinstance(each.payload, types.ExampleWithdrawn)]


# --- what is made of a reaction ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reaction", "made"),
    [
        ({"predicted": "a", "label": "b"}, {"label": {"label": "b"}}),
        ({"label": "b"}, {"label": {"label": "b"}}),
        ({"predicted": "a", "thumb": "up"}, {"label": {"label": "a"}}),
        ({"predicted": "a", "rating": 4}, {"label": {"label": "a"}}),
        ({"predicted": "a", "thumb": "down"}, {}),
        ({"predicted": "a", "rating": 3}, {}),
        ({"predicted": "a", "correction": "something else"}, {}),
        ({"response": "x", "correction": "y"}, {"sft": {"completion": "y"}, "dpo": {"completion": "y", "rejected": "x"}}),
        ({"response": "x", "correction": " x "}, {"sft": {"completion": " x "}}),
        ({"correction": "y"}, {"sft": {"completion": "y"}}),
        ({"response": "x", "thumb": "up"}, {"kto": {"completion": "x", "desirable": True}}),
        ({"response": "x", "rating": 2}, {"kto": {"completion": "x", "desirable": False}}),
        ({"response": "x", "rating": 3}, {}),
        ({"response": "x", "signal": "copied"}, {}),
        ({"response": "x", "preferred_over": "unknown"}, {"kto": {"completion": "x", "desirable": True}}),
        ({"thumb": "up"}, {}),
        (
            {"response": "x", "correction": "y", "thumb": "down"},
            {
                "sft": {"completion": "y"},
                "dpo": {"completion": "y", "rejected": "x"},
                "kto": {"completion": "x", "desirable": False},
            },
        ),
        ({"correction": " \u200b"}, {}),
        ({"text": " ", "label": "b"}, {}),
    ],
    ids=str,
)
def test_a_reaction_makes_the_examples_that_it_teaches(reaction: dict[str, Any], made: dict[str, Any]) -> None:
    found = {}
    for each in Run().feed(scored(**reaction)).live:
        fields = {name: getattr(each, name) for name in ("label", "completion", "rejected", "desirable")}
        taught = {name: value.text if isinstance(value, MaskedText) else value for name, value in fields.items()}
        found[each.kind] = {name: value for name, value in taught.items() if value is not None}
    assert found == made


def preference() -> Run:
    """A pair made of two pieces of feedback: 0 on the worse answer, 1 on the better."""
    run = Run(Curating(remembered=3)).feed(
        scored(0, to="worse", response="no idea", thumb="down"),
        scored(1, to="better", response="in the post", preferred_over="worse"),
    )
    assert sorted(run.kinds) == ["dpo", "kto", "kto"]
    return run


def test_a_preference_makes_a_pair_of_both_answers() -> None:
    pair = next(each for each in preference().live if each.kind == "dpo")
    assert (pair.completion, pair.rejected, pair.feedback_id) == (plain("in the post"), plain("no idea"), "f1")


def test_another_clients_response_of_the_same_name_is_not_the_other_answer() -> None:
    run = Run().feed(
        scored(0, to="worse", client="c2", response="no idea", thumb="down"),
        scored(1, to="better", response="in the post", preferred_over="worse"),
    )
    assert run.kinds == ["kto", "kto"]


def test_the_oldest_turns_of_a_pair_that_is_too_large_are_left_out() -> None:
    turns = [MaskedTurn("user", plain(letter * 9_000)) for letter in "abc"]
    found = scored(1, to="better", response="y" * 12_000, preferred_over="worse")
    better = msgspec.structs.replace(found, reaction=msgspec.structs.replace(found.reaction, context=turns))
    run = Run().feed(scored(0, to="worse", response="\u00e4" * 12_000, thumb="down"), better)
    pair = next(each for each in run.live if each.kind == "dpo")
    assert envelope.size_bytes(pair) <= MAX_EVENT_BYTES
    assert pair.context == turns[1:]
    assert next(each for each in run.live if each.kind == "kto" and each.desirable).context == turns


# --- once ----------------------------------------------------------------------------------------------------------------


def test_the_same_example_of_somebody_else_is_left_out() -> None:
    run = Run().feed(
        scored(0, label="a", text="My card  is LOST"),
        scored(1, client="c2", label="a", text="my card is lost"),
        scored(2, client="c2", label="b", text="my card is lost"),
    )
    assert run.labels == ["a", "b"]


def test_the_same_example_is_taken_again_once_the_first_was_retracted() -> None:
    assert len(Run().feed(scored(0, label="a"), retracted(0), scored(1, client="c2", label="a")).live) == 1


def test_the_same_feedback_twice_is_one() -> None:
    assert Run().feed(scored(0, label="a"), scored(1, feedback="f0", label="b")).labels == ["a"]


def test_newer_feedback_on_a_response_replaces_the_older() -> None:
    run = Run().feed(scored(0, to="r", response="x", thumb="up"), scored(1, to="r", response="x", thumb="down"))
    assert [each.desirable for each in run.live] == [False]
    assert run.reasons == [curating.REPLACED]
    assert run.feed(scored(2, to="r", response="x", rating=3)).live == []


def test_a_thumb_and_a_remark_leave_an_answer_standing() -> None:
    run = Run().feed(
        scored(0, to="r", response="x", correction="y"),
        scored(1, to="r", response="x", thumb="up"),
        scored(2, to="r", signal="copied"),
    )
    assert run.kinds == ["sft", "dpo"]
    assert not run.reasons


# --- taking back ---------------------------------------------------------------------------------------------------------


def test_what_is_curated_of_retracted_feedback_is_withdrawn() -> None:
    run = Run().feed(scored(0, response="x", correction="y"), retracted(0))
    assert run.live == []
    assert run.reasons == [curating.RETRACTED] * 2


def test_what_waits_is_dropped_with_its_feedback_and_never_emitted() -> None:
    run = Run().feed(scored(0, lane="normal", label="a"), retracted(0)).advance(10**9)
    assert run.emitted == []


def test_feedback_that_comes_after_its_retraction_makes_nothing() -> None:
    run = Run().feed(retracted(0), scored(0, label="a"))
    assert run.live == []
    assert not [each for each in run.emitted if isinstance(each.payload, types.ExampleCurated)]


def test_what_is_remembered_no_longer_is_withdrawn_all_the_same() -> None:
    run = Run(Curating(remembered=2)).feed(*(scored(number, label="a", text=f"text {number}") for number in range(5)))
    assert "f0" in [each.feedback_id for each in run.live]
    run.feed(retracted(0))
    assert "f0" not in [each.feedback_id for each in run.live]
    assert len(run.live) == 4


@pytest.mark.parametrize("either", [0, 1])
def test_a_pair_is_withdrawn_with_the_feedback_on_either_answer(either: int) -> None:
    assert "dpo" not in preference().feed(retracted(either)).kinds


@pytest.mark.parametrize("either", [0, 1])
def test_a_pair_that_is_forgotten_is_withdrawn(either: int) -> None:
    run = preference().feed(*(scored(number, label="a", text=f"text {number}") for number in range(2, 9)))
    assert "dpo" not in run.kinds
    assert run.reasons == [curating.FORGOTTEN]


def test_an_answer_whose_feedback_was_retracted_makes_no_pair() -> None:
    run = Run().feed(
        scored(0, to="worse", response="no idea", thumb="down"),
        retracted(0),
        scored(1, to="better", response="in the post", preferred_over="worse"),
    )
    assert run.kinds == ["kto"]


# --- the buffer ----------------------------------------------------------------------------------------------------------


def waiting(number: int, priority: float, label: str = "a") -> types.FeedbackScored:
    return scored(number, lane="normal", priority=priority, label=label, text=f"text {number}")


def test_the_buffer_is_emptied_by_priority_when_half_as_many_have_arrived() -> None:
    run = Run(Curating(size=8)).feed(*(waiting(number, priority) for number, priority in enumerate((0.1, 0.9, 0.5))))
    assert run.live == []
    assert [each.priority for each in run.feed(waiting(3, 0.2)).live] == [0.9, 0.5, 0.2, 0.1]


def test_the_buffer_is_emptied_at_the_end_of_an_interval() -> None:
    run = Run(Curating(wait_ms=1_000)).feed(waiting(0, 0.1), ms=5_400).advance(5_999)
    assert run.live == []
    assert [each.time_ms for each in run.advance(6_700).emitted] == [6_000]


def test_lane_high_waits_for_nobody() -> None:
    assert [each.feedback_id for each in Run().feed(waiting(0, 0.9), scored(1, label="b")).live] == ["f1"]


def test_a_full_buffer_loses_the_lowest_priority() -> None:
    run = Run(Curating(size=2, free=1, ratio=1.0)).feed(scored(0, label="a"), scored(1, label="b"), scored(2, label="a"))
    run.feed(*(waiting(number, priority) for number, priority in ((3, 0.1), (4, 0.9), (5, 0.5))))
    assert sorted(each.example.priority for each in run.state.waiting.values()) == [0.5, 0.9]
    assert Counter(run.labels) == {"a": 2, "b": 1}


# --- balance -------------------------------------------------------------------------------------------------------------


@given(st.lists(st.sampled_from("aaaaabbc"), max_size=60), st.sampled_from(["high", "normal"]))
@ANY_MACHINE
def test_no_class_is_out_of_proportion_when_one_of_it_is_curated(labels: list[str], lane: str) -> None:
    run = Run(Curating(size=8, free=2, ratio=1.5))
    for number, label in enumerate(labels):
        run.feed(scored(number, lane=lane, label=label, text=f"text {number}"))
    seen: Counter[str | None] = Counter()
    for each in run.labels:
        assert seen[each] < 2 or seen[each] <= 1.5 * seen.total() / len(seen)
        seen[each] += 1


def test_a_class_out_of_proportion_goes_on_when_the_others_have_come() -> None:
    run = Run(Curating(size=64, free=1, ratio=1.0))
    run.feed(scored(0, label="b", text="other"), *(scored(number, label="a", text=f"text {number}") for number in range(1, 5)))
    assert Counter(run.labels) == {"a": 2, "b": 1}
    run.feed(*(scored(number, label="b", text=f"text {number}") for number in range(5, 8)), ms=1).advance(10**9)
    assert Counter(run.labels) == {"a": 4, "b": 4}


# --- any events ----------------------------------------------------------------------------------------------------------


SMALL: Final[dict[str, Any]] = {"size": 4, "wait_ms": 100, "remembered": 4, "free": 2}


@st.composite
def histories(draw: st.DrawFn) -> list[tuple[int, Given]]:
    """Events and when they were appended. Each response has one answer, which names it; corrections name their feedback."""
    ms, found = 0, list[tuple[int, Given]]()
    for number in range(draw(st.integers(1, 20))):
        ms += draw(st.sampled_from([0, 0, 30, 250]))
        client, to = draw(st.sampled_from(["c1", "c2"])), draw(st.integers(0, 4))
        if number and draw(st.integers(0, 3)) == 0:
            found.append((ms, retracted(draw(st.integers(0, number)), client)))
            continue
        answer = {"response": f"answer of r{to} to {client}"}
        reaction: dict[str, Any] = draw(
            st.sampled_from(
                [
                    {"predicted": "a", "thumb": "up"},
                    {"predicted": "a", "label": "b"},
                    answer | {"thumb": "up"},
                    answer | {"rating": 1},
                    answer | {"correction": f"correction of {number}"},
                    answer | {"preferred_over": f"r{(to + 1) % 5}"},
                    answer | {"signal": "copied"},
                ]
            )
        )
        priority, lane = draw(st.sampled_from([0.1, 0.5, 0.9])), draw(st.sampled_from(["normal", "normal", "high"]))
        prompt = f"text {draw(st.integers(0, 9))}"
        new = scored(number, to=f"r{to}", client=client, lane=lane, priority=priority, text=prompt, **reaction)
        found.append((ms, new))
    return found


def ran(history: list[tuple[int, Given]], **how: bool) -> Run:
    run = Run(Curating(**SMALL), **how)
    for ms, payload in history:
        run.feed(payload, ms=ms)
    return run.advance(10**9)


@given(histories())
@ANY_MACHINE
def test_a_restart_and_the_moment_of_advancing_change_nothing(history: list[tuple[int, Given]]) -> None:
    plainly = ran(history).emitted
    assert ran(history, restoring=True).emitted == plainly
    assert ran(history, advancing=True).emitted == plainly


@given(histories())
@ANY_MACHINE
def test_nothing_of_retracted_feedback_counts(history: list[tuple[int, Given]]) -> None:
    run = Run(Curating(**SMALL))
    taken = {
        payload.client_id + payload.feedback_id: payload for _, payload in history if isinstance(payload, types.FeedbackScored)
    }
    back: set[str] = set()
    for ms, payload in history:
        run.feed(payload, ms=ms)
        if isinstance(payload, types.ScoreWithdrawn):
            back.add(payload.client_id + payload.feedback_id)
        published = Counter(
            teller.client_id + teller.response_id
            for name, teller in taken.items()
            if name not in back and teller.reaction.response is not None
        )
        for each in run.live:
            assert each.client_id + each.feedback_id not in back
            for text in (each.completion, each.rejected):
                if text is not None and text.text.startswith("answer of "):
                    response, client = text.text.removeprefix("answer of ").split(" to ")
                    assert published[client + response], "an answer counts that nobody publishes any more"


@given(histories())
@ANY_MACHINE
def test_an_example_is_curated_once_and_one_of_a_kind_of_a_piece_of_feedback(history: list[tuple[int, Given]]) -> None:
    run = ran(history)
    emitted = [each.payload for each in run.emitted if isinstance(each.payload, types.ExampleCurated)]
    assert len({each.example_id for each in emitted}) == len(emitted)
    assert len({(each.client_id, each.feedback_id, each.kind) for each in emitted}) == len(emitted)
    assert len({each.of for each in run.emitted}) == len(run.emitted)
    for each in emitted:
        assert each.example_id == teaching.example_id(each.origin, each.client_id, each.feedback_id, each.kind)


@given(histories())
@ANY_MACHINE
def test_what_is_known_is_bounded_and_consistent(history: list[tuple[int, Given]]) -> None:
    run = Run(Curating(**SMALL))
    for ms, payload in history:
        state = run.feed(payload, ms=ms).state
        marks = {mark.example_id: mark for lesson in state.lessons.values() for mark in lesson.marks}
        assert max(len(state.lessons), len(state.responses), len(state.pairs), len(state.retracted)) <= 4
        assert len(state.contents) <= 8
        assert len(state.waiting) <= 4
        assert {response: name for name, each in state.lessons.items() for response in [each.response]} == state.responses
        assert state.waiting.keys() | state.pairs.keys() <= marks.keys()
        assert state.answers_chars == sum(len(each.text.text) for each in state.answers.values())
        curated = Counter((each.kind, each.class_) for name, each in marks.items() if name not in state.waiting)
        assert curated == {(kind, name): count for kind, each in state.curated.items() for name, count in each.items()}


def test_the_state_of_the_largest_feedback_is_bounded() -> None:
    run = Run()
    for number in range(2_300):
        long = "\u4e00" * 1_500 if number > 2_000 else ""  # what was taken in before is known without its texts
        answers = {"response": f"a {number} {long}", "correction": f"b {number} {long}", "thumb": "down"}
        run.feed(scored(number, lane="normal", priority=number % 7 / 7, text=f"{number} {long}", **answers))
    for number in range(2_300):
        run.feed(retracted(number, client="c9"))
    assert len(run.state.lessons) == 2_000
    assert len(run.state.answers) <= 256
    assert len(msgspec.msgpack.encode(run.state)) <= 800_000
