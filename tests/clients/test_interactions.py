"""Feedback: recorded once, checked before it is kept, and what it teaches."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from fedloop_clients.feedback import MAX_COMMENT_CHARS, ConflictingFeedbackError, FeedbackInput, UnknownResponseError
from fedloop_clients.interactions import Interactions
from fedloop_clients.store import Store
from fedloop_events.errors import UsageError
from fedloop_events.masked import MaskedText
from fedloop_events.types import ClassificationSpec
from fedloop_tasks.classification.task import Classification

LABELS = ["card-lost", "loan", "transfer"]
SECRET = "Wilhelmina4711"


def task(labels: Sequence[str] = LABELS) -> Classification:
    return Classification(ClassificationSpec("none", "0" * 64, [*labels], 1, 1.0, ["query"], 1))


def masked(text: str) -> MaskedText:
    return MaskedText._from_masker(text, {})


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    store = Store.create(tmp_path / "store.db", bytes(32))
    yield store
    store.close()


class Device:
    """A store with a masker that finds nothing."""

    def __init__(self, store: Store) -> None:
        self.interactions = Interactions(store)

    def examples(self, labels: Sequence[str] = LABELS) -> list[tuple[str, str]]:
        return [(each.text, each.label) for each in task(labels).examples(self.interactions.judged())]

    def respond(self, prompt: str, predicted: str = "card-lost", *, is_masked: bool = True, **more: Any) -> str:
        return self.interactions.respond(prompt, masked(prompt) if is_masked else None, predicted, "0000-a", LABELS, **more)

    def record(self, response_id: str, given: FeedbackInput, feedback_id: str | None = None) -> tuple[str, str | None]:
        """The feedback's id, and the label that it teaches."""
        feedback_id, recorded = self.interactions.record(response_id, given, LABELS, feedback_id)
        return feedback_id, task().taught(recorded)

    def mask(self) -> None:
        for each in self.interactions.unmasked(1000):
            self.interactions.mask(each.owner, each.kind, masked(each.raw))

    def publish(self) -> None:
        self.mask()
        for each in self.interactions.unpublished(1000):
            self.interactions.published(each.feedback_id)


@pytest.fixture
def device(store: Store) -> Device:
    return Device(store)


@pytest.fixture
def response(device: Device) -> str:
    return device.respond("my card is gone")


