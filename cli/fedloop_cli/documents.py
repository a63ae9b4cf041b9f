"""What commands print of what operations answer: a document for --json, lines and tables for a person."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from fedloop_cli import console

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence

    from fedloop_events import types
    from fedloop_events.folds.releases import Evaluation
    from fedloop_server.operations.registry import ReleaseSummary
    from fedloop_server.operations.rounds import RoundSummary


def seconds(ms: int | None) -> float | None:
    return None if ms is None else ms / 1000


NO_METRIC: Final = "score"
"""What stands over a column of metrics as long as nothing was evaluated."""


def metrics_document(evaluation: Evaluation | None) -> dict[str, Any]:
    """The named metrics (null: not a finite number), and which of them decides; `accuracy` where a task has a metric of that
    name, which programs have read since there was no other."""
    metrics = {} if evaluation is None else evaluation.metrics
    return {
        "accuracy": metrics.get("accuracy"),
        "metrics": metrics,
        "leading": None if evaluation is None else evaluation.leading,
    }


def metrics_shown(document: Mapping[str, Any]) -> dict[str, Any]:
    """The same document for a person: each metric by its own name, readable, in place of the three keys."""
    shown: dict[str, Any] = {}
    for name, value in document.items():
        if name == "accuracy":
            shown |= {readable(metric): number for metric, number in document["metrics"].items()} or {NO_METRIC: None}
        elif name not in {"metrics", "leading"}:
            shown[name] = value
    return shown


def readable(metric: str) -> str:
    return metric.replace("_", " ")


def leading(evaluations: Iterable[Evaluation | None]) -> str:
    """What leads, as the latest of them says; "" if there is none."""
    return next((each.leading for each in reversed(list(evaluations)) if each is not None), "")


def metric_of(evaluation: Evaluation | None, name: str) -> float | None:
    return None if evaluation is None else evaluation.metrics.get(name)


def round_document(each: RoundSummary) -> dict[str, Any]:
    return {
        "round_id": each.round_id,
        "number": each.number,
        "state": each.state,
        "kind": each.kind,
        "strategy": each.strategy,
        "base_release": each.base_release,
        "release": each.release,
        "decision": each.decision,
        **metrics_document(each.evaluation),
        "cohort": each.cohort,
        "participants": each.participants,
        "excluded": [{"client": out.client_id, "reason": out.reason, "detail": out.detail} for out in each.excluded],
        "opened": console.moment(each.opened_ms),
        "seconds": seconds(each.took_ms),
        "bytes_up": each.bytes_up,
        "bytes_down": each.bytes_down,
        "aborted": each.aborted,
        "request": each.request_id,
        "reason": each.reason,
    }


def rounds_table(rounds: Sequence[RoundSummary]) -> str:
    leads = leading(each.evaluation for each in rounds)
    metric = readable(leads) or NO_METRIC
    heads = [
        "round",
        "state",
        "kind",
        "took part",
        "excluded",
        metric,
        "release",
        "seconds",
        "bytes up",
        "bytes down",
        "why",
        "opened for",
    ]
    return console.table(
        heads,
        [
            [
                each.round_id,
                each.state,
                each.kind,
                f"{len(each.participants)} of {len(each.cohort)}",
                len(each.excluded),
                metric_of(each.evaluation, leads),
                each.release,
                seconds(each.took_ms),
                f"{each.bytes_up:,}",
                f"{each.bytes_down:,}",
                each.aborted or each.decision or "",
                each.reason,
            ]
            for each in rounds
        ],
        empty="no rounds yet",
    )


def round_line(each: RoundSummary) -> str:
    """How a round stands, on one line."""
    line = f"{each.round_id} {each.state}"
    if each.kind is not None and not each.over:
        line += f": {each.kind} on {each.base_release}, {each.replies} of {len(each.cohort)} have replied"
    if each.evaluation is not None:
        line += f", {figure(each.evaluation)}"
    if (took_s := seconds(each.took_ms)) is not None:
        line += f", {took_s:.1f} s"
    if each.reason and not each.over:
        line += f", opened for: {each.reason}"
    why = each.aborted or each.decision
    return console.printable(line + (f" ({why})" if why else ""))


def figure(evaluation: Evaluation, places: int = 4) -> str:
    """The leading metric, by its name."""
    score = evaluation.score
    return f"{readable(evaluation.leading)} {'not finite' if score is None else f'{score:.{places}f}'}"


def releases_table(releases: Sequence[ReleaseSummary]) -> str:
    leads = leading(each.evaluation for each in releases)
    heads = ["", "release", "status", readable(leads) or NO_METRIC, "round", "base", "strategy", "updates", "proposed", "why"]
    return console.table(
        heads,
        [
            [
                "*" if each.current else "",
                each.release,
                each.status,
                metric_of(each.evaluation, leads),
                each.round_id,
                each.base_release,
                each.strategy,
                each.updates,
                console.moment(each.proposed_ms),
                each.reason,
            ]
            for each in releases
        ],
        empty="no releases",
    )


def release_document(each: ReleaseSummary) -> dict[str, Any]:
    return {
        "release": each.release,
        "number": each.number,
        "status": each.status,
        "current": each.current,
        **metrics_document(each.evaluation),
        "round_id": each.round_id,
        "base_release": each.base_release,
        "strategy": each.strategy,
        "updates": each.updates,
        "sha256": each.sha256,
        "size_bytes": each.size_bytes,
        "proposed": console.moment(each.proposed_ms),
        "reason": each.reason,
    }


def event_line(payload: types.Payload) -> str:
    """What an event changed in a round or a release, on one line; "" for one that needs none."""
    from fedloop_events import types
    from fedloop_tasks.table import kind_of

    match payload:
        case types.EpochStarted():
            return f"server {payload.server_id} has begun epoch {payload.epoch}"
        case types.RoundRequested():
            return f"{payload.rounds} requested ({payload.reason})"
        case types.RoundRequestWithdrawn():
            return f"request {payload.request_id} withdrawn ({payload.reason})"
        case types.RoundAbortRequested():
            return f"{payload.round_id} to be aborted ({payload.reason})"
        case types.RoundOpened():
            kind, clients = kind_of(payload.strategy), len(payload.cohort)
            return f"{payload.round_id} opened: {kind} on {payload.base_release}, {clients} clients"
        case types.UpdateSubmitted(round_id=str()):
            return f"{payload.round_id} update of {payload.client_id}"
        case types.RoundDeclined(round_id=str()):
            return f"{payload.round_id} declined by {payload.client_id}: {payload.reason}"
        case types.UpdateRefused():
            return f"{payload.round_id} update of {payload.client_id} refused: {payload.reason}"
        case types.RoundClosed(round_id=str()):
            return f"{payload.round_id} closed: {len(payload.accepted)} updates count, {len(payload.excluded)} clients do not"
        case types.StepCollected(round_id=str()):
            return f"{payload.round_id} step {payload.step}: {len(payload.accepted)} replies count"
        case types.RoundAborted():
            return f"{payload.round_id} aborted: {payload.reason} ({payload.detail})"
        case types.ReleaseEvaluated():
            metrics = ", ".join(
                f"{readable(name)} {'not finite' if value is None else f'{value:.4f}'}" for name, value in payload.metrics.items()
            )
            return f"{payload.release} has {metrics} on {payload.examples} held-out examples"
        case types.ReleasePublished():
            return f"{payload.release} published"
        case types.ReleaseRejected():
            return f"{payload.release} rejected: {payload.reason} ({payload.detail})"
        case types.ReleaseRolledBack():
            return f"{payload.release} in force again, {payload.withdrawn} withdrawn: {payload.reason}"
        case _:
            return ""
