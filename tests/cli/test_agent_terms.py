"""The owner's terms, as the command line takes them."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from cli.conftest import deploy
from fedloop_events import types
from fedloop_events.flower.records import content_sha256
from fedloop_events.types import BlobRef, Content, Mechanism

if TYPE_CHECKING:
    from cli.conftest import Fedloop


def test_a_round_outside_the_owner_s_hours_is_declined_and_status_says_so(fedloop: Fedloop, tmp_path: Path) -> None:
    place, store = tmp_path / "deployment", tmp_path / "store"
    server = deploy(place)
    origin = fedloop("agent", "enrol", place, "--store", store, "--client-id", "phone", "--json").document["origin"]
    base = BlobRef("0" * 64, 1)
    opened = types.RoundOpened(
        origin, 1, "main", "r0001", "q", 1, "default", "0000-0", base, "ffa", ["phone"], 1, 600.0, ["x"], 10_000, 10.0,
        Mechanism(1.0, 2.0, 1.0, 1, 1.0),
    )  # fmt: skip
    content = Content(arrays={"arrays": base})
    server.writer.append(
        types.RoundRequested(origin, "main", "q"),
        types.EpochStarted(origin, 1, "main", "s1"),
        opened,
        types.InstructionSent(
            origin, 1, "main", 0, "phone", "train", content, content_sha256("train", "phone", content), "r0001", 600.0
        ),
    )
    server.log.close()
    hour = (datetime.now(UTC).hour + 12) % 24
    away = f"{hour}-{(hour + 1) % 24}"
    ran = fedloop("agent", "run", "--store", store, "--hours", away, "--time-zone", "UTC", "--rounds", "1")
    assert (ran.status, "1 outside-hours" in ran.err) == (0, True), ran.err
    assert fedloop("agent", "status", "--store", store, "--json").document["answers"] == {"outside-hours": 1}
