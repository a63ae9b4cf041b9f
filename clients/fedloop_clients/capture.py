"""What users say of a model's responses: recorded in the store at once, as they said it, and turned into training examples."""

from __future__ import annotations

import difflib
import hashlib
from collections.abc import Iterator, Sequence
from typing import Final, Literal

import msgspec
from fedloop_events import ids
from fedloop_events.errors import UsageError
from fedloop_events.masked import MaskedText
from fedloop_events.types import Identifier
from msgspec import Struct

from fedloop_clients.store import Store

MAX_TEXT_CHARS: Final = 10_000
MAX_REMARK_CHARS: Final = 2_000
"""Of a correction or a comment: with `MAX_TEXT_CHARS` of text, all of it masked fits into one event."""
MAX_UNJUDGED_RESPONSES: Final = 10_000
"""Responses that nobody has said anything about: the oldest give way."""

Thumb = Literal["up", "down"]


class UnknownResponseError(UsageError):
    """No response with this id is in the device's store."""


class ConflictingFeedbackError(UsageError):
    """The feedback id is taken by feedback that says something else."""


class Response(Struct, frozen=True):
    """One answer of the model; `response_id` is the handle for feedback. `confidence` is in [0, 1]."""

    response_id: str
    label: str
    confidence: float
    release: str

    @property
    def answer(self) -> str:
        """What was answered, whatever the task is."""
        return self.label


class FeedbackInput(Struct, frozen=True, omit_defaults=True):
    """What a user said of one response, as the user said it."""

    thumb: Thumb | None = None
    rating: int | None = None
    label: str | None = None
    correction: str | None = None
    comment: str | None = None


class Feedback(Struct, frozen=True):
    """Feedback that is on disk. `teaches` is the label that it makes a training example for, if it does."""

    feedback_id: str
    response_id: str
    teaches: str | None


class Unpublished(Struct, frozen=True):
    """Feedback that is not in the log yet, with the response it is about. `text` is None where `masked` is known."""

    feedback_id: str
    response_id: str
    text: str | None
    masked: MaskedText | None
    predicted: str
    release: str
    said: FeedbackInput


