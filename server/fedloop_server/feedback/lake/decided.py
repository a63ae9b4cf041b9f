"""The tables of what was decided: rounds, releases, spends, and what was held back. A row is one event; `kind` says which."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from fedloop_events import topics, types
from fedloop_events.envelope import Record
from fedloop_events.types import Mechanism, Payload

from fedloop_server.feedback.lake import tables
from fedloop_server.feedback.lake.tables import Kind, Row, Table

Values = dict[str, Any]
_AT: Final[dict[str, Kind]] = {"event_id": "id", "at": "time", "kind": "id"}
_MECHANISM: Final[dict[str, Kind]] = {
    "noise_multiplier": "float",
    "clip_norm": "float",
    "sampling_rate": "float",
    "steps": "int",
}


def _table(
    name: str,
    topic: str,
    columns: dict[str, Kind],
    kinds: dict[type[Payload], tuple[str, Callable[[Any], Values]]],
    *,
    fenced: bool = False,
) -> Table:
    """A table whose rows are sparse: an event has a value for some of its columns, and nothing in the others."""
    columns = _AT | columns

    def row_of(kind: str, values_of: Callable[[Any], Values]) -> Callable[[Record, Any], Row]:
        def row(record: Record, payload: Payload) -> Row:
            values = {"event_id": record.id, "at": record.appended_ms, "kind": kind} | values_of(payload)
            assert values.keys() <= columns.keys(), f"{name} has no column {values.keys() - columns.keys()}"
            return tuple(values.get(column) for column in columns)

        return row

    return Table(name, (topic,), columns, {each: row_of(*kind) for each, kind in kinds.items()}, fenced=fenced)


def _terms(mechanism: Mechanism | None) -> Values:
    return {} if mechanism is None else {name: getattr(mechanism, name) for name in _MECHANISM}


def _named(*names: str) -> Callable[[Any], Values]:
    """The payload's fields of these names."""
    return lambda payload: {name: getattr(payload, name) for name in names}


def _opened(opened: types.RoundOpened) -> Values:
    names = ("run_id", "round_id", "request_id", "number", "model", "base_release", "strategy", "quorum", "deadline_s")
    return _named(*names)(opened) | {"cohort": len(opened.cohort), "excluded": len(opened.excluded)} | _terms(opened.mechanism)


def _closed(closed: types.RoundClosed) -> Values:
    return _named("run_id", "round_id")(closed) | {"accepted": len(closed.accepted), "excluded": len(closed.excluded)}


def _aborted(aborted: types.RoundAborted) -> Values:
    return _named("run_id", "round_id", "reason", "detail")(aborted) | {"excluded": len(aborted.excluded)}


ROUNDS: Final = _table(
    "rounds",
    topics.ROUNDS,
    {
        "run_id": "id",
        "round_id": "id",
        "request_id": "id",
        "rounds": "int",
        "reason": "text",
        "detail": "text",
        "number": "int",
        "model": "id",
        "base_release": "id",
        "strategy": "id",
        "cohort": "int",
        "quorum": "int",
        "deadline_s": "float",
        "accepted": "int",
        "excluded": "int",
        **_MECHANISM,
    },
    {
        types.RoundRequested: ("requested", _named("run_id", "request_id", "rounds", "reason")),
        types.RoundRequestWithdrawn: ("request withdrawn", _named("run_id", "request_id", "reason")),
        types.RoundOpened: ("opened", _opened),
        types.RoundClosed: ("closed", _closed),
        types.RoundAbortRequested: ("abort requested", _named("run_id", "round_id", "reason")),
        types.RoundAborted: ("aborted", _aborted),
    },
    fenced=True,
)


def _proposed(proposed: types.ReleaseProposed) -> Values:
    blob = {"sha256": proposed.blob.sha256, "size_bytes": proposed.blob.size_bytes, "updates": len(proposed.updates)}
    return _named("model", "release", "number", "round_id", "base_release", "strategy")(proposed) | blob


def _evaluated(evaluated: types.ReleaseEvaluated) -> Values:
    return _named("model", "release", "leading", "examples")(evaluated) | {
        "value": evaluated.metrics.get(evaluated.leading),
        "metrics": tables.as_json(evaluated.metrics),
    }


RELEASES: Final = _table(
    "releases",
    topics.RELEASES,
    {
        "model": "id",
        "release": "id",
        "number": "int",
        "round_id": "id",
        "base_release": "id",
        "strategy": "id",
        "updates": "int",
        "sha256": "id",
        "size_bytes": "int",
        "leading": "id",
        "value": "float",
        "examples": "int",
        "metrics": "text",
        "reason": "text",
        "detail": "text",
        "withdrawn": "id",
    },
    {
        types.ReleaseProposed: ("proposed", _proposed),
        types.ReleaseEvaluated: ("evaluated", _evaluated),
        types.ReleasePublished: ("published", _named("model", "release", "number")),
        types.ReleaseRejected: ("rejected", _named("model", "release", "reason", "detail")),
        types.ReleaseRolledBack: ("rolled back", _named("model", "release", "withdrawn", "reason")),
    },
    fenced=True,
)

AUDIT: Final = _table(
    "audit",
    topics.AUDIT,
    {
        "client_id": "id",
        "run_id": "id",
        "round_id": "id",
        "instruction_id": "id",
        "spend_seq": "int",
        **_MECHANISM,
        "reason": "text",
        "budget_epsilon": "float",
        "would_be_epsilon": "float",
    },
    {
        types.BudgetSpent: (
            "spent",
            lambda spent: (
                _named("client_id", "run_id", "round_id", "instruction_id", "spend_seq")(spent) | _terms(spent.mechanism)
            ),
        ),
        types.BudgetRefused: (
            "refused",
            _named("client_id", "run_id", "round_id", "instruction_id", "reason", "budget_epsilon", "would_be_epsilon"),
        ),
    },
)


def _held_back(held: types.EventQuarantined) -> Values:
    return _named("source_topic", "reason", "detail", "client_id", "use_case", "release")(held) | {
        "quarantined_id": held.event_id,
        "given_at": held.given_ms,
        "recorded_at": held.recorded_ms,
        "found": tables.as_json(held.found),
    }


QUARANTINE: Final = _table(
    "quarantine",
    topics.QUARANTINE,
    {
        "source_topic": "id",
        "quarantined_id": "id",
        "decision": "id",
        "reason": "text",
        "detail": "text",
        "client_id": "id",
        "use_case": "id",
        "release": "id",
        "given_at": "time",
        "recorded_at": "time",
        "found": "text",
    },
    {
        types.EventQuarantined: ("quarantined", _held_back),
        types.QuarantineDecided: (
            "decided",
            lambda made: _named("source_topic", "decision", "reason")(made) | {"quarantined_id": made.event_id},
        ),
    },
)