@pytest.mark.parametrize(
    ("given", "label"),
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
def test_what_feedback_teaches(device: Device, response: str, given: FeedbackInput, label: str | None) -> None:
    assert device.record(response, given)[1] == label
    for publish in (False, True):
        if publish:
            device.publish()
        assert device.examples() == ([("my card is gone", label)] if label else [])


def test_the_latest_judgement_of_a_response_holds_and_a_comment_changes_nothing(device: Device, response: str) -> None:
    device.record(response, FeedbackInput(thumb="down"))
    assert device.examples() == []
    device.record(response, FeedbackInput(rating=5))
    device.record(response, FeedbackInput(comment="at last"))
    assert [text for text, _ in device.examples()] == ["my card is gone"]
    device.record(response, FeedbackInput(correction="it was about something else"))
    assert device.examples() == []
    device.publish()
    assert device.examples() == []


def test_the_latest_label_holds_whatever_is_given_about_the_predicted_one(device: Device, response: str) -> None:
    device.record(response, FeedbackInput(label="transfer"))
    device.record(response, FeedbackInput(correction="LOAN"))
    device.record(response, FeedbackInput(thumb="down", rating=1, comment="not what I asked"))
    assert device.examples() == [("my card is gone", "loan")]
    device.record(response, FeedbackInput(label="transfer"))
    assert device.examples() == [("my card is gone", "transfer")]


def test_what_is_taught_follows_from_the_labels_of_the_model_that_learns(device: Device, response: str) -> None:
    device.record(response, FeedbackInput(correction="Mortgage"))
    device.record(device.respond("what does it cost"), FeedbackInput(label="loan"))
    device.publish()
    for labels, examples in (
        (LABELS, [("what does it cost", "loan")]),
        (["mortgage", "transfer"], [("my card is gone", "mortgage")]),
        (["transfer"], []),
    ):
        assert device.examples(labels) == examples


def test_an_interaction_keeps_what_was_written_masked(device: Device, store: Store) -> None:
    worse = device.respond("my card is gone", is_masked=False, response=f"bad {SECRET}")
    better = device.respond("my card is gone", is_masked=False, response=f"good {SECRET}", predicted="loan")
    device.record(better, FeedbackInput(preferred_over=worse, rating=4))
    device.record(better, FeedbackInput(correction=f"better {SECRET}", comment=f"I am {SECRET}"))
    assert list(device.interactions.judged()) == []
    for each in device.interactions.unmasked(1000):
        device.interactions.mask(each.owner, each.kind, masked(each.raw.replace(SECRET, "<PERSON_1>")))
    device.publish()
    compared, rated, edited = device.interactions.judged()
    assert (compared.interaction_id, compared.response) == (worse, masked("bad <PERSON_1>"))
    assert (compared.thumb, compared.rating, compared.label, compared.edit, compared.preferred_over) == (None,) * 5
    assert rated.interaction_id == edited.interaction_id == better
    assert rated.response == edited.response == masked("good <PERSON_1>")
    assert (rated.rating, rated.preferred_over, rated.edit) == (4, worse, None)
    assert (edited.prompt, edited.edit, edited.predicted) == (masked("my card is gone"), masked("better <PERSON_1>"), "loan")
    texts = store.rows("SELECT kind, raw, masked FROM texts")
    assert "I am <PERSON_1>" in repr(texts)
    assert SECRET not in repr(texts)


def test_the_same_feedback_id_is_the_same_feedback(device: Device, response: str) -> None:
    first = device.record(response, FeedbackInput(thumb="up", comment=SECRET), "mine-1")
    device.publish()
    assert device.record(response, FeedbackInput(thumb="up", comment=SECRET), "mine-1") == first
    assert device.interactions.counts() == {"published": 1}
    for other in (FeedbackInput(thumb="down", comment=SECRET), FeedbackInput(thumb="up")):
        with pytest.raises(ConflictingFeedbackError) as error:
            device.interactions.record(response, other, LABELS, "mine-1")
        assert SECRET not in str(error.value) + error.value.hint + error.value.cause
    assert device.interactions.counts() == {"published": 1}


@pytest.mark.parametrize("words", [["caf\u00e9", "loan"], ["cafe\u0301", "loan"]])
def test_a_label_is_the_models_own_however_it_is_written(device: Device, words: list[str]) -> None:
    for number, written in enumerate(("caf\u00e9", "cafe\u0301", " caf\u00e9\u200b")):
        response = device.interactions.respond("hello", masked("hello"), written, "0000-a", words)
        for given in (FeedbackInput(label=written), FeedbackInput(correction=written.upper()), FeedbackInput(thumb="up")):
            assert task(words).taught(device.interactions.record(response, given, words)[1]) == words[0]
        same = device.interactions.record(response, FeedbackInput(label=written), words, f"id-{number}")
        assert device.interactions.record(response, FeedbackInput(label=words[0]), words, f"id-{number}") == same
    device.publish()
    assert {each.label for each in task(words).examples(device.interactions.judged())} == {words[0]}


def test_an_unknown_response_is_an_error_that_names_the_cause(device: Device) -> None:
    with pytest.raises(UnknownResponseError, match="no response of this device has this response_id"):
        device.interactions.record("unknown", FeedbackInput(thumb="up"), LABELS)
    assert device.interactions.counts() == {}


def test_a_label_that_is_not_the_models_is_an_error_that_names_a_near_one(device: Device, response: str) -> None:
    with pytest.raises(UsageError) as error:
        device.record(response, FeedbackInput(label=f"lone {SECRET}"[:4]))
    assert "'loan'" in error.value.hint
    with pytest.raises(UsageError) as error:
        device.record(response, FeedbackInput(label=SECRET))
    assert SECRET not in str(error.value) + error.value.hint
    with pytest.raises(UsageError, match="has not seen a model"):
        device.interactions.record(response, FeedbackInput(label="loan"), [])


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"thumb": "sideways"},
        {"rating": 0},
        {"rating": 6},
        {"rating": 4.5},
        {"rating": True},
        {"correction": "  \n"},
        {"comment": ""},
        {"comment": SECRET * MAX_COMMENT_CHARS},
        {"comment": "\ud800" + SECRET},
    ],
)
def test_what_cannot_be_meant_is_refused_whole_and_not_repeated(device: Device, response: str, given: dict[str, Any]) -> None:
    with pytest.raises(UsageError) as error:
        device.record(response, FeedbackInput(**given))
    assert SECRET not in str(error.value)
    assert device.interactions.counts() == {}