class Capture:
    """Responses and feedback in a store; `labels` are the model's."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def respond(
        self,
        text: str,
        masked: MaskedText | None,
        label: str,
        release: str,
        labels: Sequence[str],
        response_id: str | None = None,
    ) -> str:
        """Keep a response and give its id. Raises `UsageError` for a text, a label or an id that cannot be one."""
        check_text("text", text, MAX_TEXT_CHARS)
        _check_label(label, labels)
        response_id = _identifier("response_id", response_id)
        kept = (response_id, None if masked else text, msgspec.json.encode(masked) if masked else None, label, release)
        with self._store.transaction() as db:
            if db.execute("SELECT 1 FROM responses WHERE response_id = ?", (response_id,)).fetchone():
                raise UsageError("this response_id is taken", hint="every response has an id of its own")
            db.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?)", kept)
            db.execute(
                "DELETE FROM responses WHERE rowid = (SELECT max(rowid) FROM responses) - ?"
                " AND NOT EXISTS (SELECT 1 FROM feedback WHERE feedback.response_id = responses.response_id)",
                (MAX_UNJUDGED_RESPONSES,),
            )
        return response_id

    def record(self, response_id: str, said: FeedbackInput, labels: Sequence[str], feedback_id: str | None = None) -> Feedback:
        """Record feedback; it is durable when this returns.

        The same `feedback_id` again is the same feedback; with other content it is a `ConflictingFeedbackError`. Raises
        `UnknownResponseError`, or `UsageError` if nothing is said or something of it is out of range.
        """
        _check_input(said, labels)
        feedback_id = _identifier("feedback_id", feedback_id)
        digest = hashlib.sha256(msgspec.json.encode((response_id, said))).digest()
        with self._store.transaction() as db:
            known = db.execute("SELECT digest, target FROM feedback WHERE feedback_id = ?", (feedback_id,)).fetchone()
            if known is not None:
                if bytes(known[0]) != digest:
                    raise ConflictingFeedbackError(
                        "this feedback_id was used before, for feedback that says something else",
                        hint="make a new id for what is new; an id is for sending the same thing again",
                    )
                return Feedback(feedback_id, response_id, known[1])
            response = db.execute("SELECT predicted FROM responses WHERE response_id = ?", (response_id,)).fetchone()
            if response is None:
                raise UnknownResponseError(
                    "no response of this device has this response_id",
                    hint=f"use the id that predict() returned; the last {MAX_UNJUDGED_RESPONSES:,} are kept",
                )
            target, standing = _target(response[0], said, labels)
            db.execute(
                "INSERT INTO feedback (feedback_id, response_id, digest, said, target, standing, state)"
                " VALUES (?, ?, ?, ?, ?, ?, 'captured')",
                (feedback_id, response_id, digest, msgspec.json.encode(said), target, standing),
            )
        return Feedback(feedback_id, response_id, target)

    def unpublished(self, limit: int) -> list[Unpublished]:
        """Up to `limit` pieces of feedback that wait to be masked, oldest first."""
        found = self._store.rows(
            "SELECT feedback_id, response_id, text, masked, predicted, release, said"
            " FROM feedback JOIN responses USING (response_id) WHERE state = 'captured' ORDER BY number LIMIT ?",
            (limit,),
        )
        return [
            Unpublished(feedback_id, response_id, text, _masked(masked), predicted, release, _decode_input(said))
            for feedback_id, response_id, text, masked, predicted, release, said in found
        ]

    def published(self, feedback_id: str) -> None:
        """This feedback is in the log or the outbox, masked: what the user wrote is no longer needed."""
        self._settle(feedback_id, "published", None)

    def failed(self, feedback_id: str, failure: str) -> None:
        """This feedback cannot be masked: it stays on the device. `failure` is a stable code."""
        self._settle(feedback_id, "failed", failure)

    def retry_failed(self) -> None:
        """Try again what could not be masked before."""
        with self._store.transaction() as db:
            db.execute("UPDATE feedback SET state = 'captured', failure = NULL WHERE state = 'failed'")

    def mask(self, response_id: str, masked: MaskedText) -> None:
        """Keep the masked text of a response in place of what the user wrote."""
        with self._store.transaction() as db:
            db.execute(
                "UPDATE responses SET masked = ?, text = NULL WHERE response_id = ?", (msgspec.json.encode(masked), response_id)
            )

    def examples(self, labels: Sequence[str]) -> list[tuple[str, str]]:
        """(masked text, label) of every response whose feedback teaches one of `labels`, oldest first.

        Of several pieces of feedback the latest that names a label holds; where none does, the latest thumb or rating.
        """
        found = self._store.rows(_EXAMPLES.format(what="masked, target"))
        pairs = ((msgspec.json.decode(masked, type=MaskedText).text, target) for masked, target in found)
        return [(text, target) for text, target in pairs if target in labels]

    def count_examples(self) -> int:
        """How many examples there are, without reading them."""
        return int(self._store.rows(_EXAMPLES.format(what="count(*)"))[0][0])

    def counts(self) -> dict[str, int]:
        """Feedback by state."""
        return dict(self._store.rows("SELECT state, count(*) FROM feedback GROUP BY state"))

    def failures(self) -> dict[str, int]:
        """Feedback that could not be masked, by reason."""
        return dict(self._store.rows("SELECT failure, count(*) FROM feedback WHERE state = 'failed' GROUP BY failure"))

    def _settle(self, feedback_id: str, state: str, failure: str | None) -> None:
        with self._store.transaction() as db:
            db.execute(
                "UPDATE feedback SET state = :state, failure = :failure,"
                " said = CASE :state WHEN 'published' THEN NULL ELSE said END WHERE feedback_id = :feedback_id",
                {"state": state, "failure": failure, "feedback_id": feedback_id},
            )


_EXAMPLES: Final = """
SELECT {what} FROM feedback JOIN responses USING (response_id)
WHERE target IS NOT NULL AND masked IS NOT NULL AND number = (
    SELECT number FROM feedback AS each WHERE each.response_id = feedback.response_id ORDER BY standing DESC, number DESC LIMIT 1
) ORDER BY number
"""


def check_text(name: str, text: str, most_chars: int) -> None:
    """Raise `UsageError` unless `text` is Unicode with a visible character, of at most `most_chars` characters."""
    if not text.strip():
        raise UsageError(f"{name} is empty")
    if len(text) > most_chars:
        raise UsageError(f"{name} has {len(text):,} characters, more than {most_chars:,}")
    if any("\ud800" <= char <= "\udfff" for char in text):
        raise UsageError(f"{name} is not Unicode text: it holds half a surrogate pair")


def _check_input(said: FeedbackInput, labels: Sequence[str]) -> None:
    if said == FeedbackInput():
        raise UsageError("the feedback says nothing", hint="give a thumb, rating, label, correction or comment")
    if said.thumb not in (None, "up", "down"):
        raise UsageError("thumb must be 'up' or 'down'")
    if said.rating is not None and (type(said.rating) is not int or not 1 <= said.rating <= 5):
        raise UsageError("rating must be a whole number from 1 to 5")
    if said.label is not None:
        _check_label(said.label, labels)
    for name, text in _remarks(said):
        check_text(name, text, MAX_REMARK_CHARS)


def _remarks(said: FeedbackInput) -> Iterator[tuple[str, str]]:
    if said.correction is not None:
        yield "correction", said.correction
    if said.comment is not None:
        yield "comment", said.comment


def _check_label(label: str, labels: Sequence[str]) -> None:
    # Labels are published as they are: one that is not the model's could be the user's words.
    if not labels:
        raise UsageError("this device has not seen a model yet", hint="run the agent once, so that it reads the log")
    if label not in labels:
        near = difflib.get_close_matches(label[:100], labels, n=1, cutoff=0.0)
        raise UsageError(
            f"label is not one of the model's {len(labels)} labels", hint=f"did you mean {near[0]!r}?" if near else ""
        )


def _target(predicted: str, said: FeedbackInput, labels: Sequence[str]) -> tuple[str | None, int]:
    """The label that this feedback teaches (the one given, or the predicted one where the user was content with it), and how
    much it weighs beside other feedback on the response: 2 if it names a label, 1 if it judges the predicted one, else 0."""
    if said.label is not None:
        return said.label, 2
    if said.correction is not None:
        named = said.correction.strip().casefold()
        for label in labels:
            if label.casefold() == named:
                return label, 2
    content = said.thumb == "up" or (said.thumb is None and said.rating is not None and said.rating >= 4)
    remark_only = said.thumb is None and said.rating is None and said.correction is None
    return predicted if content else None, 0 if remark_only else 1


def _identifier(name: str, given: str | None) -> str:
    try:
        return ids.new_id() if given is None else msgspec.convert(given, Identifier)
    except msgspec.ValidationError:
        raise UsageError(f"{name} must be 1 to 80 letters, digits, dots, dashes or underscores") from None


def _masked(data: bytes | None) -> MaskedText | None:
    return None if data is None else msgspec.json.decode(data, type=MaskedText)


def _decode_input(data: bytes) -> FeedbackInput:
    return msgspec.json.decode(data, type=FeedbackInput)
