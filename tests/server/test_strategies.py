"""A federated LoRA round over the log, and what it refuses to call a success."""

from __future__ import annotations

from pathlib import Path

import fleet
import msgspec
import numpy as np
import pytest
from fedloop_events.blobs import tensors
from fedloop_events.errors import UsageError
from fedloop_events.types import InstructionSent, Mechanism, RoundClosed, RoundOpened, StepCollected, UpdateSubmitted
from fedloop_server.aggregation.merging import merge
from fedloop_server.flower.grid import LogGrid
from fedloop_server.flower.instructing import instructions
from fedloop_server.flower.journal import ReplayError, start_epoch
from fedloop_server.flower.strategies import Durable
from fleet import Deployment, regression_app, serving
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import FedAvg

BASE = {
    "lora.5.query.A": np.full((2, 3), 5, np.float32),
    "lora.5.query.B": np.full((3, 2), 6, np.float32),
    "head.weight": np.full((4, 3), 7, np.float32),
    "head.bias": np.full(4, 8, np.float32),
}
FFA = ["lora.5.query.B", "head.weight", "head.bias"]
SHIFTS = (0.5, -0.25, 4.0)


def shifting_app(upload: list[str]) -> ClientApp:
    """Each client adds its own shift to what it uploads."""
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        number = int(context.node_config["number"])
        base = message.content.array_records["arrays"]
        arrays = ArrayRecord({name: Array(base[name].numpy() + np.float32(SHIFTS[number])) for name in upload})
        metrics = MetricRecord({"num-examples": 1 + number})
        return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)

    return app


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    return Deployment(tmp_path)


def open_round(deployment: Deployment, *, quorum: int = 3, upload: list[str] = FFA, max_norm: float = 100.0) -> RoundOpened:
    return RoundOpened(
        origin=fleet.ORIGIN,
        epoch=1,
        run_id="main",
        round_id="r0001",
        request_id="q",
        number=1,
        model="default",
        base_release="0000-x",
        base=deployment.blobs.put(tensors.encode(BASE)),
        strategy="ffa",
        cohort=[f"client-{number}" for number in range(3)],
        quorum=quorum,
        deadline_s=20.0,
        upload=upload,
        max_upload_bytes=10_000,
        max_update_norm=max_norm,
    )


def round_grid(deployment: Deployment, opened: RoundOpened) -> LogGrid:
    epoch = start_epoch(deployment.log, deployment.writer, run_id="main", server_id="server")
    return LogGrid(deployment.log, deployment.blobs, deployment.writer, run_id="main", epoch=epoch, round=opened)


def collect(deployment: Deployment, opened: RoundOpened) -> LogGrid:
    """Run the round to its end; its grid."""
    grid = round_grid(deployment, opened)
    grid.close_round(instructions(grid, opened, deployment.blobs), timeout=20)
    return grid


class NamesItsBase:
    """Makes a simulated client name the base release, as agents do."""

    def __init__(self, deployment: Deployment, number: int, upload: list[str]) -> None:
        self.client = deployment.client(number, shifting_app(upload))
        append = self.client._writer.append
        self.client._writer.append = lambda *payloads: append(  # type: ignore[method-assign]
            *(
                msgspec.structs.replace(payload, base_release="0000-x") if isinstance(payload, UpdateSubmitted) else payload
                for payload in payloads
            )
        )


def test_a_round_merges_what_counts_by_its_weights(deployment: Deployment) -> None:
    opened = open_round(deployment)
    with serving(*(NamesItsBase(deployment, number, FFA).client for number in range(3))):
        collect(deployment, opened)
    (closed,) = deployment.of(RoundClosed)
    assert [(each.client_id, each.weight) for each in closed.accepted] == [(f"client-{n}", 1.0 + n) for n in range(3)]
    shift = np.average(SHIFTS, weights=[1, 2, 3])
    merged = merge(deployment.blobs, opened, BASE, closed.accepted)
    for name, values in BASE.items():
        np.testing.assert_allclose(merged[name], values + shift * (name in FFA), rtol=1e-6)


