"""Interactions: the responses of a model, and what users did about them, in the device's store.

Feedback is on disk at once, as it was given. Its texts are masked later and kept masked, and only what is masked is published or
learned from.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Final, Literal

import msgspec
from fedloop_events.errors import UsageError
from fedloop_events.masked import MaskedText
from fedloop_tasks.task import Interaction
from fedloop_tasks.turns import Turn
from fedloop_tasks.words import find

from fedloop_clients import feedback, texts, unpublished
from fedloop_clients.feedback import ConflictingFeedbackError, FeedbackInput, Thumb, UnknownResponseError
from fedloop_clients.retracting import check_not_retracted, forget_response
from fedloop_clients.store import Store
from fedloop_clients.texts import Kind, RawText
from fedloop_clients.unpublished import Unpublished

MAX_UNJUDGED_RESPONSES: Final = 10_000
"""Responses that nobody has done anything about: the oldest give way."""
MAX_CONTEXT_CHARS: Final = 20_000
"""Of the turns before a prompt, together: about what can stand in one event. The oldest are left out."""

Named = Literal["feedback", "response"]
"""What an application can name by an id of its own."""


class Interactions:
    """The interactions in a store; `words` are the closed set of those that the model answers with now."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def respond(
        self,
        prompt: str,
        masked: MaskedText | None,
        predicted: str,
        release: str,
        words: Sequence[str],
        *,
        response: str | None = None,
        response_id: str | None = None,
        remembered: str | None = None,
    ) -> str:
        """Keep a response and give its id. `masked` is the prompt, if it is masked already; `remembered` the feedback whose label
        was the answer in place of the predicted one.

        Raises `UsageError` for a text, an answer or an id that cannot be one.
        """
        feedback.check_text("text", prompt, feedback.MAX_TEXT_CHARS)
        if response is not None:
            feedback.check_text("response", response, feedback.MAX_TEXT_CHARS)
        predicted = feedback.check_word("label", predicted, words)
        asked = [Turn("user", prompt)]
        return self._keep(asked, None if masked else prompt, masked, response, predicted, release, response_id, remembered)

    def answer(
        self,
        turns: Sequence[Turn],
        answer: str,
        release: str,
        response_id: str | None = None,
        remembered: str | None = None,
    ) -> str:
        """Keep an answer to the last of the `turns`, and give its id. It is in the model's own words, or `remembered` from this
        feedback.

        Raises `UsageError` for an id that cannot be one.
        """
        return self._keep(turns, turns[-1].content, None, answer, None, release, response_id, remembered)

    def _keep(
        self,
        turns: Sequence[Turn],
        prompt: str | None,
        masked: MaskedText | None,
        response: str | None,
        predicted: str | None,
        release: str,
        response_id: str | None,
        remembered: str | None,
    ) -> str:
        response_id = feedback.identifier("response_id", response_id)
        before = turns[:-1]
        kept = texts.newest(before, [len(turn.content) for turn in before], MAX_CONTEXT_CHARS)
        with self._store.transaction() as db:
            if db.execute("SELECT 1 FROM responses WHERE response_id = ?", (response_id,)).fetchone():
                raise UsageError("this response_id is taken", hint="every response has an id of its own")
            added = db.execute(
                "INSERT INTO responses (response_id, predicted, release, asked, turns, left_out, remembered)"
                " VALUES (?, ?, ?, ?, ?, ?, ?)",
                (response_id, predicted, release, texts.asked(turns), len(kept), len(before) - len(kept), remembered),
            )
            for number, turn in enumerate(kept):
                texts.write(db, response_id, turn.role, turn.content, number=number)
            texts.write(db, response_id, "prompt", prompt, masked)
            texts.write(db, response_id, "response", response)
            _give_way(db, added.lastrowid - MAX_UNJUDGED_RESPONSES)
        return response_id

    def record(
        self, response_id: str, given: FeedbackInput, words: Sequence[str], feedback_id: str | None = None
    ) -> tuple[str, Interaction]:
        """Record feedback; it is durable when this returns. Its id, and the interaction that it is, without texts.

        The same `feedback_id` again is the same feedback; with other content it is a `ConflictingFeedbackError`. A correction
        that is one of the words is that label; content with a remembered label names it again. Raises `UnknownResponseError`,
        `RetractedFeedbackError` for an id that was taken back, or `UsageError` if nothing is given or something of it is out of
        range.
        """
        given = feedback.check_input(given, words)
        feedback_id = feedback.identifier("feedback_id", feedback_id)
        digest = hashlib.sha256(msgspec.json.encode((response_id, given))).digest()
        with self._store.transaction() as db:
            known = db.execute("SELECT digest FROM feedback WHERE feedback_id = ?", (feedback_id,)).fetchone()
            if known is None:
                check_not_retracted(db, feedback_id)
                asked = _asked(db, response_id)
                if given.preferred_over is not None:
                    _check_worse(db, response_id, asked, given.preferred_over)
                label = given.label or find(given.correction or "", words, any_case=True) or _confirmed(db, response_id, given)
                db.execute(
                    "INSERT INTO feedback (feedback_id, response_id, digest, thumb, rating, label, preferred_over, signal, state)"
                    " VALUES (?, ?, ?, ?, ?, ?, ?, ?, 'captured')",
                    (feedback_id, response_id, digest, given.thumb, given.rating, label, given.preferred_over, given.signal),
                )
                for kind, text in feedback.remarks(given):
                    texts.write(db, feedback_id, kind, text)
            elif bytes(known[0]) != digest:
                raise ConflictingFeedbackError(
                    "this feedback_id was used before, for feedback with other content",
                    hint="make a new id for what is new; an id is for sending the same thing again",
                )
            (row,) = db.execute(
                f"SELECT response_id, release, predicted, CASE WHEN {texts.OF_MODEL} THEN thumb END,"
                f" CASE WHEN {texts.OF_MODEL} THEN rating END, label, preferred_over, signal"
                " FROM feedback JOIN responses USING (response_id) WHERE feedback_id = ?",
                (feedback_id,),
            )
        return feedback_id, _interaction(*row)

    def knows(self, kind: Named, given: str) -> bool:
        """Whether there is a response with this id, or is or was feedback with it."""
        tables = {"feedback": ("feedback", "retracted"), "response": ("responses",)}[kind]
        return any(self._store.rows(f"SELECT 1 FROM {table} WHERE {kind}_id = ?", (given,)) for table in tables)

    def derive_ids(self, derived_id: Callable[[Named, str], str]) -> None:
        """Give feedback whose id a caller chose, before such ids were derived, a derived one, unless the log has it."""
        with self._store.transaction() as db:
            for (given,) in db.execute(_GIVEN_IDS).fetchall():
                own = derived_id("feedback", given)
                db.execute("UPDATE feedback SET feedback_id = ? WHERE feedback_id = ?", (own, given))
                db.execute(f"UPDATE texts SET owner = ? WHERE owner = ? AND {texts.OF_FEEDBACK}", (own, given))
                db.execute("UPDATE responses SET remembered = ? WHERE remembered = ?", (own, given))

    def judged(self) -> Iterator[Interaction]:
        """What users did about responses whose prompt, and all before it, is masked, oldest first: each piece of feedback is one
        interaction.

        A correction that is not masked yet is a thumb down: the response was not right. A response that another
        one was preferred over, and nothing more, comes first, with nothing done about it.
        """
        for row in self._store.rows(_JUDGED):
            yield _interaction(*row)

    # --- masking and publishing ---

    def unmasked(self, limit: int) -> list[RawText]:
        """The texts that up to `limit` pieces of feedback wait for, which have not failed: the oldest feedback's first, and each
        one's as they follow in the conversation."""
        return [RawText(*row) for row in self._store.rows(texts.UNMASKED, (limit,))]

    def mask(self, owner: str, kind: Kind, masked: MaskedText, number: int = 0) -> None:
        """Keep the masked text in place of what was written."""
        with self._store.transaction() as db:
            texts.mask(db, (owner, kind, number), masked)

    def unpublished(self, limit: int) -> list[Unpublished]:
        """Up to `limit` pieces of feedback all of whose texts are masked, oldest first."""
        return [unpublished.of(*row) for row in self._store.rows(unpublished.UNPUBLISHED, (limit,))]

    def published(self, feedback_id: str) -> bool:
        """This feedback is in the log or the outbox, if it is still here. What of it is not masked yet still has to be."""
        with self._store.transaction() as db:
            found = db.execute(
                "UPDATE feedback SET logged = 1, failure = NULL,"
                f" state = CASE WHEN {texts.ANY_RAW} THEN 'captured' ELSE 'published' END WHERE feedback_id = ?",
                (feedback_id,),
            )
        return bool(found.rowcount)

    def failed(self, feedback_id: str, failure: str) -> None:
        """This feedback cannot be masked: it stays on the device. `failure` is a stable code."""
        with self._store.transaction() as db:
            db.execute("UPDATE feedback SET state = 'failed', failure = ? WHERE feedback_id = ?", (failure, feedback_id))

    def retry_failed(self) -> None:
        """Try again what could not be masked before."""
        with self._store.transaction() as db:
            db.execute("UPDATE feedback SET state = 'captured', failure = NULL WHERE state = 'failed'")

    def counts(self) -> dict[str, int]:
        """Feedback by state: "captured", "published" or "failed"."""
        return dict(self._store.rows("SELECT state, count(*) FROM feedback GROUP BY state"))

    def failures(self) -> dict[str, int]:
        """Feedback that could not be masked, by reason."""
        return dict(self._store.rows("SELECT failure, count(*) FROM feedback WHERE state = 'failed' GROUP BY failure"))


