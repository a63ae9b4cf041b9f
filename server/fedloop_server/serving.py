"""Running the server of a deployment, with its metrics."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from fedloop_events import types
from fedloop_events.envelope import Record
from fedloop_events.locations import DeploymentLocation
from fedloop_tasks.task import Evaluate, Task

from fedloop_server.deployment import Deployment, open_deployment
from fedloop_server.operations.followed import Followed
from fedloop_server.operations.registry import task_of_model
from fedloop_server.operations.rounds import OnWait
from fedloop_server.rounds.loop import Server
from fedloop_server.state import OnEvent
from fedloop_server.telemetry import exposition
from fedloop_server.telemetry.metrics import MeteredLog, registry

MakeEvaluate = Callable[[Deployment, Task], Evaluate]
"""How releases of a deployment's model are evaluated."""


def evaluator_of(deployment: Deployment, task: Task) -> Evaluate:
    """On the held-out set in the server's folder. Raises `UsageError` if there is none."""
    return task.evaluator(deployment.folder, Path(deployment.config.model_dir) if deployment.config.model_dir else None)


def serve(
    directory: Path,
    place: DeploymentLocation,
    stop: threading.Event,
    make_evaluate: MakeEvaluate = evaluator_of,
    *,
    rounds: int | None = None,
    until_idle: bool = False,
    on_event: OnEvent | None = None,
    on_wait: OnWait | None = None,
    metrics: str | None = None,
) -> int:
    """Run the server until `stop` is set, `rounds` rounds have ended, or (`until_idle`) none is requested; how many ended.

    `on_event` is called with each event that is appended from now on, `on_wait` each second or so with
    what is waited for. `metrics` is the address at which Prometheus finds it.
    Raises `FencedError` when another server has taken over.
    """
    deployment = open_deployment(directory, place)
    task = task_of_model(Followed(deployment.log).releases, types.DEFAULT_MODEL)
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
        evaluate=make_evaluate(deployment, task),
        on_event=news,
        on_wait=on_wait,
        plan=deployment.plan_file,
        snapshots=deployment.folder,
    )
    with _exposed(server, log, metrics):
        return server.run(stop, rounds, until_idle=until_idle)


def _exposed(server: Server, log: MeteredLog, address: str | None) -> AbstractContextManager[object]:
    if address is None:
        return nullcontext()
    return exposition.exposed(registry(server, log), log, exposition.Address.parse(address))
