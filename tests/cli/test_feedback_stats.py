"""`fedloop feedback stats`: the windows that the pipeline has closed, and what is known of those that are open."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import samples
from fedloop_cli.commands.feedback_stats import sparkline
from fedloop_cli.main import app
from fedloop_events import types
from fedloop_events.errors import UsageError
from fedloop_events.types import FeedbackScored, MetricsWindowed, Reaction, UsageCounted, Width
from fedloop_server.deployment import Deployment, open_deployment
from fedloop_server.feedback.operators.measuring import Measuring
from fedloop_server.feedback.pipeline import Pipeline
from fedloop_server.feedback.states import States
from fedloop_server.operations import commands, metrics
from typer.testing import CliRunner

HOUR = 3_600_000
NOW = int(time.time() * 1000)
THEN = (NOW // (24 * HOUR) - 3) * 24 * HOUR
FIELDS = {
    "use_case", "release", "language", "window", "start", "open", "satisfaction", "accuracy", "p50", "p95", "p99", "feedback",
    "answers", "masked", "quarantined", "late",
}  # fmt: skip


HOURS: tuple[Width, ...] = ("1h",)


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


class Piped:
    """A deployment and its pipeline, as far as it measures."""

    def __init__(self, folder: Path, states: States) -> None:
        self.folder = folder
        self.opened: Deployment = open_deployment(folder, None)
        self.origin = commands.identities(self.opened.writer).origin
        self.pipeline = Pipeline(self.opened.log, self.opened.writer, [Measuring()], states)
        self.given = 0

    def scored(self, at_ms: int, satisfaction: float, use_case: str = "support", release: str = "r1") -> FeedbackScored:
        self.given += 1
        reaction = Reaction(samples.masked("hello"), thumb="up")
        return FeedbackScored(
            self.origin, use_case, f"{self.given:032x}", "c1", f"f{self.given}", "r", release, at_ms, at_ms, reaction,
            satisfaction=satisfaction, correct=True, language="en", masked=2,
        )  # fmt: skip

    def append(self, *payloads: types.Payload) -> None:
        self.opened.writer.append(*payloads)

    def measure(self) -> None:
        self.pipeline.run(threading.Event(), until_idle=True)

    def stats(self, *arguments: object) -> list[dict[str, Any]]:
        done = run("feedback", "stats", self.folder, "--json", *arguments)
        assert done.exit_code == 0, done.output
        found: list[dict[str, Any]] = json.loads(done.stdout)["windows"]
        return found


@pytest.fixture
def piped(deployment: Path, tmp_path: Path) -> Any:
    with States(tmp_path / "states.sqlite") as states:
        made = Piped(deployment, states)
        yield made
        made.opened.log.close()


def test_closed_windows_and_open_ones_are_shown_with_what_they_hold(piped: Piped) -> None:
    piped.append(
        piped.scored(THEN, 1.0),
        piped.scored(THEN + 1, 0.0),
        piped.scored(THEN + HOUR, 0.25),
        piped.scored(THEN, 1.0, "moderation"),
        UsageCounted(piped.origin, "support", "r1", THEN, THEN + HOUR, THEN + HOUR + 9, 4, {"0": 4}),
        UsageCounted(piped.origin, "support", "r1", THEN, THEN, THEN + 9, quarantined=1),
    )
    piped.measure()
    piped.append(piped.scored(NOW, 1.0))
    found = piped.stats("--use-case", "support")
    assert all(each.keys() == FIELDS for each in found)
    assert [(each["language"], each["open"], each["satisfaction"], each["feedback"]) for each in found] == [
        (None, False, None, 0),
        ("en", False, 0.5, 2),
        ("en", False, 0.25, 1),
        ("en", True, 1.0, 1),
    ]
    of_devices, first = found[:2]
    assert (of_devices["answers"], of_devices["quarantined"], of_devices["masked"]) == (4, 1, 0)
    assert [round(of_devices[name], 2) for name in ("p50", "p95", "p99")] == [0.99] * 3
    assert (first["start"], first["accuracy"], first["masked"]) == (
        time.strftime("%Y-%m-%dT%H:00:00Z", time.gmtime(THEN / 1000)),
        1.0,
        4,
    )
    assert {each["use_case"] for each in piped.stats()} == {"support", "moderation"}
    assert [each["feedback"] for each in piped.stats("--window", "1d", "--use-case", "support")] == [0, 3, 1]
    shown = run("feedback", "stats", piped.folder)
    assert "(open)" in shown.stdout
    assert "satisfied, support: ▅▃█ 1.00" in shown.stdout
    unknown = run("feedback", "stats", piped.folder, "--use-case", "suport")
    assert isinstance(unknown.exception, UsageError)
    assert "there is moderation, support" in unknown.exception.hint


def test_a_thumb_is_in_its_open_window_as_soon_as_it_is_scored_and_once_when_that_is_closed(piped: Piped) -> None:
    reader = metrics.follow(piped.opened.log)
    for count in (1, 2):
        piped.append(piped.scored(THEN, 1.0))
        (measured,) = metrics.current(reader, "support", HOURS)
        assert (measured.open, measured.window.feedback) == (True, count)
    (before,) = metrics.current(reader, "support", HOURS)
    piped.measure()
    for found in (metrics.current(reader, "support", HOURS), metrics.current(piped.opened.log, "support", HOURS)):
        assert [(each.open, each.window) for each in found] == [(False, before.window)]
    piped.append(piped.scored(THEN, 0.0))
    assert [each.window.feedback for each in metrics.current(reader, "support", HOURS)] == [2]


def test_a_bounded_number_of_windows_is_kept(piped: Piped) -> None:
    reader, count = metrics.follow(piped.opened.log), metrics.LATEST["1h"] + 5
    piped.append(
        *(
            MetricsWindowed(piped.origin, "support", release="r1", width="1h", start_ms=THEN + number * HOUR, feedback=number)
            for number in range(count)
        )
    )
    found = metrics.current(reader)
    assert [each.window.feedback for each in found] == list(range(5, count))


def test_tail_says_what_the_pipeline_found_and_no_word_of_any_users(piped: Piped) -> None:
    piped.append(
        piped.scored(THEN, 1.0),
        types.EventQuarantined(piped.origin, "feedback", "0" * 32, "looks-personal", client_id="c2", found={"IBAN_CODE": 2}),
        types.DriftDetected(piped.origin, "support", "satisfaction", ["adwin"], THEN, 0.8, 0.4),
    )
    shown = run("feedback", "tail", piped.folder).stdout
    for what in ("c1 on r1, satisfaction 1.00", "looks-personal (2 IBAN_CODE), by c2", "satisfaction from 0.80 to 0.40 (adwin)"):
        assert what in shown
    assert "hello" not in shown
    (last,) = json.loads(run("feedback", "tail", piped.folder, "-n", "1", "--json").stdout)["events"]
    assert (last["use_case"], last["type"]) == ("support", "io.fedloop.drift.detected.v1")


def test_nothing_measured_is_said(deployment: Path) -> None:
    assert "nothing was measured yet" in run("feedback", "stats", deployment).stdout
    refused = run("feedback", "stats", deployment, "--use-case", "support")
    assert isinstance(refused.exception, UsageError)
    assert "fedloop feedback run" in refused.exception.hint


def test_a_sparkline_spans_all_shares() -> None:
    assert sparkline([0.0, 0.13, 0.5, 0.99, 1.0]) == "▁▂▅██"
