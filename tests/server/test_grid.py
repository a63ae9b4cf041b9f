"""Flower's own strategies over the log: unmodified, resumable, and the same bytes whatever happens on the way."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import fleet
import numpy as np
import pytest
from fedloop_events.envelope import Event
from fedloop_events.errors import FencedError, UsageError
from fedloop_events.logs import sqlite
from fedloop_events.logs.port import read_all
from fedloop_events.types import (
    InstructionSent,
    NodesListed,
    ResultRecorded,
    RoundDeclined,
    StepCollected,
    UpdateRefused,
    UpdateSubmitted,
)
from fedloop_server.flower import grid as grid_module
from fedloop_server.flower.admission import Admission
from fedloop_server.flower.grid import LogGrid
from fedloop_server.flower.journal import ReplayError
from fedloop_server.flower.strategies import Durable
from fleet import Deployment, as_bytes, initial_arrays, regression_app, serving
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp.strategy import (
    DifferentialPrivacyServerSideFixedClipping,
    FedAdam,
    FedAvg,
    Krum,
    Strategy,
)
from simulated import SimulatedClient

fork = multiprocessing.get_context("fork")
STRATEGIES: dict[str, Callable[[], Strategy]] = {
    "FedAvg": lambda: FedAvg(fraction_train=0.5, min_train_nodes=3),
    "FedAdam": lambda: FedAdam(fraction_train=0.5, eta=0.5),
    "Krum": lambda: Krum(num_malicious_nodes=1),
    "DP": lambda: Durable(DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.1, 5.0, 4)),
}


@pytest.fixture
def deployment(tmp_path: Path) -> Deployment:
    return Deployment(tmp_path)


def run(grid: LogGrid, strategy: Strategy, *, rounds: int = 2, timeout: float = 20) -> ArrayRecord:
    return strategy.start(grid, initial_arrays(), num_rounds=rounds, timeout=timeout).arrays


@pytest.mark.parametrize("name", STRATEGIES)
def test_an_unmodified_strategy_runs_and_its_replay_without_clients_gives_the_same_bytes(
    name: str, deployment: Deployment
) -> None:
    clients = [deployment.client(number, regression_app()) for number in range(4)]
    with serving(*clients):
        first = run(deployment.grid(), STRATEGIES[name]())
    assert np.isfinite(first["weights"].numpy()).all()
    assert first["weights"].numpy().any()
    events = len(deployment.payloads())
    assert as_bytes(run(deployment.grid(), STRATEGIES[name]())) == as_bytes(first)
    assert len(deployment.payloads()) == events + 1, "a replay appends nothing but its epoch"


def test_fedavg_over_the_log_is_the_weighted_mean(deployment: Deployment) -> None:
    with serving(*(deployment.client(number, regression_app()) for number in range(3))):
        arrays = run(deployment.grid(), FedAvg(), rounds=1)
    weights = np.array([10, 11, 12])
    assert arrays["bias"].numpy() == pytest.approx((weights * np.arange(3)).sum() / weights.sum(), rel=1e-6)


def test_the_same_bytes_come_out_whatever_the_order_of_arrival(tmp_path: Path) -> None:
    results = set()
    for attempt in range(8):
        order = random.Random(attempt).sample(range(4), 4)
        condition, answered = threading.Condition(), [0]

        def in_turn(
            number: int,
            order: Sequence[int] = order,
            condition: threading.Condition = condition,
            answered: list[int] = answered,
        ) -> None:
            with condition:
                assert condition.wait_for(lambda: order[answered[0] % 4] == number, timeout=20)
                answered[0] += 1
                condition.notify_all()

        (tmp_path / str(attempt)).mkdir()
        deployment = Deployment(tmp_path / str(attempt))
        with serving(*(deployment.client(number, regression_app(in_turn)) for number in range(4))):
            arrays = run(deployment.grid(), FedAdam(eta=0.5), rounds=2)
        results.add(tuple(as_bytes(arrays).values()))
    assert len(results) == 1


class DyingLog(sqlite.SqliteLog):
    """Kills its process around the append with number `at`, after or before it."""

    def __init__(self, path: Path, at: int, *, after: bool) -> None:
        super().__init__(path)
        self.left, self.after = at, after

    def append(self, events: Sequence[Event]) -> None:
        self.left -= 1
        if self.left == 0 and not self.after:
            os.kill(os.getpid(), signal.SIGKILL)
        super().append(events)
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)


def serve_forever(clients: list[SimulatedClient]) -> None:
    threads = [threading.Thread(target=client.run, args=(threading.Event(),)) for client in clients]
    for thread in threads:
        thread.start()


def run_and_die(deployment: Deployment, strategy: Callable[[], Strategy], at: int, after: bool) -> None:
    grid = deployment.grid(server_id=f"server-{at}")
    grid._journal._log = DyingLog(deployment.log.path, at, after=after)
    run(grid, strategy())


@pytest.mark.slow
@pytest.mark.parametrize("name", ["FedAdam", "DP"])
def test_a_server_killed_at_any_step_resumes_with_the_same_bytes_and_asks_nobody_twice(name: str, tmp_path: Path) -> None:
    def strategy() -> Strategy:
        return (
            FedAdam(eta=0.5) if name == "FedAdam" else Durable(DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.0, 5.0, 3))
        )

    results, died = set(), 0
    for at in range(1, 30):
        (tmp_path / str(at)).mkdir()
        deployment = Deployment(tmp_path / str(at))
        enrolled = [deployment.client(number, regression_app()) for number in range(3)]
        clients = fork.Process(target=serve_forever, args=(enrolled,), daemon=True)
        clients.start()
        server = fork.Process(target=run_and_die, args=(deployment, strategy, at, at % 2 == 0))
        server.start()
        server.join(120)
        assert server.exitcode in (0, -signal.SIGKILL)
        died += server.exitcode != 0
        try:
            arrays = run(deployment.grid(server_id="resumed"), strategy())
        finally:
            clients.kill()
            clients.join()
        results.add(tuple(as_bytes(arrays).values()))
        asked = [(sent.step, sent.client_id) for sent in deployment.of(InstructionSent)]
        assert len(asked) == len(set(asked)) == 12
        assert len(deployment.of(UpdateSubmitted)) == 12
        if server.exitcode == 0:
            break
    assert died >= 10
    assert len(results) == 1


def test_noise_is_secret_and_its_result_is_what_a_resumed_run_gets(deployment: Deployment) -> None:
    def strategy() -> Strategy:
        return DifferentialPrivacyServerSideFixedClipping(FedAvg(fraction_evaluate=0.0), 1.0, 5.0, 3)

    with serving(*(deployment.client(number, regression_app()) for number in range(3))):
        recorded = run(deployment.grid(), Durable(strategy()), rounds=1)
        assert as_bytes(run(deployment.grid(), Durable(strategy()), rounds=1)) == as_bytes(recorded)
        # Without a record the noise is another one: it is no function of the log.
        assert as_bytes(run(deployment.grid(), strategy(), rounds=1)) != as_bytes(recorded)
    assert len(deployment.of(ResultRecorded)) == 1


def test_a_replay_that_decides_otherwise_names_the_event(deployment: Deployment) -> None:
    with serving(*(deployment.client(number, regression_app()) for number in range(3))):
        run(deployment.grid(), FedAvg(), rounds=1)
    first = next(record for record in read_all(deployment.log) if record.type == InstructionSent.type_name)
    with pytest.raises(ReplayError, match=first.id):
        FedAvg().start(deployment.grid(), initial_arrays(), train_config=ConfigRecord({"lr": 0.2}), num_rounds=1)
    with pytest.raises(ReplayError, match="another kind of step 0"):
        deployment.grid().record(RecordDict)


def test_a_later_epoch_stops_the_server_and_what_it_said_late_counts_for_nothing(deployment: Deployment) -> None:
    with serving(*(deployment.client(number, regression_app()) for number in range(3))):
        old = deployment.grid(server_id="old")
        nodes = old.get_node_ids()
        new = deployment.grid(server_id="new")
        message = Message(RecordDict({"arrays": initial_arrays()}), nodes[0], "train")
        with pytest.raises(FencedError, match="new"):
            old.push_messages([message])
        assert new.get_node_ids() == nodes
        # The fenced server's instruction holds the id of this step; the one that counts is made under another.
        (reply,) = new.send_and_receive([message], timeout=20)
    assert reply.has_content()
    assert [sent.epoch for sent in deployment.of(InstructionSent)] == [1, 2]
    assert len(deployment.of(UpdateSubmitted)) == 1


def test_an_exception_of_the_app_declines_by_its_type_alone(deployment: Deployment) -> None:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        raise ValueError("a user's secret words")

    with serving(deployment.client(0, regression_app()), deployment.client(1, regression_app()), deployment.client(2, app)):
        arrays = run(deployment.grid(), FedAvg(fraction_evaluate=0.0), rounds=1)
    assert arrays["weights"].numpy().any()
    (declined,) = deployment.of(RoundDeclined)
    assert (declined.reason, declined.detail) == ("app-failed", "ValueError")
    (excluded,) = deployment.of(StepCollected)[0].excluded
    assert (excluded.client_id, excluded.reason) == ("client-2", "declined.app-failed")
    assert b"secret" not in b"".join(path.read_bytes() for path in deployment.folder.glob("log.sqlite*"))


def answering(content: Callable[[RecordDict], RecordDict]) -> ClientApp:
    app = ClientApp()

    @app.train()
    def train(message: Message, context: Context) -> Message:
        return Message(content(message.content), reply_to=message)

    return app


def reply_with(arrays: dict[str, np.ndarray], **metrics: float | list[float]) -> RecordDict:
    record = ArrayRecord({name: Array(values) for name, values in arrays.items()})
    values: dict[str, int | float | list[int] | list[float]] = {"num-examples": 5, "loss": 0.5, **metrics}
    return RecordDict({"arrays": record, "metrics": MetricRecord(values)})


GOOD = {"weights": np.ones(6, np.float32), "bias": np.zeros((), np.float32)}
POISON: dict[str, tuple[str, Callable[[RecordDict], RecordDict]]] = {
    "nan": ("not-finite", lambda _: reply_with(GOOD | {"bias": np.array(np.nan, np.float32)})),
    "inf": ("not-finite", lambda _: reply_with(GOOD | {"bias": np.array(-np.inf, np.float32)})),
    "float64": ("wrong-tensors", lambda _: reply_with({name: values.astype(np.float64) for name, values in GOOD.items()} | {})),
    "shape": ("wrong-tensors", lambda _: reply_with(GOOD | {"weights": np.ones((3, 2), np.float32)})),
    "renamed": ("wrong-tensors", lambda _: reply_with({"w": GOOD["weights"], "bias": GOOD["bias"]})),
    "reordered": ("wrong-tensors", lambda _: reply_with(dict(reversed(GOOD.items())))),
    "no arrays": ("wrong-records", lambda _: RecordDict({"metrics": MetricRecord({"num-examples": 5, "loss": 0.5})})),
    "two records": ("wrong-records", lambda _: RecordDict({**reply_with(GOOD), "more": ArrayRecord({"a": Array(np.ones(1))})})),
    "negative weight": ("wrong-weight", lambda _: reply_with(GOOD, **{"num-examples": -9})),
    "zero weight": ("wrong-weight", lambda _: reply_with(GOOD, **{"num-examples": 0})),
    "huge weight": ("wrong-weight", lambda _: reply_with(GOOD, **{"num-examples": 2**50})),
    "list weight": ("wrong-weight", lambda _: reply_with(GOOD, **{"num-examples": [1.0]})),
    "other metrics": ("inconsistent", lambda _: reply_with(GOOD, extra=1.0)),
    "other list": ("inconsistent", lambda _: reply_with(GOOD, loss=[0.5, 0.5])),
    "unchanged": ("unchanged", lambda content: reply_with({n: a.numpy() for n, a in content.array_records["arrays"].items()})),
}


@pytest.mark.parametrize("name", POISON)
def test_a_poisoned_reply_is_refused_with_its_reason_and_the_round_goes_on(name: str, deployment: Deployment) -> None:
    reason, poison = POISON[name]
    honest = [deployment.client(number, regression_app()) for number in range(2)]
    with serving(*honest, deployment.client(2, answering(poison))):
        admission = Admission(refuse_unchanged=True)
        arrays = run(deployment.grid(admission=admission), FedAvg(fraction_evaluate=0.0), rounds=1)
    (refused,) = deployment.of(UpdateRefused)
    assert (refused.client_id, refused.reason) == ("client-2", reason)
    (closed,) = deployment.of(StepCollected)
    assert [each.reason for each in closed.excluded] == [f"refused.{reason}"]
    assert {each.client_id for each in closed.accepted} == {"client-0", "client-1"}
    assert np.isfinite(arrays["weights"].numpy()).all()


def test_a_reply_that_weighs_more_than_the_run_allows_is_refused(deployment: Deployment) -> None:
    honest = [deployment.client(number, regression_app()) for number in range(2)]
    greedy = answering(lambda _: reply_with(GOOD, **{"num-examples": 1_001}))
    with serving(*honest, deployment.client(2, greedy)):
        run(deployment.grid(admission=Admission(max_weight=1_000)), FedAvg(fraction_evaluate=0.0), rounds=1)
    (refused,) = deployment.of(UpdateRefused)
    assert (refused.client_id, refused.reason) == ("client-2", "wrong-weight")
    assert "num-examples must be one number above 0 and at most 1,000" in refused.detail


def test_metrics_that_are_not_finite_never_leave_the_client(deployment: Deployment) -> None:
    nan = answering(lambda _: reply_with(GOOD, loss=float("nan")))
    with serving(deployment.client(0, regression_app()), deployment.client(1, nan)):
        run(deployment.grid(), FedAvg(fraction_evaluate=0.0), rounds=1)
    (declined,) = deployment.of(RoundDeclined)
    assert declined.reason == "unusable-answer"


def test_a_dp_strategy_skips_the_round_when_a_client_is_missing(deployment: Deployment) -> None:
    deployment.client(2, regression_app())  # enrolled, and silent
    with serving(*(deployment.client(number, regression_app()) for number in range(2))):
        strategy = Durable(DifferentialPrivacyServerSideFixedClipping(FedAvg(fraction_evaluate=0.0), 1.0, 5.0, 3))
        result = strategy.start(deployment.grid(), initial_arrays(), num_rounds=1, timeout=0.5)
    assert not result.arrays
    assert [each.reason for each in deployment.of(StepCollected)[0].excluded] == ["silent"]


def test_the_time_that_passed_while_the_server_was_away_has_passed(
    deployment: Deployment, monkeypatch: pytest.MonkeyPatch
) -> None:
    deployment.client(0, regression_app())
    grid = deployment.grid()
    message = Message(RecordDict({"arrays": initial_arrays()}), fleet.node_id(0), "train")
    grid.push_messages([message])
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() + 3600 * 10**9)
    (reply,) = deployment.grid(server_id="resumed").send_and_receive([message], timeout=3600)
    assert reply.has_error()
    assert reply.error.reason == "silent"


def test_a_clock_that_stepped_back_does_not_lengthen_the_wait(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    deployment.client(0, regression_app())
    message = Message(RecordDict({"arrays": initial_arrays()}), fleet.node_id(0), "train")
    deployment.grid().push_messages([message])
    real = time.time_ns
    monkeypatch.setattr(time, "time_ns", lambda: real() - 3600 * 10**9)
    (reply,) = deployment.grid(server_id="resumed").send_and_receive([message], timeout=0.2)
    assert reply.has_error()


def test_one_content_for_many_clients_is_one_blob(deployment: Deployment) -> None:
    for number in range(5):
        deployment.client(number, regression_app())
    content = RecordDict({"arrays": initial_arrays()})
    grid = deployment.grid()
    grid.push_messages([Message(content, node, "train") for node in grid.get_node_ids()])
    assert len(list(deployment.blobs.all())) == 1
    assert len({sent.content.arrays["arrays"].sha256 for sent in deployment.of(InstructionSent)}) == 1


def test_waiting_for_nodes_does_not_flood_the_log(deployment: Deployment, monkeypatch: pytest.MonkeyPatch) -> None:
    grid, polled = deployment.grid(), []
    assert grid.get_node_ids() == []
    assert grid.get_node_ids() == []
    enrol = threading.Timer(0.2, lambda: polled.append(deployment.client(0, regression_app())))
    enrol.start()
    assert grid.get_node_ids() == [fleet.node_id(0)], "the third answer waits until there is another one"
    enrol.join()
    monkeypatch.setattr(grid_module, "POLL_S", 0.0)
    assert len(grid.get_node_ids()) == len(grid.get_node_ids()) == 1, "the wait is bounded"
    replayed = deployment.grid(server_id="resumed")
    assert [len(replayed.get_node_ids()) for _ in range(5)] == [0, 0, 1, 1, 1]
    assert len(deployment.of(NodesListed)) == 5


def test_an_unknown_node_or_message_is_a_usage_error(deployment: Deployment) -> None:
    grid = deployment.grid()
    with pytest.raises(UsageError, match="not enrolled"):
        grid.push_messages([Message(RecordDict(), 7, "train")])
    with pytest.raises(UsageError, match="has pushed"):
        grid.pull_messages(["0" * 32])


def test_pulling_gives_what_is_there_and_a_replay_gives_it_again(deployment: Deployment) -> None:
    client = deployment.client(0, regression_app())
    grid = deployment.grid()
    message = Message(RecordDict({"arrays": initial_arrays()}), fleet.node_id(0), "train")
    pushed = grid.push_messages([message])
    assert grid.pull_messages(pushed) == []
    client.step()
    assert [reply.has_content() for reply in grid.pull_messages(pushed)] == [True]
    replayed = deployment.grid(server_id="resumed")
    assert replayed.push_messages([message]) == pushed
    assert replayed.pull_messages(pushed) == []
    assert [reply.metadata.reply_to_message_id for reply in replayed.pull_messages(pushed)] == pushed


def test_only_the_addressed_client_is_heard_and_only_once(deployment: Deployment) -> None:
    clients = [deployment.client(number, regression_app()) for number in range(2)]
    grid = deployment.grid()
    (pushed,) = grid.push_messages([Message(RecordDict({"arrays": initial_arrays()}), fleet.node_id(0), "train")])
    clients[0].step()
    (update,) = deployment.of(UpdateSubmitted)
    other = UpdateSubmitted(
        origin=fleet.ORIGIN, client_id="client-1", seq=1, run_id=fleet.RUN, instruction_id=pushed, content=update.content
    )
    clients[1]._writer.append(other)
    content = RecordDict({"m": MetricRecord({"x": 1})})
    second = UpdateSubmitted(
        origin=fleet.ORIGIN,
        client_id="client-0",
        seq=9,
        run_id=fleet.RUN,
        instruction_id=pushed,
        content=grid._writer.content(content),
    )
    clients[0]._writer.append(second, second)
    (reply,) = grid.pull_messages([pushed])
    assert reply.has_content()
    assert {(each.client_id, each.reason) for each in deployment.of(UpdateRefused)} == {("client-0", "duplicate")}
    assert [update.client_id for update in deployment.of(StepCollected)[0].accepted] == ["client-0"]
