"""Running the feedback pipeline of a deployment."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

from fedloop_events.locations import DeploymentLocation
from msgspec import Struct

from fedloop_server.config import ServerConfig
from fedloop_server.deployment import open_deployment
from fedloop_server.feedback.operator import Operator
from fedloop_server.feedback.operators.counting import Counting
from fedloop_server.feedback.operators.curating import Curating
from fedloop_server.feedback.operators.drift import Drift
from fedloop_server.feedback.operators.expecting import Expect
from fedloop_server.feedback.operators.measuring import Measuring
from fedloop_server.feedback.operators.scoring import Scoring
from fedloop_server.feedback.operators.triggering import Triggering
from fedloop_server.feedback.pipeline import Pipeline
from fedloop_server.feedback.states import FILE_NAME, States
from fedloop_server.triggers import ForecastTrigger


class Ran(Struct, frozen=True):
    """How many events were read, emitted, and refused as malformed or not authentic."""

    read: int
    emitted: int
    refused: int


def operators(config: ServerConfig) -> list[Operator[Any]]:
    """The pipeline's operators as a deployment has them configured, in the order in which one can cause the next."""
    bounds = {each.metric: each.below for each in config.triggers if isinstance(each, ForecastTrigger)}
    triggering = Triggering(config.triggers, config.time_zone)
    return [Scoring(), Counting(), Measuring(), Drift(), Expect(bounds), Curating(), triggering]


def run(directory: Path, place: DeploymentLocation, stop: threading.Event, *, until_idle: bool = False) -> Ran:
    """Run the pipeline until `stop` is set, or (`until_idle`) all feedback that is there has been taken in.

    Killed at any point and started again, it goes on where it was, and emits nothing twice. Raises `UnreachableError` while
    another pipeline runs for the same folder.
    """
    deployment = open_deployment(directory, place)
    with States(deployment.folder / FILE_NAME) as states:
        pipeline = Pipeline(deployment.log, deployment.writer, operators(deployment.config), states)
        pipeline.run(stop, until_idle=until_idle)
    return Ran(pipeline.read, pipeline.emitted, pipeline.refused)
