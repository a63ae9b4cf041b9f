"""The metrics of a real server, as Prometheus scrapes them."""

from __future__ import annotations

import math
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from devices import World, evaluate, evaluation
from fedloop_events import topics, types
from fedloop_events.envelope import encode
from fedloop_events.errors import UsageError
from fedloop_events.ids import new_id
from fedloop_events.logs.port import read_all
from fedloop_server.rounds import actions
from fedloop_server.rounds.loop import Server
from fedloop_server.telemetry import exposition, metrics
from fedloop_server.telemetry.exposition import Address
from fedloop_server.telemetry.metrics import MeteredLog
from fedloop_tasks.task import Evaluate
from prometheus_client.parser import text_string_to_metric_families

Samples = dict[tuple[str, str], float]
"""By name and the value of the only label, or ""."""


class Served:
    """A server, and where it is scraped."""

    def __init__(self, server: Server, log: MeteredLog, port: int) -> None:
        self.server, self.log, self.port = server, log, port

    def get(self, path: str) -> tuple[int, str]:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def scrape(self) -> Samples:
        families = text_string_to_metric_families(self.get("/metrics")[1])
        samples = [sample for family in families for sample in family.samples if family.name.startswith("fedloop_")]
        assert all(len(sample.labels) <= 1 for sample in samples)
        return {(sample.name, next(iter(sample.labels.values()), "")): sample.value for sample in samples}


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    with ExitStack() as stack:
        yield stack


def serve(world: World, stack: ExitStack, evaluate: Evaluate = evaluate) -> Served:
    log = MeteredLog(world.log)
    server = world.server(log=log, evaluate=evaluate)
    port = stack.enter_context(exposition.exposed(metrics.registry(server, log), log, Address("127.0.0.1", 0)))
    return Served(server, log, port)


def step_until_idle(server: Server) -> None:
    while not isinstance(server.step(wait_s=0.0), actions.Wait):
        pass


def test_a_scrape_shows_what_the_log_says_of_two_rounds(tmp_path: Path, stack: ExitStack) -> None:
    world = World(tmp_path / "deployment")
    for name in ("ann", "bob"):
        world.device(name)
    world.device("cem", behave=lambda opened, arrays: "cem-and-what-cem-wrote")
    served = serve(world, stack)
    before = served.scrape()
    assert before["fedloop_epoch", ""] == before["fedloop_rounds", "closed"] == 0
    assert ("fedloop_release_accuracy", "in_force") not in before

    world.request(rounds=2)
    with world.serving():
        step_until_idle(served.server)
    found = served.scrape()
    assert found["fedloop_epoch", ""] == 1
    assert found["fedloop_round_requests_total", "person"] == 1
    assert (found["fedloop_rounds", "closed"], found["fedloop_rounds", "open"], found["fedloop_rounds", "aborted"]) == (2, 0, 0)
    assert found["fedloop_rounds_waiting", ""] == 0
    assert (found["fedloop_updates_counted_total", ""], found["fedloop_exclusions_total", "declined"]) == (4, 2)
    assert (found["fedloop_last_round_participants", ""], found["fedloop_last_round_cohort", ""]) == (2, 3)
    assert found["fedloop_round_seconds_count", ""] == found["fedloop_round_seconds_bucket", "+Inf"] == 2
    assert found["fedloop_upload_bytes_total", ""] == sum(each.bytes_up for each in world.rounds.rounds.values()) > 0
    assert found["fedloop_download_bytes_total", ""] == sum(each.bytes_down for each in world.rounds.rounds.values()) > 0
    assert (found["fedloop_release_number", ""], found["fedloop_releases", "published"]) == (2, 3)
    assert found["fedloop_release_accuracy", "in_force"] == found["fedloop_release_accuracy", "last"] == 0.5
    assert (found["fedloop_clients_enrolled", ""], found["fedloop_clients_available", ""]) == (3, 3)
    ledger = served.server.state.ledger
    assert found["fedloop_budget_share_max", ""] == pytest.approx(ledger.epsilon("ann", 1e-5) / 8)
    assert 0 < found["fedloop_budget_share_max", ""] < 1
    read = {topic: sum(record.topic == topic for record in read_all(world.log)) for topic in topics.ALL}
    assert {topic: found["fedloop_events_read_total", topic] for topic in topics.ALL} == read
    text = served.get("/metrics")[1]
    assert not any(name in text for name in ("ann", "bob", "cem"))