def test_the_base_release_is_sent_by_the_name_of_its_blob(deployment: Deployment) -> None:
    opened = open_round(deployment)
    for number in range(3):
        NamesItsBase(deployment, number, FFA)
    grid = round_grid(deployment, opened)
    grid.push_messages(instructions(grid, opened, deployment.blobs))
    sent = deployment.of(InstructionSent)
    assert [each.client_id for each in sent] == opened.cohort
    assert all(list(each.content.arrays.values()) == [opened.base] and each.round_id == "r0001" for each in sent)
    assert list(deployment.blobs.all()) == [opened.base.sha256]


def test_an_update_beyond_the_norm_bound_does_not_count(deployment: Deployment) -> None:
    opened = open_round(deployment, max_norm=2.0)  # 22 values, each shifted by 0.5, 0.25 or 4
    with serving(*(NamesItsBase(deployment, number, FFA).client for number in range(3))):
        grid = collect(deployment, opened)
    assert grid.collected is not None
    refused = {each.client_id: each.reason for each in grid.collected.excluded}
    assert refused == {"client-0": "refused.norm", "client-2": "refused.norm"}


def test_a_private_round_hears_no_client_that_ran_no_mechanism(deployment: Deployment) -> None:
    mechanism = Mechanism(sampling_rate=0.1, noise_multiplier=1.0, clip_norm=1.0, steps=1, divisor=1.0)
    opened = msgspec.structs.replace(open_round(deployment), mechanism=mechanism)
    with serving(*(NamesItsBase(deployment, number, FFA).client for number in range(3))):
        grid = collect(deployment, opened)
    assert grid.collected is not None
    assert grid.collected.accepted == []
    assert {each.reason for each in grid.collected.excluded} == {"refused.wrong-mechanism"}


def test_a_second_round_does_not_hear_the_replies_to_the_first(deployment: Deployment) -> None:
    opened = open_round(deployment)
    with serving(*(NamesItsBase(deployment, number, FFA).client for number in range(3))):
        for number in (1, 2):
            opened = msgspec.structs.replace(opened, round_id=f"r{number:04d}", number=number)
            collect(deployment, opened)
    first, second = deployment.of(RoundClosed)
    assert len(first.accepted) == len(second.accepted) == 3
    assert not {each.update_id for each in first.accepted} & {each.update_id for each in second.accepted}


def test_a_round_of_two_steps_is_closed_by_the_last_and_replays_as_it_was(deployment: Deployment) -> None:
    opened = open_round(deployment)

    def run(grid: LogGrid) -> list[str]:
        replies = grid.send_and_receive(instructions(grid, opened, deployment.blobs), timeout=20)
        replies += grid.close_round(instructions(grid, opened, deployment.blobs), timeout=20)
        return [each.metadata.message_id for each in replies]

    with serving(*(NamesItsBase(deployment, number, FFA).client for number in range(3))):
        first = run(round_grid(deployment, opened))
    assert len(set(first)) == 6
    assert [type(each) for each in deployment.of(StepCollected)] == [StepCollected, RoundClosed]
    events = len(deployment.payloads())
    assert run(round_grid(deployment, opened)) == first
    assert len(deployment.payloads()) == events + 1, "a replay appends nothing but its epoch"
    grid = round_grid(deployment, opened)
    with pytest.raises(ReplayError, match="another kind of step"):
        grid.close_round(instructions(grid, opened, deployment.blobs), timeout=20)


def test_another_grid_is_refused_and_so_is_a_cohort_that_is_not_enrolled(deployment: Deployment) -> None:
    opened = open_round(deployment)
    with pytest.raises(UsageError):
        Durable(FedAvg()).configure_train(1, ArrayRecord(), ConfigRecord(), object())  # type: ignore[arg-type]
    with pytest.raises(UsageError, match="not enrolled"):
        instructions(round_grid(deployment, opened), opened, deployment.blobs)


def test_a_recorded_aggregate_of_nothing_is_nothing(deployment: Deployment) -> None:
    deployment.client(0, regression_app())
    grid, strategy = deployment.grid(), Durable(FedAvg(min_train_nodes=1, min_available_nodes=1))
    grid.push_messages(strategy.configure_train(1, fleet.initial_arrays(), ConfigRecord(), grid))
    assert strategy.aggregate_train(1, []) == (None, None)
