"""`fedloop feedback triggers`, on real logs: what it prints for a person and for a program, and how it ends."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest
import samples
from devices import World
from fedloop_cli.main import run
from fedloop_events import types

TABLES = """
[trigger.enough]
kind = "feedback"
count = 3

[trigger.unhappy]
kind = "satisfaction"
below = 0.7
over = 10
use_case = "support"

[trigger.nightly]
kind = "schedule"
cron = "30 2 * * *"

[trigger.report]
kind = "event"
"""
STANDING = (
    "trigger kind use_case waits_for observed next fired last why request asked_in_a_day max_per_day priority cooling_until"
    " muted_until held_back"
)


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A deployment with four triggers."""
    world = World(tmp_path / "deployment")
    for name in ("ann", "bob"):
        world.device(name)
    file = world.folder / "server" / "server.toml"
    file.write_text(file.read_text() + TABLES)
    return world


def give(world: World, count: int, satisfaction: float = 1.0) -> None:
    origin = world.payloads(types.DeploymentCreated)[0].origin
    reaction = types.Reaction(samples.masked("where is it"))
    scored = types.FeedbackScored(origin, "support", "0" * 32, "ann", "f", "a", "r0", 0, 0, reaction, satisfaction)
    world.writer.append(*[msgspec.structs.replace(scored, feedback_id=f"f{number}") for number in range(count)])


class Cli:
    def __init__(self, world: World, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = world.folder, capsys

    def text(self, name: str, *arguments: str | Path, status: int = 0) -> str:
        """Standard output, or, where it fails, standard error."""
        found = run(["feedback", *name.split(), str(self.folder), *map(str, arguments)])
        captured = self._capsys.readouterr()
        assert found == status, captured.err
        return captured.out if status == 0 else captured.err

    def document(self, name: str, *arguments: str | Path) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.text(name, *arguments, "--json"))
        return found

    def listed(self) -> dict[str, dict[str, Any]]:
        return {each["trigger"]: each for each in self.document("triggers list")["triggers"]}


