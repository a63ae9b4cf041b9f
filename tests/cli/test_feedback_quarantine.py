"""`fedloop feedback quarantine`, on real logs: what is held back, and what an operator's decision does, once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import samples
from devices import World
from fedloop_cli.main import run
from fedloop_events import types
from fedloop_events.envelope import Event
from fedloop_events.errors import PolicyError
from fedloop_events.masked import MaskedText
from fedloop_events.types import FeedbackScored, QuarantineDecided, ScoreWithdrawn
from fedloop_events.writer import EventWriter
from fedloop_server.feedback import quarantine
from msgspec.structs import replace

HELD = (
    "event_id status why decided reason detail found source_topic client_id use_case release given recorded"
)  # fmt: skip
MAIL = "write to jo@example.org about it"


@pytest.fixture
def world(tmp_path: Path) -> World:
    """A deployment with two devices, whose pipeline has taken in what they gave: two pieces and one of ann's looked personal."""
    world = World(tmp_path / "deployment")
    for name in ("ann", "bob"):
        world.device(name)
    give(world, "ann", 1, samples.masked(MAIL))
    give(world, "ann", 2, samples.masked("card 4111 1111 1111 1111 of jo@example.org"))
    give(world, "ann", 3)
    give(world, "bob", 4)
    assert run(["feedback", "run", str(world.folder), "--until-idle"]) == 0
    return world


def give(world: World, client_id: str, number: int, comment: MaskedText | None = None) -> str:
    """The event's id."""
    device = world.devices[client_id]
    feedback = replace(samples.feedback(number, client_id), origin=device.origin, seq=device.seq(), comment=comment)
    return device.writer.append(feedback)[0].id


def retract(world: World, client_id: str, number: int) -> None:
    device = world.devices[client_id]
    device.writer.append(types.FeedbackRetracted(device.origin, client_id, device.seq(), f"f{number}"))


def held(world: World) -> list[str]:
    return [each.event_id for each in world.payloads(types.EventQuarantined)]


def scored(world: World) -> list[str]:
    return [each.feedback_id for each in world.payloads(FeedbackScored)]


class Cli:
    def __init__(self, world: World, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self._capsys = world.folder, capsys

    def __call__(self, name: str, *arguments: str, status: int = 0) -> tuple[str, str]:
        self._capsys.readouterr()
        assert run(["feedback", "quarantine", name, str(self.folder), *arguments]) == status
        found = self._capsys.readouterr()
        return found.out, found.err

    def document(self, name: str, *arguments: str, status: int = 0) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self(name, *arguments, "--json", status=status)[0])
        return found


@pytest.fixture
def cli(world: World, capsys: pytest.CaptureFixture[str]) -> Cli:
    return Cli(world, capsys)


def test_what_is_held_back_is_listed_by_type_and_by_client_without_its_content(world: World, cli: Cli) -> None:
    found = cli.document("list")
    assert " ".join(found) == "events found reasons clients"
    assert [" ".join(each) for each in found["events"]] == [HELD] * 2
    assert [(each["client_id"], each["status"], each["reason"]) for each in found["events"]] == [
        ("ann", "held", "looks-personal")
    ] * 2
    assert (found["found"], found["reasons"]) == ({"CREDIT_CARD": 1, "EMAIL_ADDRESS": 2}, {"looks-personal": 2})
    assert found["clients"] == [{"client_id": "ann", "held": 2, "feedback": 3, "share": pytest.approx(2 / 3), "often": False}]
    assert sorted(scored(world)) == ["f3", "f4"]
    text, _ = cli("list")
    assert "2 EMAIL_ADDRESS" in text
    assert "misses often" not in text
    assert "jo@" not in text + json.dumps(found)


def test_a_device_whose_masker_misses_often_is_named(world: World, cli: Cli) -> None:
    give(world, "ann", 5, samples.masked(MAIL))
    give(world, "bob", 6, samples.masked(MAIL))
    assert run(["feedback", "run", str(world.folder), "--until-idle"]) == 0
    assert [(each["client_id"], each["often"]) for each in cli.document("list")["clients"]] == [("ann", True), ("bob", False)]
    text, _ = cli("list")
    assert "the masker of ann misses often" in text
    assert "the masker of bob" not in text


def test_an_empty_quarantine_is_said_to_be_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert Cli(World(tmp_path / "deployment"), capsys)("list")[0] == "nothing is held back\n"


def test_an_event_is_shown_with_its_text_only_when_asked(world: World, cli: Cli) -> None:
    event_id = held(world)[0]
    shown = cli.document("show", event_id)
    assert " ".join(shown) == f"{HELD} stream offset texts"
    assert (shown["texts"], shown["found"]) == (None, {"EMAIL_ADDRESS": 1})
    assert isinstance(shown["offset"], int)
    text, warning = cli("show", event_id)
    assert "jo@" not in text
    assert warning == ""
    text, warning = cli("show", event_id, "--text")
    assert MAIL in text
    assert "may be personal" in warning
    assert MAIL in cli.document("show", event_id, "--text")["texts"]


