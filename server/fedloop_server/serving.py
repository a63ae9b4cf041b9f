"""Running the server of a deployment, with its metrics."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

from fedloop_events import locations, types
from fedloop_events.blobs import tensors
from fedloop_events.envelope import Record
from fedloop_events.errors import FedloopError, LogChangedError
from fedloop_events.locations import DeploymentLocation
from fedloop_tasks.task import Evaluate, Task

from fedloop_server.config import ServerConfig
from fedloop_server.deployment import Deployment, open_deployment
from fedloop_server.operations import opening
from fedloop_server.operations.followed import Followed
from fedloop_server.operations.registry import current, task_of_model
from fedloop_server.operations.rounds import OnWait
from fedloop_server.operations.sweeping import DAY_S, sweep
from fedloop_server.rounds.loop import Server
from fedloop_server.state import OnEvent
from fedloop_server.telemetry import exposition
from fedloop_server.telemetry.metrics import MeteredLog, registry

FIRST_SWEEP_S: Final = 60.0
"""After the start: a server that is started again and again sweeps too, one that does a single round does not."""
STOP_SWEEP_S: Final = 10.0

_logger = logging.getLogger(__name__)

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
    accept_loss: bool = False,
) -> int:
    """Run the server until `stop` is set, `rounds` rounds have ended, or (`until_idle`) none is requested; how many ended.

    `on_event` is called with each event that is appended from now on, `on_wait` each second or so with what is waited for.
    `metrics` is the address at which Prometheus finds it. Raises `UsageError` for a configuration with which no round can run,
    `FencedError` when another server has taken over, `LogChangedError` if the log has lost what this server has read; with
    `accept_loss` it goes on without.
    """
    deployment = open_deployment(directory, place)
    releases = Followed(deployment.log).releases
    task = task_of_model(releases, types.DEFAULT_MODEL)
    before = deployment.log.end()

    def news(record: Record, payload: types.Payload) -> None:
        if on_event is not None and not before.covers(record.stream, record.offset):
            on_event(record, payload)

    log = MeteredLog(deployment.log)
    try:
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
            accept_loss=accept_loss,
        )
    except LogChangedError as error:
        error.hint = "restore the whole log; or go on without what is lost: `fedloop server run DIR --accept-loss`"
        raise
    server.planner.check(tensors.decode(deployment.blobs.get(current(releases, types.DEFAULT_MODEL).blob)))
    with exposition.exposed_at(metrics, registry(server, log), log), _swept(directory, place, deployment.config):
        return server.run(stop, rounds, until_idle=until_idle)


@contextmanager
def _swept(directory: Path, place: DeploymentLocation, config: ServerConfig) -> Iterator[None]:
    """Sweep the blob store once a day, beside the rounds, through connections of its own."""
    stop = threading.Event()

    def sweep_daily() -> None:
        wait_s = FIRST_SWEEP_S
        while not stop.wait(wait_s):
            wait_s = DAY_S
            try:
                with closing(opening.open_log(place, directory)) as log:
                    blobs = opening.open_blobs(place, directory)
                    found = sweep(place, log, blobs, directory, older_than_s=config.sweep_days * DAY_S, stopped=stop.is_set)
            except FedloopError as error:
                _logger.warning("the blob store was not swept: %s", error.message)
            else:
                if found.removed:
                    _logger.info("%d blobs of %d bytes that no event names were removed", found.removed, found.freed_bytes)

    if locations.scheme_of(place.log) in {"http", "https"}:  # where neither is whole
        yield
        return
    thread = threading.Thread(target=sweep_daily, name="sweep", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(STOP_SWEEP_S)