@pytest.fixture
def cli(world: World, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(world, capsys)


def test_a_list_says_how_far_each_trigger_is_from_firing(world: World, cli: Cli) -> None:
    give(world, 2, 0.0)
    listed = cli.listed()
    assert [" ".join(each) for each in listed.values()] == [STANDING] * 4
    enough, unhappy, nightly, report = listed.values()
    assert (enough["waits_for"], enough["fired"], enough["held_back"]) == ("3 new feedback", 0, None)
    assert enough["observed"] == [{"use_case": "support", "count": 2, "of": 3, "mean": None, "at_most": None}]
    assert (unhappy["use_case"], unhappy["waits_for"]) == ("support", "below 0.7 over 10")
    assert unhappy["observed"] == [
        {"use_case": "support", "count": 2, "of": 10, "mean": 0.0, "at_most": pytest.approx(0.73, abs=0.01)}
    ]
    assert nightly["next"].endswith("T02:30:00Z")
    assert (report["waits_for"], report["observed"]) == ("an event", [])
    assert "support 2 of 3" in cli.text("triggers list")


def test_what_was_not_asked_for_has_not_fired_and_what_the_pipeline_asked_for_has(world: World, cli: Cli) -> None:
    give(world, 3)
    assert cli.listed()["enough"]["fired"] == 0
    cli.text("run", "--until-idle")
    (asked,) = world.payloads(types.RoundRequested)
    enough = cli.listed()["enough"]
    assert (enough["fired"], enough["request"], enough["asked_in_a_day"], enough["held_back"]) == (
        1, asked.request_id, 1, "cooling down",
    )  # fmt: skip
    assert enough["why"] == asked.reason == "feedback: 3 pieces of feedback of support since the last release"
    assert "cooling down until 20" in cli.text("triggers list")


def test_a_test_says_what_would_have_fired_and_what_was_asked_for_in_fact(world: World, cli: Cli, tmp_path: Path) -> None:
    give(world, 3)
    would = cli.document("triggers test")
    (fired,) = would["fired"]
    assert list(would) == ["triggers", "fired", "asked"]
    assert list(fired) == ["trigger", "at", "why", "request", "joins", "in_fact"]
    assert (fired["trigger"], fired["joins"], fired["in_fact"], would["asked"]) == ("enough", False, False, [])
    assert "nothing: it was not asked for" in cli.text("triggers test")
    cli.text("run", "--until-idle")
    (asked,) = world.payloads(types.RoundRequested)
    did = cli.document("triggers test")
    assert [(each["request"], each["in_fact"]) for each in did["fired"]] == [(asked.request_id, True)]
    assert [(each["request"], each["reason"]) for each in did["asked"]] == [(asked.request_id, asked.reason)]
    other = tmp_path / "other.toml"
    other.write_text('[trigger.twice]\nkind = "feedback"\ncount = 1\ncooldown_s = 0\n')
    twice = cli.document("triggers test", "--with", other)
    assert twice["triggers"] == ["twice"]
    assert [each["trigger"] for each in twice["fired"]] == ["twice"] * 3, "of a request that was not made nothing came"


def test_a_schedule_is_tested_at_all_its_times(world: World, cli: Cli, tmp_path: Path) -> None:
    from fedloop_server.feedback import triggers
    from fedloop_server.triggers import ScheduleTrigger

    now_ms = int(time.time() * 1000)
    hourly = [ScheduleTrigger(name="hourly", cron="0 * * * *")]
    fired = triggers.look_back(world.log, hourly, "UTC", now_ms + 5 * 3_600_000).fired
    assert len(fired) == 5
    assert all(each.at_ms % 3_600_000 == 0 for each in fired)


def test_a_muted_trigger_asks_for_nothing_until_it_may_again(world: World, cli: Cli) -> None:
    muted = cli.document("triggers mute", "enough", "--for", "2h", "--reason", "a campaign")
    (event,) = world.payloads(types.TriggerMuted)
    assert (event.trigger, event.use_case, event.reason) == ("enough", "default", "a campaign")
    assert abs(event.until_ms - (time.time() + 7200) * 1000) < 600_000
    give(world, 3)
    cli.text("run", "--until-idle")
    listed = cli.listed()["enough"]
    assert (listed["muted_until"], listed["held_back"]) == (muted["muted_until"], "muted")
    assert cli.document("triggers mute", "enough", "--for", "0") == {"trigger": "enough", "muted_until": None}
    assert world.payloads(types.RoundRequested) == []
    give(world, 1)
    cli.text("run", "--until-idle")
    assert len(world.payloads(types.RoundRequested)) == 1


def test_an_event_is_fired_by_hand_and_not_more_often_than_it_may(world: World, cli: Cli) -> None:
    cli.text("triggers fire", "report", "--reason", "the report of May is there")
    cli.text("run", "--until-idle")
    (asked,) = world.payloads(types.RoundRequested)
    assert asked.reason == "event: the report of May is there"
    refused = cli.text("triggers fire", "report", status=4)
    assert "cooling down" in refused
    assert "`fedloop feedback triggers list DIR` says until when" in refused
    assert "cooling down until 20" in cli.text("triggers list")
    assert len(world.payloads(types.TriggerFired)) == 1


def test_where_a_trigger_cannot_be_fired_the_hint_asks_for_the_round(world: World, cli: Cli) -> None:
    assert "`fedloop round start DIR --reason WHY`" in cli.text("triggers fire", "enough", status=2)
    assert run(["round", "start", str(world.folder), "--reason", "a new report"]) == 0
    assert [each.reason for each in world.payloads(types.RoundRequested)] == ["a new report"]


@pytest.mark.parametrize(
    ("command", "arguments", "named"),
    [
        ("triggers fire", ["enough"], ['"feedback"', "round start"]),
        ("triggers fire", ["reprot"], ["no trigger 'reprot'", 'did you mean "report"']),
        ("triggers mute", ["enough", "--for", "2 weeks"], ["2 weeks", "7d"]),
        ("triggers test", ["--with", "/nowhere.toml"], ["/nowhere.toml", "cannot be read"]),
    ],
)
def test_a_wrong_call_says_what_is_right(cli: Cli, command: str, arguments: list[str], named: list[str]) -> None:
    found = cli.text(command, *arguments, status=2)
    assert all(each in found for each in named), found


def test_without_triggers_the_list_says_where_they_go(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli = Cli(World(tmp_path / "deployment"), capsys)
    assert "[trigger.NAME]" in cli.text("triggers list")
    assert "nothing would have fired" in cli.text("triggers test")
