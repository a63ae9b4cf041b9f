"""A personal layer: trained on the device for itself alone, on top of the release, and seen by nothing but its answers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from clients.conftest import answered, back_up, settled
from fedloop_clients import Agent
from fedloop_clients.device import Settings
from fedloop_events import types
from fedloop_events.blobs import tensors
from fedloop_events.blobs.tensors import Array
from fedloop_events.envelope import Record, decode
from fedloop_events.errors import UsageError
from fedloop_events.locations import BLOB_FOLDER
from fedloop_events.logs.port import read_all
from fedloop_tasks.causal.examples import Judged
from fedloop_tasks.personal import LEAST_EXAMPLES, Trained, trained
from fedloop_tasks.turns import Turn
from msgspec.structs import replace

if TYPE_CHECKING:
    from clients.chatted import Chatted

HELLO = [{"role": "user", "content": "where is my card"}]


@pytest.fixture(scope="module")
def chatted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chatted]:
    from clients.chatted import chatted_in  # imports torch

    made = chatted_in(tmp_path_factory.mktemp("chatted"))
    yield made
    made.log.close()


@pytest.fixture
def agent(chatted: Chatted, tmp_path: Path) -> Iterator[Agent]:
    """Of a person who wants the same answer to everything."""
    chatted.train(1)
    with chatted.enrol(tmp_path / "store", epsilon=None) as agent:
        teach(agent)
        yield agent


def teach(agent: Agent, count: int = 2 * LEAST_EXAMPLES) -> list[str]:
    """The ids of feedback that corrects answers, and is masked."""
    found = []
    for n in range(count):
        asked = agent.record_answer([{"role": "user", "content": f"where is card {'x' * n}"}], "here")
        found.append(agent.feedback(asked.response_id, correction="yes, we have sent it").feedback_id)
    agent.run(until=settled)
    return found


def holds(agent: Agent) -> dict[str, Array]:
    """The tensors that the device answers with."""
    with agent._in_force.to_chat() as (model, _):
        return model.arrays()


def same(one: dict[str, Array], other: dict[str, Array]) -> bool:
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def next_release(chatted: Chatted, *, same_factors: bool) -> None:
    random = np.random.default_rng(5)
    changed = {
        name: values if name.endswith(".A") and same_factors else values + random.normal(0, 0.01, values.shape).astype(np.float32)
        for name, values in chatted.arrays.items()
    }
    chatted.arrays = changed
    chatted.release()


def test_what_is_fixed_in_a_release_stays_as_it_is(chatted: Chatted, agent: Agent) -> None:
    """As in releases of `stack` and `residual`."""
    random, before = np.random.default_rng(7), chatted.arrays
    name = next(name[:-2] for name in before if name.endswith(".A"))
    out, into = len(before[f"{name}.B"]), before[f"{name}.A"].shape[1]
    fixed = {f"{name}.fixed.A": (3, into), f"{name}.fixed.B": (out, 3)}
    chatted.arrays = before | {key: random.normal(0, 0.01, shape).astype(np.float32) for key, shape in fixed.items()}
    chatted.release()
    agent.run(until=settled)
    assert agent.personalise().kept
    held = holds(agent)
    assert all(np.array_equal(held[key], chatted.arrays[key]) for key in fixed)
    assert not same(held, chatted.arrays)
    chatted.arrays = before


def test_it_is_trained_on_the_persons_examples_and_answers_on_top_of_the_release(chatted: Chatted, agent: Agent) -> None:
    assert same(holds(agent), chatted.arrays)
    before = agent.chat(HELLO)
    found = agent.personalise()
    assert found.kept
    assert (found.layer.examples, found.layer.held_out) == (16, 4)
    assert found.layer.loss_after < found.layer.loss_before
    now = holds(agent)
    assert all(np.array_equal(now[name], chatted.arrays[name]) == name.endswith(".A") for name in now)
    assert agent.chat(HELLO).confidence != before.confidence
    assert agent.chat(HELLO).release == before.release
    assert agent.status().personal == found.layer


def test_another_process_answers_with_it_too(chatted: Chatted, agent: Agent) -> None:
    agent.personalise()
    with Agent.open(agent._device.store.path.parent, settings=Settings(model_dir=chatted.base_folder)) as other:
        assert same(holds(other), holds(agent))


def test_removed_the_release_answers_alone(chatted: Chatted, agent: Agent) -> None:
    agent.personalise()
    assert not same(holds(agent), chatted.arrays)
    assert agent.forget_personal()
    assert same(holds(agent), chatted.arrays)
    assert agent.status().personal is None
    assert not agent.forget_personal()
    assert agent._device.store.rows("SELECT name FROM kept WHERE name LIKE 'personal%'") == []


# --- nothing of it leaves the device ---


def test_an_update_has_the_same_bytes_with_and_without_it(chatted: Chatted, agent: Agent, tmp_path: Path) -> None:
    """Two copies of one device, of which one has a layer and has just answered with it."""
    back_up(agent, tmp_path / "copy")
    agent.personalise()
    assert not same(holds(agent), chatted.arrays)
    (plain, layered) = (update(chatted, each) for each in (tmp_path / "copy", agent._device.store.path.parent))
    assert plain == layered
    assert not same(holds(agent), chatted.arrays)


def update(chatted: Chatted, store: Path) -> dict[str, bytes]:
    """What the device in `store` computes for a round without privacy: the same round for every one."""
    from fedloop_tasks.table import program_of

    upload = [name for name in chatted.arrays if name.endswith(".B")]
    opened = replace(chatted.opened("phone", mechanism=None), number=7, upload=upload, hyperparameters={"lora_lr": 0.01})
    with Agent.open(store, settings=Settings(model_dir=chatted.base_folder)) as device:
        device.chat(HELLO)
        examples = device._device.examples()
        assert len(examples) == 2 * LEAST_EXAMPLES
        with device._device.models.borrowed(chatted.model.spec) as held, held.holding(chatted.arrays) as model:
            found = program_of(opened.strategy).compute(model, examples, opened)
    return {name: values.tobytes() for name, values in found.items()}


def test_a_round_is_answered_with_the_release_and_not_with_the_layer(chatted: Chatted, agent: Agent) -> None:
    """With a learning rate of 0 what comes back is what training began with."""
    agent.personalise()
    agent.chat(HELLO)
    upload = [name for name in chatted.arrays if name.endswith(".B")]
    opened = replace(
        chatted.opened(agent.identity.client_id, mechanism=None),
        upload=upload,
        max_upload_bytes=10**6,
        hyperparameters={"lora_lr": 0.0},
    )
    chatted.server.append(opened)
    chatted.instruct(agent.identity.client_id, opened)
    agent.run(until=answered())
    (submitted,) = [each for each in chatted.appended(types.UpdateSubmitted) if each.client_id == agent.identity.client_id]
    sent = tensors.decode(chatted.blobs.get(submitted.content.arrays["arrays"], max_bytes=10**6))
    assert same(dict(sent), {name: chatted.arrays[name] for name in upload})


@pytest.mark.parametrize("form", ["peft", "gguf"])
def test_an_export_has_the_same_bytes_with_and_without_it(agent: Agent, form: str) -> None:
    def files() -> dict[str, bytes]:
        found = agent.export(form)[1].files
        return {name: each if isinstance(each, bytes) else b"".join(map(bytes, each.chunks)) for name, each in found.items()}

    before = files()
    agent.personalise()
    agent.chat(HELLO)
    assert files() == before


def test_nothing_of_it_is_in_the_log_or_the_blobs(chatted: Chatted, agent: Agent) -> None:
    def all_there_is() -> tuple[list[Record], dict[str, bytes]]:
        blobs = {str(each): each.read_bytes() for each in (chatted.folder / BLOB_FOLDER).rglob("*") if each.is_file()}
        return [*read_all(chatted.log)], blobs

    before = all_there_is()
    agent.personalise()
    agent.chat(HELLO)
    agent.run(until=settled)
    now = all_there_is()
    added = [decode(each) for each in now[0][len(before[0]) :]]
    assert [each for each in added if not isinstance(each, types.ClientSeen)] == []
    assert now[1] == before[1]


# --- harm, releases, retraction ---


def test_it_is_kept_only_if_the_loss_on_examples_that_it_was_not_trained_with_falls(chatted: Chatted) -> None:
    """Here those are the opposite of the others."""
    count = 2 * LEAST_EXAMPLES
    order = np.random.default_rng(0).permutation(count)
    good = [bool(n % 5) for n in np.argsort(order)]
    turns = (Turn("user", "where is my card"),)
    chatted.model.load(chatted.arrays)
    assert trained(chatted.model, [Judged(turns, "yes, we have sent it", each) for each in good]).change == {}
    chatted.model.load(chatted.arrays)
    alike = trained(chatted.model, [Judged(turns, "yes, we have sent it", good=True)] * count)
    assert alike.change
    assert alike.loss_after < alike.loss_before


def test_one_that_is_no_better_takes_the_place_of_an_earlier_one_by_none(agent: Agent) -> None:
    agent.personalise()
    device, arrays = agent._device, holds(agent)
    assert device.spec is not None
    found = trained_to_nothing()
    assert not device.personal.keep(device.spec, "r", arrays, found, device.personal.retracted()).kept
    assert agent.status().personal is None


def trained_to_nothing() -> Trained:
    return Trained({}, 16, 4, 1.0, 2.0)


def test_it_acts_on_a_later_release_with_the_same_factors_and_rests_on_another(chatted: Chatted, agent: Agent) -> None:
    found = agent.personalise()
    change = {name: values - chatted.arrays[name] for name, values in holds(agent).items()}
    next_release(chatted, same_factors=True)
    assert agent.status().personal == found.layer
    for name, values in holds(agent).items():
        assert np.allclose(values - chatted.arrays[name], change[name], atol=1e-6)
    next_release(chatted, same_factors=False)
    status = agent.status().personal
    assert status == replace(found.layer, acts=False)
    assert status is not None
    assert "it rests" in status.sentence
    assert same(holds(agent), chatted.arrays)
    assert agent.personalise().kept
    assert not same(holds(agent), chatted.arrays)


def test_taking_back_feedback_that_it_may_have_seen_forgets_it(chatted: Chatted, agent: Agent) -> None:
    agent.personalise()
    (late,) = teach(agent, 1)
    agent.retract(late)
    assert agent.status().personal is not None
    first = agent._device.store.rows("SELECT feedback_id FROM feedback ORDER BY number")[0][0]
    agent.retract(first)
    assert agent.status().personal is None
    assert same(holds(agent), chatted.arrays)


def test_a_store_from_a_backup_forgets_it_when_the_log_retracts_what_it_has_seen(
    chatted: Chatted, agent: Agent, tmp_path: Path
) -> None:
    agent.personalise()
    back_up(agent, tmp_path / "backup")
    agent.retract(agent._device.store.rows("SELECT feedback_id FROM feedback ORDER BY number")[0][0])
    agent.run(until=settled)
    with Agent.open(tmp_path / "backup", settings=Settings(model_dir=chatted.base_folder)) as restored:
        assert restored.status().personal is None
        assert same(holds(restored), chatted.arrays)


def test_feedback_that_is_taken_back_while_it_is_trained_leaves_no_layer(agent: Agent) -> None:
    device, before = agent._device, agent._device.personal.retracted()
    found = agent.personalise()
    agent.retract(device.store.rows("SELECT feedback_id FROM feedback ORDER BY number")[0][0])
    assert found.kept
    assert device.spec is not None
    with pytest.raises(UsageError, match="was taken back while the personal layer was trained"):
        device.personal.keep(device.spec, "r", holds(agent), trained_to_nothing(), before)


def test_too_few_examples_are_refused_with_how_many_there_must_be(chatted: Chatted, tmp_path: Path) -> None:
    with chatted.enrol(tmp_path / "store") as agent:
        teach(agent, 3)
        with pytest.raises(UsageError, match="a personal layer needs 10 examples, and this device has 3"):
            agent.personalise()
        assert agent.status().personal is None
