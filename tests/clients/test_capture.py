"""Feedback: recorded once, checked before it is kept, and what it teaches."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fedloop_clients.capture import (
    MAX_REMARK_CHARS,
    Capture,
    ConflictingFeedbackError,
    FeedbackInput,
    UnknownResponseError,
)
from fedloop_clients.store import Store
from fedloop_events.errors import UsageError
from fedloop_events.masked import MaskedText

LABELS = ["card-lost", "loan", "transfer"]
SECRET = "Wilhelmina4711"


def masked(text: str) -> MaskedText:
    return MaskedText._from_masker(text, {})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.create(tmp_path / "store.db", bytes(32))
    yield store
    store.close()


@pytest.fixture
def capture(store: Store) -> Capture:
    return Capture(store)


@pytest.fixture
def response(capture: Capture) -> str:
    return capture.respond("my card is gone", masked("my card is gone"), "card-lost", "0000-a", LABELS)


@pytest.mark.parametrize(
    ("said", "teaches"),
    [
        (FeedbackInput(thumb="up"), "card-lost"),
        (FeedbackInput(thumb="down"), None),
        (FeedbackInput(rating=5), "card-lost"),
        (FeedbackInput(rating=4), "card-lost"),
        (FeedbackInput(rating=3), None),
        (FeedbackInput(thumb="down", rating=5), None),
        (FeedbackInput(thumb="down", label="loan"), "loan"),
        (FeedbackInput(thumb="up", label="loan"), "loan"),
        (FeedbackInput(correction=" Loan\n"), "loan"),
        (FeedbackInput(correction="it was about a loan"), None),
        (FeedbackInput(thumb="down", correction="transfer", comment="no"), "transfer"),
        (FeedbackInput(comment="thanks"), None),
    ],
)
def test_what_feedback_teaches(capture: Capture, response: str, said: FeedbackInput, teaches: str | None) -> None:
    assert capture.record(response, said, LABELS).teaches == teaches
    assert capture.examples(LABELS) == ([("my card is gone", teaches)] if teaches else [])
    assert capture.count_examples() == len(capture.examples(LABELS))


def test_the_latest_verdict_on_a_response_holds_and_a_remark_changes_nothing(capture: Capture, response: str) -> None:
    capture.record(response, FeedbackInput(thumb="down"), LABELS)
    assert capture.examples(LABELS) == []
    capture.record(response, FeedbackInput(rating=5), LABELS)
    capture.record(response, FeedbackInput(comment="at last"), LABELS)
    assert [text for text, _ in capture.examples(LABELS)] == ["my card is gone"]
    capture.record(response, FeedbackInput(correction="it was about something else"), LABELS)
    assert capture.examples(LABELS) == []


def test_the_latest_label_holds_whatever_is_said_of_the_predicted_one(capture: Capture, response: str) -> None:
    capture.record(response, FeedbackInput(label="transfer"), LABELS)
    capture.record(response, FeedbackInput(label="loan"), LABELS)
    capture.record(response, FeedbackInput(thumb="down", rating=1, comment="not what I asked"), LABELS)
    assert capture.examples(LABELS) == [("my card is gone", "loan")]
    assert capture.count_examples() == 1


def test_the_same_feedback_id_is_the_same_feedback(capture: Capture, response: str) -> None:
    first = capture.record(response, FeedbackInput(thumb="up", comment=SECRET), LABELS, "mine-1")
    capture.published("mine-1")
    assert capture.record(response, FeedbackInput(thumb="up", comment=SECRET), LABELS, "mine-1") == first
    assert capture.counts() == {"published": 1}
    for other in (FeedbackInput(thumb="down", comment=SECRET), FeedbackInput(thumb="up")):
        with pytest.raises(ConflictingFeedbackError) as error:
            capture.record(response, other, LABELS, "mine-1")
        assert SECRET not in str(error.value) + error.value.hint + error.value.cause
    assert capture.counts() == {"published": 1}


def test_an_unknown_response_is_an_error_that_says_so(capture: Capture) -> None:
    with pytest.raises(UnknownResponseError, match="no response of this device has this response_id"):
        capture.record("unknown", FeedbackInput(thumb="up"), LABELS)
    assert capture.counts() == {}


def test_a_label_that_is_not_the_models_is_an_error_that_names_a_near_one(capture: Capture, response: str) -> None:
    with pytest.raises(UsageError) as error:
        capture.record(response, FeedbackInput(label=f"lone {SECRET}"[:4]), LABELS)
    assert "'loan'" in error.value.hint
    with pytest.raises(UsageError) as error:
        capture.record(response, FeedbackInput(label=SECRET), LABELS)
    assert SECRET not in str(error.value) + error.value.hint
    with pytest.raises(UsageError, match="has not seen a model"):
        capture.record(response, FeedbackInput(label="loan"), [])


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"thumb": "sideways"},
        {"rating": 0},
        {"rating": 6},
        {"rating": 4.5},
        {"rating": True},
        {"correction": "  \n"},
        {"comment": ""},
        {"comment": SECRET * MAX_REMARK_CHARS},
        {"comment": "\ud800" + SECRET},
    ],
)
def test_what_cannot_be_meant_is_refused_whole_and_not_repeated(capture: Capture, response: str, said: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as error:
        capture.record(response, FeedbackInput(**said), LABELS)
    assert SECRET not in str(error.value)
    assert capture.counts() == {}


@pytest.mark.parametrize("feedback_id", ["", "with space", "-x", "x" * 81, "a/b", "é"])
def test_an_id_that_is_no_identifier_is_refused(capture: Capture, response: str, feedback_id: str) -> None:
    with pytest.raises(UsageError, match="feedback_id"):
        capture.record(response, FeedbackInput(thumb="up"), LABELS, feedback_id)


def test_a_response_needs_a_text_a_label_and_an_id_of_its_own(capture: Capture, response: str) -> None:
    for text, label, response_id in (("", "loan", None), ("hello", SECRET, None), ("hello", "loan", response)):
        with pytest.raises(UsageError) as error:
            capture.respond(text, None, label, "0000-a", LABELS, response_id)
        assert SECRET not in str(error.value)


def test_unmasked_text_is_no_example_and_goes_once_it_is_masked(store: Store, capture: Capture) -> None:
    response = capture.respond(SECRET, None, "loan", "0000-a", LABELS)
    said = capture.record(response, FeedbackInput(thumb="up", comment=SECRET), LABELS)
    assert capture.examples(LABELS) == []
    (waiting,) = capture.unpublished(10)
    assert (waiting.text, waiting.said.comment) == (SECRET, SECRET)
    capture.mask(response, masked("<PERSON_1>"))
    capture.published(said.feedback_id)
    assert capture.examples(LABELS) == [("<PERSON_1>", "loan")]
    assert SECRET not in repr(store.rows("SELECT * FROM responses") + store.rows("SELECT * FROM feedback"))


def test_what_cannot_be_masked_is_kept_back_counted_and_tried_again(capture: Capture, response: str) -> None:
    said = capture.record(response, FeedbackInput(thumb="up"), LABELS)
    capture.failed(said.feedback_id, "the deadline passed")
    assert (capture.unpublished(10), capture.failures()) == ([], {"the deadline passed": 1})
    capture.retry_failed()
    assert [each.feedback_id for each in capture.unpublished(10)] == [said.feedback_id]
    assert capture.failures() == {}


def test_responses_nobody_judged_give_way(capture: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloop_clients.capture.MAX_UNJUDGED_RESPONSES", 3)
    judged = capture.respond("judged", None, "loan", "0000-a", LABELS)
    capture.record(judged, FeedbackInput(thumb="up"), LABELS)
    others = [capture.respond(f"other {i}", None, "loan", "0000-a", LABELS) for i in range(5)]
    capture.record(judged, FeedbackInput(thumb="down"), LABELS)
    capture.record(others[-1], FeedbackInput(thumb="up"), LABELS)
    with pytest.raises(UnknownResponseError):
        capture.record(others[0], FeedbackInput(thumb="up"), LABELS)
