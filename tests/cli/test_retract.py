"""`fedloop agent retract`: taking feedback back on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from clients.conftest import Deployment

if TYPE_CHECKING:
    from cli.conftest import Fedloop


def test_agent_retract_deletes_feedback_and_says_what_it_does_not_undo(fedloop: Fedloop, tmp_path: Path) -> None:
    deployment, store = Deployment(tmp_path / "deployment"), tmp_path / "store"
    deployment.register()
    deployment.release()
    deployment.log.close()
    assert fedloop("agent", "enrol", tmp_path / "deployment", "--store", store, "--key-from", "file").status == 0
    given = ("agent", "feedback", "--store", store, "--text", "my card is lost", "--predicted", "loan", "--feedback-id", "mine")
    own = fedloop(*given, "--thumb", "down", "--json").document["feedback_id"]
    assert fedloop("agent", "status", "--store", store, "--json").document["waiting"] == 1
    done = fedloop("agent", "retract", "--store", store, "mine", "--json")
    assert (done.status, done.document["feedback_id"], done.document["published"]) == (0, own, False)
    assert fedloop("agent", "status", "--store", store, "--json").document["waiting"] == 0
    again = fedloop("agent", "retract", "--store", store, "mine")
    assert again.status == 0
    assert f"{own} is deleted from this device, and nothing of it was published" in again.out
    assert "Not undone: rounds that learned from it before keep that: their epsilon is spent" in again.out.replace("\n", " ")
    refused = fedloop(*given, "--thumb", "down")
    assert (refused.status, "was retracted" in refused.err) == (2, True)
    unknown = fedloop("agent", "retract", "--store", store, "nobody")
    assert (unknown.status, "no feedback of this device" in unknown.err) == (2, True)
