"""Running the feedback pipeline of a deployment."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Literal

from fedloop_events.errors import UsageError
from fedloop_events.locations import DeploymentLocation
from fedloop_events.masked import MAX_MASKED_CHARS
from msgspec import Struct

from fedloop_server.config import ServerConfig
from fedloop_server.deployment import open_deployment
from fedloop_server.feedback import exposed
from fedloop_server.feedback.operator import Operator
from fedloop_server.feedback.operators.counting import Counting
from fedloop_server.feedback.operators.curating import Curating
from fedloop_server.feedback.operators.drift import Drift
from fedloop_server.feedback.operators.expecting import Expect
from fedloop_server.feedback.operators.measuring import Measuring
from fedloop_server.feedback.operators.scoring import Full, Scoring
from fedloop_server.feedback.operators.triggering import Triggering
from fedloop_server.feedback.pipeline import Pipeline
from fedloop_server.feedback.states import FILE_NAME, States
from fedloop_server.telemetry import exposition
from fedloop_server.telemetry.metrics import MeteredLog
from fedloop_server.triggers import ForecastTrigger

Gate = Literal["fast", "full"]


class Ran(Struct, frozen=True):
    """How many events were read, emitted, and refused as malformed or not authentic."""

    read: int
    emitted: int
    refused: int


def operators(config: ServerConfig, full: Full | None = None) -> list[Operator[Any]]:
    """The pipeline's operators as a deployment has them configured, in the order in which one can cause the next. `full` is the
    whole masker, where the second gate has one."""
    bounds = {each.metric: each.below for each in config.triggers if isinstance(each, ForecastTrigger)}
    triggering = Triggering(config.triggers, config.time_zone)
    return [Scoring(full=full), Counting(), Measuring(), Drift(), Expect(bounds), Curating(), triggering]


def run(
    directory: Path,
    place: DeploymentLocation,
    stop: threading.Event,
    *,
    until_idle: bool = False,
    gate: Gate = "fast",
    metrics: str | None = None,
) -> Ran:
    """Run the pipeline until `stop` is set, or (`until_idle`) all feedback that is there has been taken in.

    Killed at any point and started again, it goes on where it was, and emits nothing twice. Raises `UnreachableError` while
    another pipeline runs for the same folder, `UsageError` where a full gate has no masker. `metrics` is the address at which
    Prometheus finds it.
    """
    deployment = open_deployment(directory, place)
    full = _masker() if gate == "full" else None
    log, found = MeteredLog(deployment.log), exposed.Found()
    with States(deployment.folder / FILE_NAME) as states:
        chosen = operators(deployment.config, full)
        pipeline = Pipeline(log, deployment.writer, chosen, states, on_emitted=found.add)
        with exposition.exposed_at(metrics, exposed.registry(pipeline, found, log), log):
            pipeline.run(stop, until_idle=until_idle)
    return Ran(pipeline.read, pipeline.emitted, pipeline.refused)


def _masker() -> Full:
    try:
        from fedloop_privacy.masking import Masker
    except ImportError as error:
        raise UsageError(
            f"a full gate needs the package {error.name}, which is not installed", hint="pip install 'fedloop[client]'"
        ) from None
    masker = Masker(max_chars=MAX_MASKED_CHARS)
    return lambda text: masker.mask(text).counts
