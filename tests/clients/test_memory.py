"""A device with too little memory for a round."""

from __future__ import annotations

from pathlib import Path

from clients.conftest import answered
from fedloop_clients import models
from fedloop_events import types


def test_a_device_without_the_memory_declines_the_round_says_what_would_fit_and_spends_nothing(tmp_path: Path) -> None:
    from clients.chatted import chatted_in  # imports torch
    from fedloop_tasks.causal.model import CausalModel

    chatted, left = chatted_in(tmp_path / "chatted"), 10**15
    with chatted.enrol(tmp_path / "store", client_id="phone", epsilon=1000.0) as agent:
        small = CausalModel(chatted.model.spec, model_dir=chatted.base_folder, device="cpu", free=lambda: left)
        agent._device.models._idle.append(models.Held(small))
        asked = agent.record_answer([{"role": "user", "content": "where is my card"}], "here")
        agent.feedback(asked.response_id, correction="we have sent it")
        left = 10**6
        chatted.ask("phone")
        agent.run(until=answered())
    (declined,) = chatted.appended(types.RoundDeclined)
    assert declined.reason == "no-memory"
    assert declined.detail.startswith("training needs ")
    assert "1.0 MB are free" in declined.detail
    assert not chatted.appended(types.BudgetSpent)
    chatted.log.close()
