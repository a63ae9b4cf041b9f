"""What tables the lake has, which columns they have, and the row that an event makes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final, Literal

import msgspec
from fedloop_events import topics, types
from fedloop_events.envelope import Record
from fedloop_events.masked import MaskedText
from fedloop_events.types import Payload
from msgspec import Struct

Kind = Literal["id", "text", "int", "float", "bool", "time", "day"]
"""What a column holds. A "time" is given in milliseconds since 1970, a "day" in days; an "id" is short, and nobody's own words.
Delta's log keeps the least and the greatest value of a column, also of rows that are gone: of a "text" it keeps none."""
Row = tuple[Any, ...]
"""Values in the order of a table's columns."""

DAY_MS: Final = 24 * 3600 * 1000
BY_USE_CASE: Final = ("use_case", "day")
"""How a table is divided that queries narrow down to a use case and some days."""


class Table(Struct, frozen=True):
    """One table. A row is one event's, and is in it once: `key` names it, and is a function of what the author signed, as is the
    part that it stands in. `fenced`: whether an event of its topics counts depends on those before it."""

    name: str
    topics: tuple[str, ...]
    columns: Mapping[str, Kind]
    rows: Mapping[type[Payload], Callable[[Record, Any], Row]]
    key: str = "event_id"
    divided_by: tuple[str, ...] = ()
    fenced: bool = False


def day_of(ms: int) -> int:
    return ms // DAY_MS


def _text(masked: MaskedText | None) -> str | None:
    return None if masked is None else masked.text


def as_json(value: object) -> str:
    """The text of a column that holds a list or an object."""
    return msgspec.json.encode(value).decode()


def _scored(record: Record, scored: types.FeedbackScored) -> Row:
    said = scored.reaction
    return (
        scored.event_id,
        scored.use_case,
        day_of(scored.recorded_ms),
        scored.client_id,
        scored.feedback_id,
        scored.response_id,
        scored.release,
        scored.given_ms,
        scored.recorded_ms,
        said.text.text,
        as_json([{"role": turn.role, "text": turn.text.text} for turn in said.context]) if said.context else "[]",
        said.predicted,
        _text(said.response),
        said.thumb,
        said.rating,
        said.label,
        _text(said.correction),
        said.preferred_over,
        said.signal,
        scored.satisfaction,
        scored.correct,
        scored.sentiment,
        scored.priority,
        scored.lane,
        scored.novelty,
        scored.language,
        scored.masked,
    )


FEEDBACK: Final = Table(
    "feedback",
    (topics.SCORED,),
    {
        "event_id": "id",
        "use_case": "id",
        "day": "day",
        "client_id": "id",
        "feedback_id": "id",
        "response_id": "id",
        "release": "id",
        "given_at": "time",
        "recorded_at": "time",
        "text": "text",
        "context": "text",
        "predicted": "text",
        "response": "text",
        "thumb": "id",
        "rating": "int",
        "label": "text",
        "correction": "text",
        "preferred_over": "id",
        "signal": "id",
        "satisfaction": "float",
        "correct": "bool",
        "sentiment": "float",
        "priority": "float",
        "lane": "id",
        "novelty": "float",
        "language": "id",
        "masked": "int",
    },
    {types.FeedbackScored: _scored},
    divided_by=BY_USE_CASE,
)


def _curated(record: Record, example: types.ExampleCurated) -> Row:
    return (
        example.example_id,
        example.use_case,
        day_of(record.time_s * 1000),
        record.time_s * 1000,
        example.kind,
        example.client_id,
        example.feedback_id,
        example.event_id,
        example.release,
        example.text.text,
        as_json([{"role": turn.role, "text": turn.text.text} for turn in example.context]) if example.context else "[]",
        example.label,
        _text(example.completion),
        _text(example.rejected),
        example.desirable,
        example.priority,
        example.language,
    )


TRAINING: Final = Table(
    "training",
    (topics.TRAINING,),
    {
        "example_id": "id",
        "use_case": "id",
        "day": "day",
        "valid_from": "time",
        "kind": "id",
        "client_id": "id",
        "feedback_id": "id",
        "event_id": "id",
        "release": "id",
        "text": "text",
        "context": "text",
        "label": "text",
        "completion": "text",
        "rejected": "text",
        "desirable": "bool",
        "priority": "float",
        "language": "id",
    },
    {types.ExampleCurated: _curated},
    key="example_id",
    divided_by=BY_USE_CASE,
)


def _retracted(record: Record, gone: types.FeedbackRetracted) -> Row:
    return (record.id, record.appended_ms, "feedback", None, gone.client_id, gone.feedback_id, None)


def _score_withdrawn(record: Record, gone: types.ScoreWithdrawn) -> Row:
    return (record.id, record.appended_ms, "feedback", gone.use_case, gone.client_id, gone.feedback_id, None)


def _example_withdrawn(record: Record, gone: types.ExampleWithdrawn) -> Row:
    return (record.id, record.appended_ms, "example", gone.use_case, None, None, gone.example_id)


WITHDRAWN: Final = Table(
    "withdrawn",
    (topics.FEEDBACK, topics.SCORED, topics.TRAINING),
    {
        "event_id": "id",
        "withdrawn_at": "time",
        "kind": "id",
        "use_case": "id",
        "client_id": "id",
        "feedback_id": "id",
        "example_id": "id",
    },
    {
        types.FeedbackRetracted: _retracted,
        types.ScoreWithdrawn: _score_withdrawn,
        types.ExampleWithdrawn: _example_withdrawn,
    },
)
