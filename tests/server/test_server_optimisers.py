"""Rounds whose mean change is a gradient for an optimiser on the server, and what that remembers."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from devices import OPEN_CONFIG, World
from fedloop_events import types
from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_events.errors import BlobError, TensorError
from fedloop_events.locations import locate
from fedloop_server.aggregation import releases
from fedloop_server.config import ServerConfig
from fedloop_server.operations.sweeping import DAY_S, sweep
from fedloop_server.rounds.rebuild import rebuild
from fedloop_tasks.causal.plan import CHAT_SERVER_RATES, ChatPlan
from fedloop_tasks.classification.plan import ClassificationPlan
from fedloop_tasks.programs.optimisers import ADAPTIVITY, FIRST_DECAY, OPTIMISERS, SECOND_DECAY
from fedloop_tasks.task import STATE
from msgspec.structs import replace
from numpy.typing import NDArray

Values = NDArray[np.float64]
RATES = {"fedavgm": 0.5, "fedadam": 0.1}


def config_of(strategy: str | None) -> ServerConfig:
    rate = RATES.get(strategy or "")
    return replace(OPEN_CONFIG, plan=ClassificationPlan(epsilon=None, strategy=strategy, server_lr=rate))  # type: ignore[arg-type]


def world_of(folder: Path, strategy: str, rounds: int = 3) -> World:
    world = World(folder, config_of(strategy))
    for name in ("ann", "bob"):
        world.device(name, epsilon=None)
    world.request(rounds)
    return world


def run(world: World, rounds: int, config: ServerConfig | None = None) -> None:
    with world.serving():
        world.server(config=config).run(rounds=rounds)


def blobs_of(world: World) -> list[types.BlobRef]:
    return [each.blob for each in world.releases.releases.values()]


def momentum(start: Values, changes: list[Values], rate: float) -> list[Values]:
    """By torch."""
    parameter = torch.nn.Parameter(torch.tensor(start))
    optimiser, made = torch.optim.SGD([parameter], lr=rate, momentum=FIRST_DECAY), []
    for change in changes:
        parameter.grad = -torch.tensor(change)
        optimiser.step()
        made.append(parameter.detach().numpy().copy())
    return made


def adam(start: Values, changes: list[Values], rate: float) -> list[Values]:
    """By the moments' closed forms."""
    made, now = [], start
    for count in range(1, len(changes) + 1):
        past = list(enumerate(reversed(changes[:count])))
        first = np.sum([(1 - FIRST_DECAY) * FIRST_DECAY**age * change for age, change in past], axis=0)
        second = np.sum([(1 - SECOND_DECAY) * SECOND_DECAY**age * change**2 for age, change in past], axis=0)
        now = now + rate * first / (np.sqrt(second) + ADAPTIVITY)
        made.append(now)
    return made


def mean_changes(world: World, name: str) -> list[Values]:
    """What the devices changed on average, round by round; they weigh the same."""
    changes = []
    for opened in world.payloads(types.RoundOpened):
        base = tensors.decode(world.blobs.get(opened.base))[name].astype(np.float64)
        trained = [device.trained(opened)[name].astype(np.float64) for device in world.devices.values()]
        changes.append(np.mean(trained, axis=0) - base)
    return changes