_GIVEN_IDS: Final = f"""
SELECT feedback_id FROM feedback
WHERE logged = 0 AND state <> 'published' AND feedback_id NOT GLOB '{"[0-9a-f]" * 32}'
"""
_JUDGED: Final = f"""
SELECT responses.response_id, release, predicted,
    CASE WHEN NOT {texts.OF_MODEL} THEN NULL
        WHEN correction.raw IS NOT NULL AND rating IS NULL AND label IS NULL THEN coalesce(thumb, 'down') ELSE thumb END,
    CASE WHEN {texts.OF_MODEL} THEN rating END, label, preferred_over, signal, {texts.CONTEXT},
    prompt.masked, response.masked, correction.masked
FROM responses LEFT JOIN feedback USING (response_id)
JOIN texts AS prompt ON prompt.owner = responses.response_id AND prompt.kind = 'prompt'
LEFT JOIN texts AS response ON response.owner = responses.response_id AND response.kind = 'response'
LEFT JOIN texts AS correction ON correction.owner = feedback_id AND correction.kind = 'correction'
WHERE prompt.masked IS NOT NULL AND {texts.TURNS_MASKED} AND (
    feedback_id IS NOT NULL
    OR EXISTS (SELECT 1 FROM feedback AS other WHERE other.preferred_over = responses.response_id)
)
ORDER BY feedback.number, responses.number
"""
_NO_TEXT: Final = b'{"text":""}'


