"""`fedloop agent personalise`: a personal layer, trained, shown and removed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from clients.conftest import settled
from fedloop_cli.main import run


def test_a_layer_is_trained_shown_by_status_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from clients.chatted import chatted_in  # imports torch

    chatted, store = chatted_in(tmp_path / "chatted"), tmp_path / "store"
    with chatted.enrol(store) as agent:
        for n in range(10):
            asked = agent.record_answer([{"role": "user", "content": f"where is card {'x' * n}"}], "here")
            agent.feedback(asked.response_id, correction="yes, we have sent it")
        agent.run(until=settled)

    def shown(*arguments: str) -> Any:
        assert run(["agent", arguments[0], "--store", str(store), "--json", *arguments[1:]]) == 0
        return json.loads(capsys.readouterr().out)

    assert shown("status")["personal"] is None
    made = shown("personalise", "--model-dir", str(chatted.base_folder))
    assert made["kept"]
    assert made["loss_after"] < made["loss_before"]
    status = shown("status")["personal"]
    assert {name: status[name] for name in made if name != "kept"} == {name: made[name] for name in made if name != "kept"}
    assert run(["agent", "status", "--store", str(store)]) == 0
    assert "of 8 examples, on release 0000-" in capsys.readouterr().out
    assert shown("personalise", "--remove") == {"removed": True}
    assert shown("personalise", "--remove") == {"removed": False}
    assert shown("status")["personal"] is None
    chatted.log.close()


def test_a_model_that_does_not_chat_has_no_personal_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from clients.classified import classified_in, enrol  # imports torch

    classified = classified_in(tmp_path / "deployment")
    enrol(classified, tmp_path / "store").close()
    assert run(["agent", "personalise", "--store", str(tmp_path / "store")]) == 2
    assert "so it has no personal layer" in capsys.readouterr().err
    classified.log.close()
