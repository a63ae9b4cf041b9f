"""The versions of the device's store: step n makes version n + 1 of version n, within the caller's transaction.

A step that a release has shipped is never changed, so it uses nothing of the program that may mean something else tomorrow.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, Final

from sqlcipher3 import dbapi2

_VERSION_1: Final = """
CREATE TABLE kept (
    name TEXT PRIMARY KEY,
    value BLOB NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE responses (
    response_id TEXT PRIMARY KEY,
    text TEXT,               -- as the user wrote it, until it is masked
    masked BLOB,             -- JSON of the MaskedText
    predicted TEXT NOT NULL,
    release TEXT NOT NULL
) STRICT;
CREATE TABLE feedback (
    number INTEGER PRIMARY KEY,
    feedback_id TEXT NOT NULL UNIQUE,
    response_id TEXT NOT NULL REFERENCES responses,
    digest BLOB NOT NULL,    -- of everything the user said: the same id with another digest is refused
    said BLOB,               -- JSON, as the user wrote it, until it is published
    target TEXT,             -- the label that it teaches, if any
    standing INTEGER NOT NULL, -- 2: it names a label; 1: it judges the predicted one; 0: a remark
    state TEXT NOT NULL CHECK (state IN ('captured', 'published', 'failed')),
    failure TEXT
) STRICT;
CREATE INDEX feedback_response ON feedback (response_id, standing, number);
CREATE INDEX feedback_state ON feedback (state, number);
CREATE TABLE outbox (
    seq INTEGER PRIMARY KEY,
    event_id TEXT NOT NULL UNIQUE,
    event BLOB               -- signed, until the log has it
) STRICT;
CREATE INDEX outbox_unsent ON outbox (seq) WHERE event IS NOT NULL;
CREATE TABLE answers (
    instruction_id TEXT PRIMARY KEY,
    outcome TEXT NOT NULL
) STRICT, WITHOUT ROWID;
CREATE TABLE contexts (      -- Flower's, which may hold secrets: they never leave the device
    run_id TEXT PRIMARY KEY,
    state BLOB NOT NULL
) STRICT, WITHOUT ROWID;
"""

_VERSION_2: Final = """
CREATE TABLE texts (
    owner TEXT NOT NULL,     -- the response's id of a prompt or a response, the feedback's of a correction or a comment
    kind TEXT NOT NULL CHECK (kind IN ('prompt', 'response', 'correction', 'comment')),
    raw TEXT,                -- as it was written, until it is masked
    masked BLOB,             -- JSON of the MaskedText
    PRIMARY KEY (owner, kind),
    CHECK ((raw IS NULL) <> (masked IS NULL))
) STRICT;
CREATE TABLE new_responses (
    number INTEGER PRIMARY KEY,
    response_id TEXT NOT NULL UNIQUE,
    predicted TEXT,          -- where the model answers with one of a closed set of words
    release TEXT NOT NULL
) STRICT;
CREATE TABLE new_feedback (
    number INTEGER PRIMARY KEY,
    feedback_id TEXT NOT NULL UNIQUE,
    response_id TEXT NOT NULL REFERENCES new_responses (response_id),
    digest BLOB NOT NULL,    -- of everything that was given: the same id with another digest is refused
    thumb TEXT CHECK (thumb IN ('up', 'down')),
    rating INTEGER CHECK (rating BETWEEN 1 AND 5),
    label TEXT,              -- chosen, or written as the correction word for word
    preferred_over TEXT REFERENCES new_responses (response_id),
    state TEXT NOT NULL CHECK (state IN ('captured', 'published', 'failed')),
    failure TEXT,
    logged INTEGER NOT NULL DEFAULT 0 CHECK (logged IN (0, 1)) -- whether the log has it, whatever is still to be masked here
) STRICT;
INSERT INTO new_responses SELECT rowid, response_id, predicted, release FROM responses;
INSERT INTO texts SELECT response_id, 'prompt', text, masked FROM responses;
INSERT INTO new_feedback (number, feedback_id, response_id, digest, state, failure)
    SELECT number, feedback_id, response_id, digest, state, failure FROM feedback;
"""

_VERSION_2_TAKES_OVER: Final = """
DROP TABLE feedback;
DROP TABLE responses;
ALTER TABLE new_responses RENAME TO responses;
ALTER TABLE new_feedback RENAME TO feedback;
CREATE INDEX feedback_response ON feedback (response_id, number);
CREATE INDEX feedback_worse ON feedback (preferred_over) WHERE preferred_over IS NOT NULL;
CREATE INDEX feedback_state ON feedback (state, number);
"""

_VERSION_3: Final = """
CREATE TABLE retracted (
    feedback_id TEXT PRIMARY KEY, -- of feedback that its user took back: never recorded again
    state TEXT NOT NULL CHECK (state IN ('unpublished', 'due', 'announced')) -- due: the log has the feedback alone
) STRICT, WITHOUT ROWID;
"""

_VERSION_4: Final = """
CREATE TABLE new_texts (
    owner TEXT NOT NULL,     -- the response's id of a turn, a prompt or a response, the feedback's of a correction or a comment
    kind TEXT NOT NULL CHECK (kind IN ('system', 'user', 'assistant', 'prompt', 'response', 'correction', 'comment')),
    number INTEGER NOT NULL DEFAULT 0, -- of the turns before the prompt, which are of the first three kinds; oldest first
    raw TEXT,                -- as it was written, until it is masked
    masked BLOB,             -- JSON of the MaskedText
    PRIMARY KEY (owner, kind, number),
    CHECK ((raw IS NULL) <> (masked IS NULL))
) STRICT;
INSERT INTO new_texts SELECT owner, kind, 0, raw, masked FROM texts;
DROP TABLE texts;
ALTER TABLE new_texts RENAME TO texts;
ALTER TABLE responses ADD COLUMN asked BLOB; -- a digest of the prompt and all turns before it
ALTER TABLE responses ADD COLUMN turns INTEGER NOT NULL DEFAULT 0; -- how many of them are kept
ALTER TABLE responses ADD COLUMN left_out INTEGER NOT NULL DEFAULT 0; -- how many older ones are not
ALTER TABLE feedback ADD COLUMN signal TEXT;
"""

_COUNTED: Final = """
CREATE TABLE usage (         -- counts of an interval by the device's clock, until they are published
    from_ms INTEGER NOT NULL,
    to_ms INTEGER NOT NULL,
    use_case TEXT NOT NULL,
    release TEXT NOT NULL,
    kind TEXT NOT NULL CHECK (kind IN ('answer', 'latency', 'signal', 'masked')),
    name TEXT NOT NULL,      -- of the bin, the signal, the type of what was masked
    count INTEGER NOT NULL,
    PRIMARY KEY (from_ms, to_ms, use_case, release, kind, name)
) STRICT, WITHOUT ROWID;
"""


_REMEMBERED: Final = """
ALTER TABLE responses ADD COLUMN remembered TEXT; -- the feedback that the answer was taken from, where it is none of the model's
CREATE INDEX responses_asked ON responses (asked) WHERE asked IS NOT NULL;
CREATE INDEX responses_remembered ON responses (remembered) WHERE remembered IS NOT NULL;
CREATE INDEX feedback_label ON feedback (number) WHERE label IS NOT NULL;
"""


def _begin(db: Any) -> None:
    _execute(db, _VERSION_1)


def _keep_interactions(db: Any) -> None:
    """Version 1 forgot what was published and kept what it taught: a label is taken as chosen, a judgement as a thumb."""
    _execute(db, _VERSION_2)
    for number, feedback_id, said, target, standing in db.execute(
        "SELECT number, feedback_id, said, target, standing FROM feedback"
    ).fetchall():
        given: dict[str, Any] = json.loads(said) if said is not None else {}
        if said is None and standing == 1:
            given["thumb"] = "down" if target is None else "up"
        db.execute(
            "UPDATE new_feedback SET thumb = ?, rating = ?, label = ? WHERE number = ?",
            (given.get("thumb"), given.get("rating"), target if standing == 2 else None, number),
        )
        for kind in given.keys() & {"correction", "comment"}:
            db.execute("INSERT INTO texts VALUES (?, ?, ?, NULL)", (feedback_id, kind, given[kind]))
    _execute(db, _VERSION_2_TAKES_OVER)


def _keep_retracted(db: Any) -> None:
    _execute(db, _VERSION_3)


def _keep_conversations(db: Any) -> None:
    _execute(db, _VERSION_4)


def _count_usage(db: Any) -> None:
    _execute(db, _COUNTED)


def _remember(db: Any) -> None:
    _execute(db, _REMEMBERED)


STEPS: Final[tuple[Callable[[Any], None], ...]] = (
    _begin,
    _keep_interactions,
    _keep_retracted,
    _keep_conversations,
    _count_usage,
    _remember,
)


def _execute(db: Any, script: str) -> None:
    for statement in _statements(script):
        db.execute(statement)


def _statements(script: str) -> Iterator[str]:
    """`executescript` would commit the transaction it is in, so that a crash could leave half a step."""
    statement = ""
    for line in script.splitlines(keepends=True):
        statement += line
        if dbapi2.complete_statement(statement):
            yield statement
            statement = ""