def test_what_is_released_is_scored_once_and_drops_are_for_ever(world: World, cli: Cli) -> None:
    first, second = held(world)
    for _ in range(2):
        released = cli.document("release", first, "--reason", "a shop's own address")
        assert (released["status"], released["why"]) == ("released", "a shop's own address")
    assert sorted(scored(world)) == ["f1", "f3", "f4"]
    ((record, found),) = [each for each in world.records(FeedbackScored) if each[1].feedback_id == "f1"]
    ((decided, _),) = world.records(QuarantineDecided)
    assert (found.event_id, found.recorded_ms) == (first, decided.appended_ms)
    assert record.key == "default"
    dropped = cli.document("drop", second)
    assert (dropped["status"], dropped["why"]) == ("dropped", "operator")
    assert cli.document("drop", second) == dropped
    assert "has been dropped already" in cli("release", second, "--reason", "no", status=4)[1]
    assert "has been released already" in cli("drop", first, status=4)[1]
    assert [each["status"] for each in cli.document("list")["events"]] == ["released", "dropped"]
    assert run(["feedback", "run", str(world.folder), "--until-idle"]) == 0
    assert sorted(scored(world)) == ["f1", "f3", "f4"]
    assert run(["log", "verify", str(world.folder)]) == 0


class Dying:
    """A log whose process is killed after so many batches were appended."""

    def __init__(self, world: World, batches: int) -> None:
        self._log, self._left = world.log, batches

    def __getattr__(self, name: str) -> Any:
        return getattr(self._log, name)

    def append(self, events: Sequence[Event]) -> None:
        if not self._left:
            raise KeyboardInterrupt
        self._left -= 1
        self._log.append(events)


def test_a_release_that_is_killed_is_completed_by_the_next_call(world: World, cli: Cli) -> None:
    first, _ = held(world)
    for batches in range(2):
        with pytest.raises(KeyboardInterrupt):
            quarantine.release(EventWriter(Dying(world, batches), world.writer.key), first, "fine")
        assert "f1" not in scored(world)
    cli("release", first, "--reason", "another one")
    assert scored(world).count("f1") == 1
    assert [each.reason for each in world.payloads(QuarantineDecided)] == ["fine"]


def test_what_its_user_took_back_is_neither_released_nor_read(world: World, cli: Cli) -> None:
    first, _ = held(world)
    retract(world, "ann", 1)
    for arguments in (["release", first, "--reason", "fine"], ["show", first, "--text"]):
        assert "the user has taken back" in cli(*arguments, status=4)[1]
    assert "f1" not in scored(world)
    assert world.payloads(QuarantineDecided) == []


def test_what_is_taken_back_while_it_is_released_is_withdrawn_after_its_score(world: World) -> None:
    first, _ = held(world)

    class TakenBack(Dying):
        def append(self, events: Sequence[Event]) -> None:
            super().append(events)
            if events[0].type == FeedbackScored.type_name:
                retract(world, "ann", 1)

    with pytest.raises(PolicyError, match="taken back"):
        quarantine.release(EventWriter(TakenBack(world, 9), world.writer.key), first, "fine")
    (withdrawn,) = world.payloads(ScoreWithdrawn)
    assert (withdrawn.use_case, withdrawn.client_id, withdrawn.feedback_id) == ("default", "ann", "f1")
    order = [each.type for each, _ in world.records(types.Payload) if each.topic == "scored"]
    assert order[-2:] == [FeedbackScored.type_name, ScoreWithdrawn.type_name]
    with pytest.raises(PolicyError, match="taken back"):
        quarantine.release(world.writer, first, "fine")
    assert world.payloads(ScoreWithdrawn) == [withdrawn]


def test_what_nobody_signed_is_never_released(world: World, cli: Cli) -> None:
    forged = replace(samples.feedback(9, "bob"), origin=world.devices["bob"].origin, seq=50)
    event = EventWriter(world.log, samples.key("mallory")).append(forged)[0]
    assert run(["feedback", "run", str(world.folder), "--until-idle"]) == 0
    assert event.id in held(world)
    for arguments in (["release", event.id, "--reason", "fine"], ["show", event.id, "--text"]):
        assert "not-authentic" in cli(*arguments, status=4)[1]
    assert cli.document("show", event.id)["offset"] is None
    assert cli.document("drop", event.id)["status"] == "dropped"


def test_the_hint_at_an_unknown_event_lists_those_that_there_are(world: World, cli: Cli) -> None:
    for command in (["show"], ["drop"], ["release", "--reason", "x"]):
        name, *more = command
        error = cli.document(name, "0" * 32, *more, status=2)["error"]
        assert error["hint"] == "`fedloop feedback quarantine list` shows what is held back"
    assert [each["event_id"] for each in cli.document("list")["events"]] == held(world)
