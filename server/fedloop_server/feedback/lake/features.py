"""The feature table: what was known of a client in a use case, and from when to when that was all that was known.

It is a function of the table `feedback`, made anew when that has changed, so that what is withdrawn there is out of it too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Final

from fedloop_server.feedback.lake import reading
from fedloop_server.feedback.lake.tables import FEEDBACK, Table

if TYPE_CHECKING:
    import duckdb

    from fedloop_server.feedback.lake.delta import LakeTable

FEATURES: Final = Table(
    "features",
    (),
    {
        "use_case": "id",
        "client_id": "id",
        "valid_from": "time",
        "valid_to": "time",
        "feedback": "int",
        "satisfied": "float",
        "satisfied_of": "int",
        "satisfaction": "float",
        "correct": "int",
        "correct_of": "int",
        "corrections": "int",
        "sentiment": "float",
        "masked": "int",
        "hours_active": "int",
        "first_seen": "time",
        "last_seen": "time",
    },
    {},
    divided_by=("use_case",),
)

_SQL: Final = """
WITH hours AS (
    SELECT use_case, client_id,
        time_bucket(INTERVAL 1 HOUR, recorded_at) + INTERVAL 1 HOUR AS valid_from,
        count(*) AS feedback,
        sum(satisfaction::DECIMAL(9, 6)) AS satisfied, count(satisfaction) AS satisfied_of,
        count(*) FILTER (correct) AS correct, count(correct) AS correct_of,
        count(correction) AS corrections,
        sum(sentiment::DECIMAL(9, 6)) AS sentiment, count(sentiment) AS sentiment_of,
        sum(masked) AS masked,
        min(recorded_at) AS first_seen, max(recorded_at) AS last_seen
    FROM {feedback} GROUP BY ALL
)
SELECT use_case, client_id, valid_from,
    lead(valid_from) OVER of_client AS valid_to,
    (sum(feedback) OVER so_far)::BIGINT AS feedback,
    coalesce(sum(satisfied) OVER so_far, 0)::DOUBLE AS satisfied,
    (sum(satisfied_of) OVER so_far)::BIGINT AS satisfied_of,
    (sum(satisfied) OVER so_far)::DOUBLE / nullif(sum(satisfied_of) OVER so_far, 0) AS satisfaction,
    (sum(correct) OVER so_far)::BIGINT AS correct,
    (sum(correct_of) OVER so_far)::BIGINT AS correct_of,
    (sum(corrections) OVER so_far)::BIGINT AS corrections,
    (sum(sentiment) OVER so_far)::DOUBLE / nullif(sum(sentiment_of) OVER so_far, 0) AS sentiment,
    (sum(masked) OVER so_far)::BIGINT AS masked,
    (count(*) OVER so_far)::BIGINT AS hours_active,
    min(first_seen) OVER so_far AS first_seen,
    last_seen
FROM hours
WINDOW of_client AS (PARTITION BY use_case, client_id ORDER BY valid_from),
    so_far AS (PARTITION BY use_case, client_id ORDER BY valid_from ROWS UNBOUNDED PRECEDING)
ORDER BY use_case, client_id, valid_from
"""
"""By whole hours of the log's clock. What is summed is decimal, so that the order of rows in the files does not matter."""


def refresh(connection: duckdb.DuckDBPyConnection, feedback: LakeTable, features: LakeTable) -> bool:
    """Make the table anew, unless it is that of the feedback as it is; whether it was made."""
    version = feedback.version
    if features.last(FEEDBACK.name) == version:
        return False
    query = _SQL.format(feedback=reading.source(FEEDBACK, feedback.files()))
    with reading.translated():
        features.replace(connection.sql(query), FEEDBACK.name, version)
    features.vacuum()
    return True
