"""Retraction: feedback that its user takes back is deleted, and its id is kept, so that it never comes again.

Nothing is appended here. What the log has, or will have because it is in the outbox, is marked as due, and the loop appends the
`FeedbackRetracted` once it has read the log to its end: a store that was restored from a backup must not number an event before.
"""

from __future__ import annotations

from typing import Any, Final

from fedloop_events.errors import UsageError
from msgspec import Struct

from fedloop_clients import feedback
from fedloop_clients.feedback import ConflictingFeedbackError
from fedloop_clients.personal import forget_seen
from fedloop_clients.store import Store
from fedloop_clients.texts import OF_FEEDBACK

_CANNOT_BE_UNDONE: Final = "rounds that learned from it before keep that: their epsilon is spent, and their releases stay"


class UnknownFeedbackError(UsageError):
    """No feedback with this id is, or was, in the device's store."""


class RetractedFeedbackError(ConflictingFeedbackError):
    """The feedback id was retracted: nothing is recorded under it any more."""


class Retraction(Struct, frozen=True):
    """Feedback that is gone from the device."""

    feedback_id: str
    published: bool
    """Whether the log has it, or will have it from the outbox, followed by a `FeedbackRetracted`; else it has nothing of it."""

    @property
    def remains(self) -> str:
        """What a retraction does not undo, in words."""
        if not self.published:
            return _CANNOT_BE_UNDONE
        return f"its masked text stays in the log, marked as retracted; {_CANNOT_BE_UNDONE}"


class Retractions:
    """The feedback ids that were retracted on this device, in its store."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def retract(self, feedback_id: str) -> Retraction:
        """Delete feedback with its texts, and each response that no other feedback is about; durable when this returns.

        Retracted again it is as it was. Raises `UnknownFeedbackError`, or `UsageError` for a malformed id.
        """
        feedback_id = feedback.identifier("feedback_id", feedback_id)
        with self._store.transaction() as db:
            if (state := _state(db, feedback_id)) is None:
                found = db.execute("SELECT logged OR state = 'published' FROM feedback WHERE feedback_id = ?", (feedback_id,))
                row = found.fetchone()
                if row is None:
                    raise UnknownFeedbackError(
                        "no feedback of this device has this feedback_id", hint="use the id that recording it has given"
                    )
                state = "due" if row[0] else "unpublished"
                _delete(db, feedback_id)
                db.execute("INSERT INTO retracted VALUES (?, ?)", (feedback_id, state))
        return Retraction(feedback_id, state != "unpublished")

    def due(self) -> list[str]:
        """Feedback in the log or the outbox whose retraction is in neither."""
        return [feedback_id for (feedback_id,) in self._store.rows("SELECT feedback_id FROM retracted WHERE state = 'due'")]

    def announced(self, feedback_id: str) -> None:
        """The log, or the outbox, has the retraction. A store restored from a backup learns here what it is to delete again."""
        with self._store.transaction() as db:
            _delete(db, feedback_id)
            db.execute(
                "INSERT INTO retracted VALUES (?, 'announced') ON CONFLICT (feedback_id) DO UPDATE SET state = 'announced'",
                (feedback_id,),
            )

    def published(self, feedback_id: str) -> None:
        """The log has this feedback. If it was retracted as never published (by a restored store), its retraction is due."""
        with self._store.transaction() as db:
            db.execute("UPDATE retracted SET state = 'due' WHERE feedback_id = ? AND state = 'unpublished'", (feedback_id,))


def check_not_retracted(db: Any, feedback_id: str) -> None:
    """Raise `RetractedFeedbackError` if this feedback was taken back."""
    if _state(db, feedback_id) is not None:
        raise RetractedFeedbackError(
            "the feedback with this feedback_id was retracted, and is not recorded again",
            hint="make a new id if the user means it after all",
        )


def _state(db: Any, feedback_id: str) -> str | None:
    found = db.execute("SELECT state FROM retracted WHERE feedback_id = ?", (feedback_id,)).fetchone()
    return None if found is None else str(found[0])


def _delete(db: Any, feedback_id: str) -> None:
    """Delete what there is of it: the row, its texts, the responses that nothing else is about, with theirs, and the personal
    layer that has seen it."""
    row = db.execute("SELECT number, response_id, preferred_over FROM feedback WHERE feedback_id = ?", (feedback_id,)).fetchone()
    if row is None:
        return
    number, *about = row
    forget_seen(db, number)
    db.execute(f"DELETE FROM texts WHERE owner = ? AND {OF_FEEDBACK}", (feedback_id,))
    db.execute("DELETE FROM feedback WHERE feedback_id = ?", (feedback_id,))
    for response_id in filter(None, about):
        forget_response(db, response_id)


def forget_response(db: Any, response_id: str) -> None:
    """Delete a response and its texts, unless feedback is about it."""
    kept = db.execute("SELECT 1 FROM feedback WHERE response_id = ?1 OR preferred_over = ?1", (response_id,)).fetchone()
    if kept is None:
        db.execute(f"DELETE FROM texts WHERE owner = ? AND NOT {OF_FEEDBACK}", (response_id,))
        db.execute("DELETE FROM responses WHERE response_id = ?", (response_id,))
