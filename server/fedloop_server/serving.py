"""Running the server of a deployment, with its metrics."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

from fedloop_events import types
from fedloop_events.envelope import Record
from fedloop_events.errors import UsageError
from fedloop_events.locations import DeploymentLocation

from fedloop_server.deployment import Deployment, open_deployment
from fedloop_server.operations.followed import Followed
from fedloop_server.rounds.loop import Evaluate, Server
from fedloop_server.state import OnEvent
from fedloop_server.telemetry import exposition
from fedloop_server.telemetry.metrics import MeteredLog, registry

MakeEvaluate = Callable[[Deployment, types.ModelSpec], Evaluate]
"""How releases of a deployment's model are evaluated."""


def serve(
    directory: Path,
    place: DeploymentLocation,
    stop: threading.Event,
    make_evaluate: MakeEvaluate,
    *,
    rounds: int | None = None,
    until_idle: bool = False,
    on_event: OnEvent | None = None,
    metrics: str | None = None,
) -> int:
    """Run the server until `stop` is set, `rounds` rounds have ended, or (`until_idle`) none is requested; how many ended.

    `on_event` is called with each event that is appended from now on. `metrics` is the address at which Prometheus finds it.
    Raises `FencedError` when another server has taken over.
    """
    deployment = open_deployment(directory, place)
    spec = Followed(deployment.log).releases.models.get(types.DEFAULT_MODEL)
    if spec is None:
        raise UsageError(f"{directory} has no model", hint="run `fedloop server init` again, to its end")
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
        evaluate=make_evaluate(deployment, spec),
        on_event=news,
        plan=deployment.plan_file,
        snapshots=deployment.folder,
    )
    with _exposed(server, log, metrics):
        return server.run(stop, rounds, until_idle=until_idle)


def _exposed(server: Server, log: MeteredLog, address: str | None) -> AbstractContextManager[object]:
    if address is None:
        return nullcontext()
    return exposition.exposed(registry(server, log), log, exposition.Address.parse(address))