def test_a_metric_that_is_not_finite_has_no_figure(tmp_path: Path, stack: ExitStack) -> None:
    world = World(tmp_path / "deployment")
    for name in ("ann", "bob"):
        world.device(name)
    accuracies = iter([0.5, math.nan])
    served = serve(world, stack, lambda arrays: evaluation(next(accuracies)))
    world.request()
    with world.serving():
        step_until_idle(served.server)
    found = served.scrape()
    assert (found["fedloop_release_accuracy", "in_force"], found["fedloop_releases", "rejected"]) == (0.5, 1)
    assert ("fedloop_release_accuracy", "last") not in found


def test_a_server_started_again_shows_the_same_rounds(tmp_path: Path, stack: ExitStack) -> None:
    world = World(tmp_path / "deployment")
    for name in ("ann", "bob"):
        world.device(name)
    world.request()
    first, second = serve(world, stack), serve(world, stack)
    with world.serving():
        step_until_idle(first.server)
    step_until_idle(second.server)
    before, after = first.scrape(), second.scrape()
    assert after["fedloop_epoch", ""] == before["fedloop_epoch", ""] + 1
    names = (
        "fedloop_rounds",
        "fedloop_round_seconds",
        "fedloop_up",
        "fedloop_down",
        "fedloop_release",
        "fedloop_budget",
        "fedloop_excl",
    )
    same = {key for key in before if key[0].startswith(names)}
    assert {key: after[key] for key in same} == {key: before[key] for key in same}


def test_forged_events_revoked_and_late_clients_are_counted(tmp_path: Path, stack: ExitStack) -> None:
    world = World(tmp_path / "deployment")
    ann = world.device("ann")
    world.device("bob")
    world.writer.append(types.ClientRevoked(ann.origin, "bob", "lost"))
    forged = types.RoundRequested(ann.origin, "main", "forged")
    world.log.append([encode(forged, id=new_id(), time_s=0)])
    served = serve(world, stack)
    served.server.step(wait_s=0.0)
    found = served.scrape()
    assert found["fedloop_events_refused_total", ""] >= 1
    assert (found["fedloop_clients_revoked", ""], found["fedloop_clients_available", ""]) == (1, 1)
    collector = metrics.ServerCollector(served.server, served.log, clock=lambda: time.time() + 3600)
    gauges = {family.name: family.samples for family in collector.collect()}
    assert gauges["fedloop_clients_available"][0].value == 0


def test_health_is_the_loops_and_not_the_http_servers(tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serve(World(tmp_path / "deployment"), stack)
    assert served.get("/healthz")[0] == 503
    served.server.step(wait_s=0.0)
    assert served.get("/healthz") == (200, "ok\n")
    monkeypatch.setattr(exposition, "IDLE_S", -1.0)
    assert served.get("/healthz")[0] == 503
    assert served.get("/")[0] == 404


def test_clients_that_stay_silent_do_not_keep_others_out(
    tmp_path: Path, stack: ExitStack, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert exposition._Handler.timeout == exposition.REQUEST_TIMEOUT_S
    monkeypatch.setattr(exposition._Handler, "timeout", 0.2)
    served = serve(World(tmp_path / "deployment"), stack)
    held = [stack.enter_context(socket.create_connection(("127.0.0.1", served.port))) for _ in range(3 * exposition.MOST_AT_ONCE)]
    for each in held:
        each.settimeout(20)
        assert each.recv(1) == b""
    assert served.get("/metrics")[0] == 200


@pytest.mark.parametrize(
    ("text", "address"),
    [("9464", ("127.0.0.1", 9464)), (":9464", ("127.0.0.1", 9464)), ("0.0.0.0:0", ("0.0.0.0", 0)), ("[::1]:80", ("::1", 80))],
)
def test_an_address_without_a_host_is_on_loopback(text: str, address: tuple[str, int]) -> None:
    assert Address.parse(text) == address


@pytest.mark.parametrize("text", ["", "localhost", "localhost:", "a:b", "1:65536", "localhost:-1", "localhost:\uff11"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="address"):
        Address.parse(text)


def test_a_taken_port_is_an_error_that_says_so(tmp_path: Path, stack: ExitStack) -> None:
    served = serve(World(tmp_path / "deployment"), stack)
    with (
        pytest.raises(UsageError, match="cannot be listened on"),
        exposition.exposed(metrics.registry(served.server, served.log), served.log, Address("127.0.0.1", served.port)),
    ):
        pass
