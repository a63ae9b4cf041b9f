"""A device with too little memory for a round, or whose owner lets it train less than one asks for."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from clients.conftest import MECHANISM, answered
from fedloop_clients import models
from fedloop_clients.device import Settings
from fedloop_events import types
from fedloop_events.blobs import tensors
from fedloop_events.errors import UsageError
from fedloop_tasks.table import program_of
from msgspec.structs import replace


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


@pytest.mark.parametrize("limit", ["memory", "owner"])
@pytest.mark.parametrize("private", [True, False])
def test_a_device_that_can_train_a_part_does_so_where_the_program_takes_one(tmp_path: Path, limit: str, private: bool) -> None:
    from clients.chatted import chatted_in  # imports torch
    from fedloop_tasks.causal import memory
    from fedloop_tasks.causal.model import CausalModel

    chatted = chatted_in(tmp_path / "chatted")
    name = next(iter(chatted.arrays)).removesuffix(".A")
    (_, into), (out, _) = chatted.arrays[name + ".A"].shape, chatted.arrays[name + ".B"].shape
    chatted.arrays |= {f"{name}.fixed.A": np.ones((3, into), np.float32), f"{name}.fixed.B": np.ones((out, 3), np.float32)}
    chatted.release()
    terms = {"settings": Settings(model_dir=chatted.base_folder, rank=2 if limit == "owner" else None)}
    epsilon = 1000.0 if private else None
    with chatted.enrol(tmp_path / "store", client_id="phone", epsilon=epsilon, **terms) as agent:
        spec = chatted.model.spec
        left, fixed_bytes = 10**15, 3 * 4 * (into + out)
        made = CausalModel(spec, model_dir=chatted.base_folder, device="cpu", cache_bytes=0, free=lambda: left)
        if limit == "memory":
            left = memory.training_bytes(memory.sizes(chatted.base_folder), spec, 0, memory.Trained(2, fixed_bytes))
        agent._device.models._idle.append(models.Held(made))
        asked = agent.record_answer([{"role": "user", "content": "where is my card"}], "here")
        agent.feedback(asked.response_id, correction="we have sent it")
        for strategy in ("stack", "fedavg"):
            upload = program_of(strategy).upload(list(chatted.arrays))
            opened = replace(chatted.opened("phone", mechanism=MECHANISM if private else None), strategy=strategy, upload=upload)
            chatted.server.append(opened)
            chatted.instruct("phone", opened)
            agent.run(until=answered(1 if strategy == "stack" else 2))
        assert agent.status().rank == 2
        assert all(made.arrays()[name].shape == shape for name, shape in chatted.model.shapes.items())
    (update,) = chatted.appended(types.UpdateSubmitted)
    found = tensors.decode(chatted.blobs.get(next(iter(update.content.arrays.values()))))
    terms_of_it = chatted.appended(types.RoundOpened)[0]
    assert tensors.specs(found) == program_of("stack").smaller(terms_of_it, chatted.arrays)[1]
    assert any(
        values.tobytes() != chatted.arrays[name][tuple(map(slice, values.shape))].tobytes() for name, values in found.items()
    )
    (declined,) = chatted.appended(types.RoundDeclined)
    assert declined.reason == {"memory": "no-memory", "owner": "rank-too-high"}[limit]
    assert len(chatted.appended(types.BudgetSpent)) == int(private)
    chatted.log.close()


def test_an_owners_highest_rank_is_one_at_least() -> None:
    with pytest.raises(UsageError, match="is 0"):
        Settings(rank=0)
