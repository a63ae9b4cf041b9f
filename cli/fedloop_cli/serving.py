"""Running the server of a deployment, with the evaluator of its task."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from fedloop_events import types
from fedloop_events.envelope import Record
from fedloop_events.locations import DeploymentLocation
from fedloop_tasks.table import kind_of

from fedloop_cli.state import Followed

if TYPE_CHECKING:
    from fedloop_server.rounds.loop import Server
    from fedloop_server.telemetry.metrics import MeteredLog


def serve(
    directory: Path,
    place: DeploymentLocation,
    stop: threading.Event,
    *,
    rounds: int | None = None,
    until_idle: bool = False,
    on_event: Callable[[Record, types.Payload], None] | None = None,
    metrics: str | None = None,
) -> int:
    """Run the server until `stop` is set, `rounds` rounds have ended, or (`until_idle`) none is requested; how many ended.

    `on_event` is told of what is appended from now on. `metrics` is the address at which Prometheus finds it.
    Raises `FencedError` when another server has taken over.
    """
    from fedloop_server.deployment import open_deployment
    from fedloop_server.rounds import registry
    from fedloop_server.rounds.loop import Server
    from fedloop_server.telemetry.metrics import MeteredLog

    deployment = open_deployment(directory, place)
    task = registry.task(Followed(deployment.log).releases, types.DEFAULT_MODEL)
    model_dir = Path(deployment.config.model_dir) if deployment.config.model_dir else None
    before = deployment.log.end()

    def news(record: Record, payload: types.Payload) -> None:
        if on_event is not None and not before.covers(record.stream, record.offset):
            on_event(record, payload)

    log = MeteredLog(deployment.log)
    server = Server(
        log,
        deployment.blobs,
        deployment.writer,
        deployment.config,
        evaluate=task.evaluator(deployment.folder, model_dir),
        on_event=news,
        plan=deployment.plan_file,
        snapshots=deployment.folder,
    )
    with _exposed(server, log, metrics):
        return server.run(stop, rounds, until_idle=until_idle)


def _exposed(server: Server, log: MeteredLog, address: str | None) -> AbstractContextManager[object]:
    if address is None:
        return nullcontext()
    from fedloop_server.telemetry import exposition, metrics

    return exposition.exposed(metrics.registry(server, log), log, exposition.Address.parse(address))


def describe(payload: types.Payload) -> str:
    """One line on what happened in a round; "" for what needs none."""
    match payload:
        case types.EpochStarted():
            return f"server {payload.server_id} has begun epoch {payload.epoch}"
        case types.RoundRequested():
            return f"{payload.rounds} requested ({payload.reason})"
        case types.RoundOpened():
            return (
                f"{payload.round_id} opened: {kind_of(payload.strategy)} on {payload.base_release}, {len(payload.cohort)} clients"
            )
        case types.UpdateSubmitted(round_id=str()):
            return f"{payload.round_id} update of {payload.client_id}"
        case types.RoundDeclined(round_id=str()):
            return f"{payload.round_id} declined by {payload.client_id}: {payload.reason}"
        case types.UpdateRefused():
            return f"{payload.round_id} update of {payload.client_id} refused: {payload.reason}"
        case types.RoundClosed(round_id=str()):
            return f"{payload.round_id} closed: {len(payload.accepted)} updates count, {len(payload.excluded)} clients do not"
        case types.RoundAborted():
            return f"{payload.round_id} aborted: {payload.reason} ({payload.detail})"
        case types.ReleaseEvaluated():
            return _worth(payload)
        case types.ReleasePublished():
            return f"{payload.release} published"
        case types.ReleaseRejected():
            return f"{payload.release} rejected: {payload.reason} ({payload.detail})"
        case types.ReleaseRolledBack():
            return f"{payload.release} in force again, {payload.withdrawn} withdrawn: {payload.reason}"
        case _:
            return ""


def _worth(evaluated: types.ReleaseEvaluated) -> str:
    metrics = ", ".join(f"{name} {value:.4f}" for name, value in evaluated.metrics.items())
    return f"{evaluated.release} has {metrics} on {evaluated.examples} held-out messages"
