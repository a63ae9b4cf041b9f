"""What a device knows of the log, and what it keeps of that."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
import pytest
from fedloop_clients.device_view import DeviceView
from fedloop_events import types
from fedloop_events.errors import LogChangedError
from fedloop_events.logs.port import START
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_events.parts import split
from fedloop_events.writer import EventWriter
from msgspec.structs import replace

if TYPE_CHECKING:
    from pathlib import Path

    from clients.conftest import Deployment


def view_of(deployment: Deployment, state: bytes | None = None, client_id: str = "phone") -> DeviceView:
    return DeviceView(client_id, deployment.server.key.public_key, state)


def test_a_view_goes_on_from_its_state_and_knows_who_is_fenced(deployment: Deployment) -> None:
    view = view_of(deployment)
    deployment.server.append(types.EpochStarted(origin="test.example", epoch=2, run_id="main", server_id="s2"))
    view.catch_up(deployment.log)
    again = view_of(deployment, view.to_state())
    assert again.position == deployment.log.end()
    fenced = deployment.ask("phone")
    opened = deployment.opened("phone", epoch=2)
    deployment.server.append(opened)
    counts = deployment.instruct("phone", opened)
    again.catch_up(deployment.log)
    assert list(again.rounds) == [opened.round_id]
    assert list(again.instructions) == [counts] != [fenced]


def test_a_step_that_was_collected_leaves_the_round_open_for_the_next(deployment: Deployment) -> None:
    opened = deployment.opened("phone")
    deployment.server.append(opened)
    first = deployment.instruct("phone", opened)
    view = view_of(deployment)
    view.catch_up(deployment.log)
    assert list(view.instructions) == [first]
    said = {"origin": "test.example", "epoch": 1, "run_id": "main", "accepted": [], "round_id": opened.round_id}
    deployment.server.append(types.StepCollected(**said, step=1))  # type: ignore[arg-type]
    second = deployment.instruct("phone", opened, step=2)
    view.catch_up(deployment.log)
    assert (list(view.instructions), list(view.rounds)) == ([second], [opened.round_id])
    deployment.server.append(types.RoundClosed(**said, step=3))  # type: ignore[arg-type]
    view.catch_up(deployment.log)
    assert (view.instructions, view.rounds) == ({}, {})


def closed(opened: types.RoundOpened, **reasons: str) -> types.RoundClosed:
    excluded = [types.Exclusion(client_id, reason) for client_id, reason in reasons.items()]
    return types.RoundClosed("test.example", 1, "main", 1, [], excluded, opened.round_id)


def test_who_is_at_work_for_a_buffered_round_goes_on_until_it_is_too_stale(deployment: Deployment) -> None:
    rounds = [replace(deployment.opened("phone"), max_staleness=1) for _ in range(4)]
    at_work, silent, *later = rounds
    deployment.server.append(at_work)
    instruction = deployment.instruct("phone", at_work)
    deployment.server.append(closed(at_work, phone=types.AT_WORK), silent)
    deployment.instruct("phone", silent)
    deployment.server.append(closed(silent, phone="silent", tablet=types.AT_WORK))
    view = view_of(deployment)
    view.catch_up(deployment.log)
    assert (list(view.instructions), list(view.rounds)) == ([instruction], [at_work.round_id])
    # A round of another run has numbers of its own.
    deployment.server.append(types.EpochStarted("test.example", 1, "other", "s1"))
    deployment.server.append(replace(later[1], run_id="other", round_id="o1", number=9))
    again = view_of(deployment, view.to_state())
    again.catch_up(deployment.log)
    assert list(again.instructions) == [instruction]
    deployment.server.append(later[0])
    again.catch_up(deployment.log)
    assert (again.instructions, list(again.rounds)) == ({}, ["o1", later[0].round_id])


def test_an_aborted_round_is_over_for_whoever_is_at_work_for_it(deployment: Deployment) -> None:
    opened = replace(deployment.opened("phone"), max_staleness=5)
    deployment.server.append(opened)
    deployment.instruct("phone", opened)
    deployment.server.append(closed(opened, phone=types.AT_WORK))
    deployment.server.append(types.RoundAborted("test.example", 1, "main", opened.round_id, "unmergeable"))
    view = view_of(deployment)
    view.catch_up(deployment.log)
    assert (view.instructions, view.rounds) == ({}, {})


@pytest.mark.parametrize("seen", ["all", "its own"])
def test_of_a_cohort_in_many_events_a_device_keeps_whether_it_is_in_it(deployment: Deployment, seen: str) -> None:
    names = [f"device-{number:04d}" for number in range(1500)]
    *listed, whole = split(deployment.opened(*names))
    for me in ("device-1234", "phone"):
        view = view_of(deployment, client_id=me)
        deployment.server.append(*(part for part in listed if seen == "all" or me in part.named), whole)
        view.catch_up(deployment.log)
        (opened,) = view.rounds.values()
        assert (opened.cohort, opened.parts) == ([me] if me in names else [], [])
        assert len(view.to_state()) < 10_000


@pytest.mark.parametrize("grown", [0, 30])
def test_a_log_that_lost_events_which_a_device_has_read_is_refused_also_once_it_has_grown(
    deployment: Deployment, tmp_path: Path, grown: int
) -> None:
    deployment.ask("phone")
    view = view_of(deployment)
    view.catch_up(deployment.log)
    restored = SqliteLog(tmp_path / "restored.sqlite")
    restored.append(deployment.log.read(limit=deployment.log.end().offsets["log"] - 1).records)
    writer = EventWriter(restored, deployment.server.key)
    writer.append(*(types.EpochStarted("test.example", 2 + number, "main", "s2") for number in range(grown)))
    for _ in range(2):  # it does not get used to it
        again = view_of(deployment, view.to_state())
        with pytest.raises(LogChangedError, match="of stream 'log'"):
            again.catch_up(restored)
        view = again
    view.check_end(deployment.log)  # the whole log is back
    restored.close()


def test_a_state_that_an_older_program_kept_is_read_again_from_the_log(deployment: Deployment) -> None:
    """It held epochs of its own, and rounds as they were then."""
    old = {"offsets": dict(deployment.log.end().offsets), "epochs": {"main": 7}, "rounds": {"r0001": {"kind": "train"}}}
    view = view_of(deployment, msgspec.msgpack.encode(old))
    assert (view.position, view.rounds) == (START, {})
    instruction = deployment.ask("phone")
    view.catch_up(deployment.log)
    assert list(view.instructions) == [instruction]
