"""Logs of a deployment whose feedback pipeline has run, to make lakes of."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import samples
from fedloop_events import types
from fedloop_events.envelope import Event
from fedloop_events.ids import derived_id
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_events.masked import MaskedText
from fedloop_server.feedback.lake import delta, place, reading
from fedloop_server.feedback.lake.catalog import EVERY

DAY_MS = 24 * 3600 * 1000
HOUR_MS = 3600 * 1000
BEGIN_MS = 1_800_000_000_000 // DAY_MS * DAY_MS
CLIENTS = ("device-1", "device-2", "device-3")
USE_CASES = ("support", "moderation")
MECHANISM = types.Mechanism(sampling_rate=0.1, noise_multiplier=1.0, clip_norm=1.0, steps=5, divisor=10.0)
BLOB = types.BlobRef("0" * 64, 10)


def masked(text: str) -> MaskedText:
    return msgspec.convert({"text": text, "counts": {}}, MaskedText)


def scored(
    number: int, client: str = CLIENTS[0], use_case: str = USE_CASES[0], at_ms: int | None = None, **changes: Any
) -> types.FeedbackScored:
    recorded_ms = BEGIN_MS + number * HOUR_MS if at_ms is None else at_ms
    reaction = types.Reaction(text=masked(f"secret words {number}"), thumb="up" if number % 3 else "down")
    values: dict[str, Any] = {
        "event_id": derived_id("recorded", number),
        "client_id": client,
        "feedback_id": f"f{number}",
        "response_id": f"r{number}",
        "release": "0001-0123456789ab",
        "given_ms": recorded_ms - 5000,
        "recorded_ms": recorded_ms,
        "reaction": reaction,
        "satisfaction": 1.0 if number % 3 else 0.0,
        "correct": bool(number % 2),
        "sentiment": 0.1,
        "priority": 0.5,
        "language": "en",
        "masked": 1,
    }
    return types.FeedbackScored(origin=samples.ORIGIN, use_case=use_case, **values | changes)


def curated(number: int, client: str = CLIENTS[0], use_case: str = USE_CASES[0]) -> types.ExampleCurated:
    return types.ExampleCurated(
        origin=samples.ORIGIN,
        use_case=use_case,
        example_id=derived_id("example", number),
        kind="sft",
        client_id=client,
        feedback_id=f"f{number}",
        event_id=derived_id("recorded", number),
        release="0001-0123456789ab",
        text=masked(f"secret words {number}"),
        completion=masked(f"secret answer {number}"),
    )


def retracted(number: int, client: str = CLIENTS[0], seq: int = 1) -> types.FeedbackRetracted:
    return types.FeedbackRetracted(origin=samples.ORIGIN, client_id=client, seq=seq, feedback_id=f"f{number}")


def score_withdrawn(number: int, client: str = CLIENTS[0], use_case: str = USE_CASES[0]) -> types.ScoreWithdrawn:
    return types.ScoreWithdrawn(origin=samples.ORIGIN, use_case=use_case, client_id=client, feedback_id=f"f{number}")


def example_withdrawn(number: int, use_case: str = USE_CASES[0]) -> types.ExampleWithdrawn:
    return types.ExampleWithdrawn(origin=samples.ORIGIN, use_case=use_case, example_id=derived_id("example", number))


def decisions() -> Iterator[types.Payload]:
    """At least one event of every type that the lake has rows of, beside feedback and examples."""
    of: dict[str, Any] = {"origin": samples.ORIGIN}
    run: dict[str, Any] = {**of, "epoch": 1, "run_id": "main"}
    model: dict[str, Any] = {**of, "model": "default", "epoch": 1, "release": "0001-0123456789ab"}
    case: dict[str, Any] = {**of, "use_case": "support"}
    yield types.RoundRequested(**of, run_id="main", request_id="q1", reason="satisfaction below 0.7")
    yield types.RoundRequestWithdrawn(**of, run_id="main", request_id="q0")
    yield types.EpochStarted(**run, server_id="s1")
    yield types.RoundOpened(
        **run,
        round_id="r0001",
        request_id="q1",
        number=1,
        model="default",
        base_release="0000-0123456789ab",
        base=BLOB,
        strategy="ffa",
        cohort=list(CLIENTS),
        quorum=2,
        deadline_s=60.0,
        upload=["a"],
        max_upload_bytes=100,
        max_update_norm=1.0,
        mechanism=MECHANISM,
    )
    yield types.RoundAbortRequested(**of, run_id="main", round_id="r0001")
    yield types.RoundClosed(**run, step=1, accepted=[], round_id="r0001")
    yield types.RoundAborted(**run, round_id="r0002", reason="quorum")
    yield types.ReleaseProposed(**model, number=1, blob=BLOB, round_id="r0001")
    yield types.ReleaseEvaluated(**model, metrics={"accuracy": 0.8}, leading="accuracy", examples=10, dataset_sha256="0" * 64)
    yield types.ReleasePublished(**model, number=1, blob=BLOB)
    yield types.ReleaseRejected(**model, reason="worse")
    yield types.ReleaseRolledBack(
        **of, model="default", release="0000-0123456789ab", withdrawn="0001-0123456789ab", reason="complaints"
    )
    yield types.MetricsWindowed(
        **case,
        release="0001-0123456789ab",
        width="1h",
        start_ms=BEGIN_MS,
        feedback=10,
        satisfied=7.0,
        satisfied_of=10,
        latency=types.Quantiles(count=5, p50=0.1, p95=0.2, p99=0.3),
        signals={"copied": 2},
    )
    yield types.DriftDetected(**case, metric="satisfaction", detectors=["adwin"], at_ms=BEGIN_MS, before=0.8, after=0.6)
    yield types.MetricForecast(
        **case, metric="accuracy", width="1h", after_ms=BEGIN_MS, horizon=3, expected=0.7, low=0.6, high=0.8
    )
    yield types.EventQuarantined(
        **of, source_topic="feedback", event_id=derived_id("held"), reason="personal", found={"EMAIL": 1}, use_case="support"
    )
    yield types.QuarantineDecided(**of, source_topic="feedback", event_id=derived_id("held"), decision="drop")
    yield types.BudgetSpent(
        **of,
        client_id=CLIENTS[0],
        seq=7,
        spend_seq=0,
        previous="",
        run_id="main",
        instruction_id=derived_id("instruction"),
        mechanism=MECHANISM,
    )
    yield types.BudgetRefused(
        **of, client_id=CLIENTS[1], seq=8, run_id="main", instruction_id=derived_id("instruction"), reason="budget"
    )


def history(events: int = 40, seed: int = 7) -> list[types.Payload]:
    """Feedback and examples of several clients over some days, some of it withdrawn, and every decision."""
    chance = random.Random(seed)
    said: list[types.Payload] = []
    for number in range(events):
        client, use_case = chance.choice(CLIENTS), chance.choice(USE_CASES)
        said += [scored(number, client, use_case), curated(number, client, use_case)]
        if number % 10 == 3:
            said.append(retracted(number, client, seq=number))
        if number % 10 == 5:
            said.append(score_withdrawn(number, client, use_case))
        if number % 10 == 7:
            said.append(example_withdrawn(number, use_case))
    return [*said, *decisions()]


def make(folder: Path, payloads: Sequence[types.Payload] = ()) -> SqliteLog:
    """A log in the folder, with a deployment, its clients, and these events, each signed by its author."""
    folder.mkdir(parents=True, exist_ok=True)
    log = SqliteLog(folder / "log.sqlite")
    log.append([samples.signed(samples.created(), number=0)])
    log.append([samples.signed(samples.enrolled(each, str(11 + i)), number=1 + i) for i, each in enumerate(CLIENTS)])
    append(log, payloads)
    return log


def open_again(folder: Path) -> SqliteLog:
    """The log that `make` made in the folder, opened anew."""
    return SqliteLog(folder / "log.sqlite")


def append(log: SqliteLog, payloads: Sequence[types.Payload]) -> list[Event]:
    events = [samples.signed(each) for each in payloads]
    if events:
        log.append(events)
    return events


def rows(lake: Path | str) -> dict[str, list[tuple[Any, ...]]]:
    """What the lake holds: the rows of each table, sorted."""
    where = place.locate(None, str(lake))
    connection = reading.connect(where)
    found = {}
    for table in EVERY:
        files = delta.files(where, table)
        assert files is not None
        query = f"SELECT * FROM {reading.source(table, files)}"
        found[table.name] = sorted(connection.execute(query).fetchall(), key=repr)
    return found