@pytest.mark.parametrize("strategy", OPTIMISERS)
def test_three_rounds_are_three_steps_of_the_optimiser(tmp_path: Path, strategy: str) -> None:
    world = world_of(tmp_path / "deployment", strategy)
    run(world, 3)
    first, *made = [tensors.decode(world.blobs.get(ref)) for ref in blobs_of(world)]
    oracle = {"fedavgm": momentum, "fedadam": adam}[strategy]
    for name, start in first.items():
        if name.endswith(".A"):
            assert all(each[name].tobytes() == start.tobytes() for each in made)
            continue
        wanted = oracle(start.astype(np.float64), mean_changes(world, name), RATES[strategy])
        for got, expected in zip(made, wanted, strict=True):
            np.testing.assert_allclose(got[name], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("strategy", OPTIMISERS)
def test_devices_get_the_model_alone_and_anyone_can_make_the_releases_again(tmp_path: Path, strategy: str) -> None:
    world = world_of(tmp_path / "deployment", strategy)
    run(world, 3)
    first, *made = blobs_of(world)
    names = list(tensors.decode(world.blobs.get(first)))
    for ref in made:
        assert list(tensors.decode(world.blobs.get(ref))) == names
        whole = releases.get(world.blobs, ref)
        assert {name.split(".")[1] for name in whole if name.startswith(STATE)} == {strategy}
        assert {name.split(".", 3)[3] for name in whole if name.startswith(STATE)} == {n for n in names if not n.endswith(".A")}
    for deep in (False, True):
        rebuilt = rebuild(world.log, world.blobs, deep=deep)
        assert [each.identical for each in rebuilt.steps] == [True] * (3 if deep else 1)


def test_what_another_server_takes_over_goes_on_where_it_was(tmp_path: Path) -> None:
    """The state is a function of the log: a server that starts anew between all rounds makes the same bytes."""
    one = world_of(tmp_path / "one", "fedadam")
    run(one, 3)
    other = world_of(tmp_path / "other", "fedadam")
    for _ in range(3):
        run(other, 1)
    assert [each.sha256 for each in blobs_of(one)] == [each.sha256 for each in blobs_of(other)]


def test_a_round_of_another_program_forgets(tmp_path: Path) -> None:
    world = world_of(tmp_path / "deployment", "fedadam", rounds=2)
    run(world, 1)
    run(world, 1, config_of("fedavg"))
    *_, last = blobs_of(world)
    assert not [name for name in releases.get(world.blobs, last) if name.startswith(STATE)]
    assert world.blobs.get(last) == b"".join(map(bytes, tensors.encode(tensors.decode(world.blobs.get(last)))))
    assert rebuild(world.log, world.blobs, deep=True).identical


def test_what_never_changes_stays_bit_by_bit() -> None:
    base = {"head.bias": np.array([0.1, -3.0], np.float32)}
    for program in OPTIMISERS.values():
        opened = types.RoundOpened(
            origin="tests", epoch=1, run_id="main", round_id="r0001", request_id="q", number=1, model="default",
            base_release="0000-x", base=types.BlobRef("0" * 64, 1), strategy=program.name, cohort=[], quorum=1, deadline_s=1.0,
            upload=["head.bias"], max_upload_bytes=10**6, max_update_norm=1e6,
        )  # fmt: skip
        made: Mapping[str, NDArray[Any]] = base
        for _ in range(3):
            made = program.apply(opened, made, base)
        assert made["head.bias"].tobytes() == base["head.bias"].tobytes()


def test_a_state_that_is_lost_or_another_ones_is_an_error(tmp_path: Path) -> None:
    blobs, arrays = BlobStore(tmp_path), {"a": np.ones(2, np.float32), f"{STATE}p.0.a": np.full(2, 2, np.float32)}
    ref = releases.put(blobs, arrays)
    assert list(releases.get(blobs, ref)) == list(arrays)
    assert b"".join(map(bytes, releases.encode(arrays))) == blobs.get(ref)
    other = arrays | {f"{STATE}p.0.a": np.full(2, 3, np.float32)}
    assert b"".join(map(bytes, releases.encode(other))) != blobs.get(ref), "a release's hash covers what is remembered"
    sha256, _, _ = tensors.metadata(blobs.get(ref))["state"].partition(" ")
    (tmp_path / sha256[:2] / sha256[2:]).unlink()
    with pytest.raises(BlobError):
        releases.get(blobs, ref)
    with pytest.raises(TensorError):
        releases.get(blobs, blobs.put(tensors.encode({"a": arrays["a"]}, {"state": "nonsense"})))


def test_the_plan_sets_the_servers_learning_rate_for_its_optimisers_alone() -> None:
    assert ClassificationPlan(strategy="fedadam").hyperparameters["server_lr"] == 0.01
    assert ClassificationPlan(strategy="fedavgm", server_lr=0.3).hyperparameters["server_lr"] == 0.3
    assert "server_lr" not in ClassificationPlan(server_lr=0.3).hyperparameters
    assert ChatPlan().hyperparameters["server_lr"] == CHAT_SERVER_RATES["fedadam"] < 0.01
    assert ChatPlan(server_lr=0.3).hyperparameters["server_lr"] == 0.3
    assert f"and {CHAT_SERVER_RATES['fedadam']:g}." in ChatPlan.MEANING["server_lr"]
    assert "and 0.01." in ClassificationPlan.MEANING["server_lr"]
    assert "fedadam" in ClassificationPlan(strategy="fedadam", sampling_rate=1.0, steps=1, nominal_examples=100).mechanisms()


def test_a_sweep_keeps_what_a_program_remembers(tmp_path: Path) -> None:
    """No event names it: the release's file does."""
    world = world_of(tmp_path / "deployment", "fedadam", rounds=2)
    run(world, 2)
    before = set(world.blobs.all())
    world.blobs.put([b"nobody's"])
    at, later = locate(tmp_path / "deployment"), time.time() + 30 * DAY_S
    swept = sweep(at, world.log, world.blobs, None, older_than_s=7 * DAY_S, now=lambda: later)
    assert (swept.removed, set(world.blobs.all())) == (1, before)
    assert rebuild(world.log, world.blobs).identical