def _interaction(
    response_id: str,
    release: str,
    predicted: str | None,
    thumb: Thumb | None,
    rating: int | None,
    label: str | None,
    preferred_over: str | None,
    signal: str | None,
    context: str | None = None,
    prompt: bytes = _NO_TEXT,
    response: bytes | None = None,
    edit: bytes | None = None,
) -> Interaction:
    return Interaction(
        interaction_id=response_id,
        release=release,
        context=texts.context(context),
        prompt=texts.of(prompt),
        response=texts.masked(response),
        predicted=predicted,
        thumb=thumb,
        rating=rating,
        label=label,
        edit=texts.masked(edit),
        preferred_over=preferred_over,
        signal=signal,
    )


def _give_way(db: Any, number: int) -> None:
    """Forget the response of this number, if nobody did anything about it."""
    for (response_id,) in db.execute("SELECT response_id FROM responses WHERE number = ?", (number,)).fetchall():
        forget_response(db, response_id)


def _asked(db: Any, response_id: str) -> bytes | None:
    """The digest of what a response answers; None where an earlier state kept none. Raises `UnknownResponseError`."""
    found = db.execute("SELECT asked FROM responses WHERE response_id = ?", (response_id,)).fetchone()
    if found is None:
        raise UnknownResponseError(
            "no response of this device has this response_id",
            hint=f"use the id that predict() or chat() returned; the last {MAX_UNJUDGED_RESPONSES:,} are kept",
        )
    return None if found[0] is None else bytes(found[0])


def _confirmed(db: Any, response_id: str, given: FeedbackInput) -> str | None:
    """The label that was remembered in place of the predicted one, where the user is content with it."""
    if given.thumb != "up" and (given.thumb is not None or (given.rating or 0) < 4):
        return None
    found = db.execute(
        "SELECT feedback.label FROM responses JOIN feedback ON feedback_id = remembered WHERE responses.response_id = ?",
        (response_id,),
    ).fetchone()
    return None if found is None else found[0]


def _check_worse(db: Any, response_id: str, asked: bytes | None, worse: str) -> None:
    """Raise `UsageError` unless `worse` is another response to the same."""
    if worse == response_id:
        raise UsageError("a response cannot be preferred over itself")
    other = _asked(db, worse)
    if asked is not None and other is not None and asked != other:
        raise UsageError(
            "preferred_over names a response to another prompt", hint="compare responses to the same text or the same messages"
        )