@pytest.mark.parametrize("feedback_id", ["", "with space", "-x", "x" * 81, "a/b", "é"])
def test_an_id_that_is_no_identifier_is_refused(device: Device, response: str, feedback_id: str) -> None:
    with pytest.raises(UsageError, match="feedback_id"):
        device.record(response, FeedbackInput(thumb="up"), feedback_id)


def test_a_response_needs_a_text_a_label_and_an_id_of_its_own(device: Device, response: str) -> None:
    for text, label, response_id in (("", "loan", None), ("hello", SECRET, None), ("hello", "loan", response)):
        with pytest.raises(UsageError) as error:
            device.interactions.respond(text, None, label, "0000-a", LABELS, response_id=response_id)
        assert SECRET not in str(error.value)


def test_unmasked_text_is_no_example_and_goes_once_it_is_masked(store: Store, device: Device) -> None:
    response = device.respond(SECRET, "loan", is_masked=False)
    feedback_id, _ = device.record(response, FeedbackInput(thumb="up", comment=SECRET))
    assert device.examples() == []
    waiting = device.interactions.unmasked(10)
    assert {(each.feedback_id, each.kind, each.raw) for each in waiting} == {
        (feedback_id, "prompt", SECRET),
        (feedback_id, "comment", SECRET),
    }
    assert device.interactions.unpublished(10) == []
    device.interactions.mask(response, "prompt", masked("<PERSON_1>"))
    assert device.interactions.unpublished(10) == []
    device.interactions.mask(feedback_id, "comment", masked("<PERSON_1>"))
    (due,) = device.interactions.unpublished(10)
    assert (due.prompt, due.comment, due.thumb, due.logged) == (masked("<PERSON_1>"), masked("<PERSON_1>"), "up", False)
    device.interactions.published(feedback_id)
    assert device.examples() == [("<PERSON_1>", "loan")]
    assert SECRET not in repr([store.rows(f"SELECT * FROM {table}") for table in ("responses", "feedback", "texts")])


def test_a_label_in_the_users_own_words_is_a_label(device: Device, response: str) -> None:
    device.record(response, FeedbackInput(correction=" Loan\n"))
    device.mask()
    (due,) = device.interactions.unpublished(10)
    assert (due.label, due.correction) == ("loan", masked(" Loan\n"))


def test_feedback_that_the_log_has_already_is_masked_all_the_same(device: Device) -> None:
    feedback_id, _ = device.record(device.respond(SECRET, "loan", is_masked=False), FeedbackInput(thumb="up"))
    device.interactions.published(feedback_id)
    assert device.interactions.counts() == {"captured": 1}
    device.mask()
    (due,) = device.interactions.unpublished(10)
    assert due.logged
    device.publish()
    assert (device.interactions.counts(), len(device.examples())) == ({"published": 1}, 1)


def test_what_cannot_be_masked_is_kept_back_counted_and_tried_again(device: Device, response: str) -> None:
    feedback_id, _ = device.record(response, FeedbackInput(thumb="up"))
    device.interactions.failed(feedback_id, "the deadline passed")
    assert (device.interactions.unpublished(10), device.interactions.failures()) == ([], {"the deadline passed": 1})
    device.interactions.retry_failed()
    assert [each.feedback_id for each in device.interactions.unpublished(10)] == [feedback_id]
    assert device.interactions.failures() == {}


def test_the_worse_of_two_responses_is_another_one_that_is_known(device: Device, response: str) -> None:
    with pytest.raises(UnknownResponseError):
        device.record(response, FeedbackInput(preferred_over="unknown"))
    with pytest.raises(UsageError, match="over itself"):
        device.record(response, FeedbackInput(preferred_over=response))
    assert device.interactions.counts() == {}


def test_responses_nobody_judged_give_way(device: Device, store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fedloop_clients.interactions.MAX_UNJUDGED_RESPONSES", 3)
    judged, worse = device.respond("judged"), device.respond("judged")
    device.record(judged, FeedbackInput(preferred_over=worse))
    others = [device.respond(f"other {i}", response="shown") for i in range(5)]
    device.record(judged, FeedbackInput(thumb="down"))
    device.record(worse, FeedbackInput(thumb="down"))
    device.record(others[-1], FeedbackInput(thumb="up"))
    with pytest.raises(UnknownResponseError):
        device.record(others[0], FeedbackInput(thumb="up"))
    assert store.rows("SELECT count(*) FROM texts") == [(2 + 3 * 2,)]
