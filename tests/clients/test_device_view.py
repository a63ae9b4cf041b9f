"""What a device knows of the log, and what it keeps of that."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec
from fedloop_clients.device_view import DeviceView
from fedloop_events import types
from fedloop_events.logs.port import START

if TYPE_CHECKING:
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


def test_a_state_that_an_older_program_kept_is_read_again_from_the_log(deployment: Deployment) -> None:
    """It held epochs of its own, and rounds as they were then."""
    old = {"offsets": dict(deployment.log.end().offsets), "epochs": {"main": 7}, "rounds": {"r0001": {"kind": "train"}}}
    view = view_of(deployment, msgspec.msgpack.encode(old))
    assert (view.position, view.rounds) == (START, {})
    instruction = deployment.ask("phone")
    view.catch_up(deployment.log)
    assert list(view.instructions) == [instruction]
