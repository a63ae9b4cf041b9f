"""Drift and forecasts through the real runner: stopped wherever it can be, and shown events twice, it emits the same."""

from __future__ import annotations

import random
import threading
from pathlib import Path
from typing import Any

import samples
from fedloop_events import ids, topics
from fedloop_events.logs.port import START, Batch, Position, read_all
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_events.types import DriftDetected, MetricForecast, MetricsWindowed, Payload
from fedloop_events.writer import EventWriter
from fedloop_server.feedback.operator import Operator
from fedloop_server.feedback.operators.drift import Drift
from fedloop_server.feedback.operators.expecting import Expect
from fedloop_server.feedback.pipeline import Pipeline
from fedloop_server.feedback.states import States
from feedback.driving import USE_CASE, scored


class InSmallPieces(SqliteLog):
    """Shows a hundred events at a time, each of them twice."""

    def read(self, asked: object = topics.ALL, after: Position = START, *, limit: int = 1000, wait_s: float = 0.0) -> Batch:
        batch = super().read(asked, after, limit=min(limit, 100), wait_s=wait_s)  # type: ignore[arg-type]
        return Batch([record for record in batch.records for _ in range(2)], batch.position)


def written(folder: Path, kind: type[SqliteLog]) -> SqliteLog:
    """A log with 1,200 pieces of feedback, of which the last 500 are less content, and a window after each twenty."""
    folder.mkdir()
    log, source = kind(folder / "log.sqlite"), random.Random(8)
    writer = EventWriter(log, samples.key("server"))
    log.append([samples.signed(samples.created(), "server")])
    payloads: list[Payload] = []
    content = 0.0
    for number in range(1200):
        satisfaction = float(source.random() < (0.9 if number < 700 else 0.5))
        payloads.append(scored(number, satisfaction))
        content += satisfaction
        if number % 20 == 19:
            start_ms = 60_000 * (number // 20)
            payloads.append(
                MetricsWindowed(samples.ORIGIN, USE_CASE, "release-1", "1m", start_ms, satisfied=content, satisfied_of=20)
            )
            content = 0.0
    for start in range(0, len(payloads), 300):
        numbered = enumerate(payloads[start : start + 300], start)
        log.append([writer.event(each, id=ids.derived_id("event", n), time_s=n) for n, each in numbered])
    return log


def emitted(folder: Path) -> list[tuple[str, bytes]]:
    log, types = SqliteLog(folder / "log.sqlite"), (DriftDetected.type_name, MetricForecast.type_name)
    found = sorted((record.id, record.data) for record in read_all(log, (topics.METRICS,)) if record.type in types)
    log.close()
    return found


def operators() -> list[Operator[Any]]:
    return [Drift(), Expect({"satisfaction": 0.6})]


def step(log: SqliteLog, states: Path) -> int:
    with States(states) as kept:
        pipeline = Pipeline(log, EventWriter(log, samples.key("server")), operators(), kept, wall=lambda: 4e9)
        return pipeline.step()


def test_stopped_after_every_step_and_shown_events_twice_the_same_drift_and_forecasts_are_emitted(tmp_path: Path) -> None:
    whole = written(tmp_path / "whole", SqliteLog)
    with States(tmp_path / "whole" / "states") as kept:
        run = Pipeline(whole, EventWriter(whole, samples.key("server")), operators(), kept, wall=lambda: 4e9)
        run.run(threading.Event(), until_idle=True)
    pieces = written(tmp_path / "pieces", InSmallPieces)
    steps = 0
    while step(pieces, tmp_path / "pieces" / "states"):
        steps += 1
    assert steps > 10
    whole.close()
    pieces.close()
    found = emitted(tmp_path / "whole")
    assert emitted(tmp_path / "pieces") == found
    assert len(found) > 40
    assert any(b"adwin" in data for _, data in found)
