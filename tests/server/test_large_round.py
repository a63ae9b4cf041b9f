"""A round of a thousand clients: recorded in many events, killed between them, and the same release."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
from devices import OPEN_CONFIG, World
from fedloop_events import types
from fedloop_events.envelope import MAX_EVENT_BYTES, Event
from fedloop_events.logs.port import EventLog, read_all
from fedloop_server.rounds import actions
from fedloop_server.rounds.loop import Server
from fedloop_server.rounds.rebuild import rebuild
from msgspec.structs import replace
from server.test_server import Killed, Mortal

CLIENTS = 1_000
CONFIG = replace(OPEN_CONFIG, cohort_size=CLIENTS, quorum=CLIENTS, deadline_s=280.0, availability_s=1e6)
NAMES = [f"device-{number:04d}-{'x' * 40}" for number in range(CLIENTS)]


class DiesOf(Mortal):
    """A log that holds a batch up to the first event of one type, of which its user dies: batches are torn."""

    def __init__(self, log: EventLog, kind: type[types.Payload]) -> None:
        super().__init__(log, 0, before=False)
        self.kind = kind

    def append(self, events: Sequence[Event]) -> None:
        at = next((number for number, event in enumerate(events, 1) if event.type == self.kind.type_name), 0)
        self.log.append(events[:at] if at else events)
        if at:
            raise Killed


def run_to_its_end(server: Server) -> None:
    while not isinstance(server.step(wait_s=0.0), actions.Wait):
        pass


def released(folder: Path, *killed_by: type[types.Payload]) -> str:
    """The hash of what a round makes, with one server after the other killed by these events."""
    world = World(folder, CONFIG)
    world.crowd(*NAMES, epsilon=None)
    world.request(1)
    with world.serving_together():
        for kind in killed_by:
            with pytest.raises(Killed):
                run_to_its_end(world.server(log=DiesOf(world.log, kind)))
        run_to_its_end(world.server())
    (state,) = world.rounds.rounds.values()
    assert state.opened is not None
    assert state.opened.cohort == state.participants == NAMES
    assert len(world.payloads(types.CohortListed)) >= 2
    assert len(world.payloads(types.RepliesListed)) >= 5
    for kind in (types.InstructionSent, types.UpdateSubmitted):
        assert len(world.payloads(kind)) == CLIENTS, "nobody is asked twice"
    assert all(len(record.data) <= MAX_EVENT_BYTES for record in read_all(world.log))
    assert rebuild(world.log, world.blobs).identical
    (_, release) = world.releases.releases.values()
    assert release.status == "published"
    return release.blob.sha256


@pytest.mark.slow
def test_a_thousand_clients_make_one_release_whatever_kills_the_server_on_the_way(tmp_path: Path) -> None:
    undisturbed = released(tmp_path / "undisturbed")
    killed = released(tmp_path / "killed", types.CohortListed, types.InstructionSent, types.RepliesListed)
    assert killed == undisturbed
