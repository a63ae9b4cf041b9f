"""Two that claim to be one, on Kafka: servers are told apart by epochs, clients by signatures, processes by connections."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Final

import msgspec
import pytest
import samples
from devices import CONFIG, SPEC, World, evaluate, initial_arrays
from fedloop_events import ids, parts, topics, types
from fedloop_events.envelope import Record
from fedloop_events.errors import FencedError
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.folds.rounds import RoundsView
from fedloop_events.locations import DeploymentLocation
from fedloop_events.logs.kafka import KafkaLog
from fedloop_events.logs.port import read_all
from fedloop_server.deployment import create_deployment, open_deployment
from fedloop_server.rounds import actions
from fedloop_server.rounds.loop import Server
from fedloop_server.rounds.rebuild import rebuild
from server.test_server import Killed, Torn

CLIENTS: Final = ("ann", "bob", "cem")
ANSWER_S: Final = 60.0
FENCED: Final = FencedError.exit_status
fork, spawn = multiprocessing.get_context("fork"), multiprocessing.get_context("spawn")


class KafkaWorld(World):
    """A deployment whose log is on Kafka; its blobs stay in the folder."""

    def __init__(self, folder: Path, url: str) -> None:
        self.folder, self.config, self.devices = folder, CONFIG, {}
        self.deployment = create_deployment(
            folder, SPEC, initial_arrays(), CONFIG, DeploymentLocation(url, str(folder / "blobs"))
        )
        self.log, self.blobs, self.writer = self.deployment.log, self.deployment.blobs, self.deployment.writer
        for name in CLIENTS:
            self.device(name)


@pytest.fixture
def world(tmp_path: Path, kafka_url: str) -> Iterator[KafkaWorld]:
    world = KafkaWorld(tmp_path / "deployment", kafka_url)
    with closing(world.log):
        yield world


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + ANSWER_S
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def until_idle(server: Server) -> None:
    while not isinstance(server.step(wait_s=0.0), actions.Wait):
        pass


# --- servers ---------------------------------------------------------------------------------------------------------


def test_a_replaced_server_stops_and_what_it_still_decides_counts_for_nothing(world: KafkaWorld, kafka_url: str) -> None:
    world.request(1)
    with closing(KafkaLog(kafka_url)) as connection:
        old, new = world.server(), world.server(log=connection)
        old.step()
        old.step()
        assert isinstance(old.step(), actions.OpenRound)
        new.step()
        with pytest.raises(FencedError, match="epoch 2"):
            old.step()
        # What it had on its way, under the very ids that the new one will need.
        [opened] = world.payloads(types.RoundOpened)
        origin = opened.origin
        aborted = types.RoundAborted(origin, old.epoch, "main", "r0001", "operator")
        second = msgspec.structs.replace(opened, round_id="r0002", number=2)
        world.log.append([world.writer.event(aborted, id=ids.derived_id(origin, "main", "r0001", "aborted"))])
        world.log.append([world.writer.event(second, id=ids.derived_id(origin, "main", "round", 2))])
        assert world.stale == 2
        with world.serving():
            until_idle(new)
            world.request(1, "q2")
            until_idle(new)
        with pytest.raises(FencedError, match="epoch 2"):
            old.step()
    assert [(each.state, each.participants) for each in world.rounds.rounds.values()] == [("closed", list(CLIENTS))] * 2
    assert [each.status for each in world.releases.releases.values()] == ["published"] * 3
    assert rebuild(world.log, world.blobs, deep=True).identical


def test_servers_that_start_at_once_get_an_epoch_each_and_the_last_one_goes_on(world: KafkaWorld) -> None:
    processes = [_started(world.folder) for _ in range(3)]
    try:
        until(lambda: sum(process.exitcode == FENCED for process in processes) == 2)
        (alive,) = [process for process in processes if process.is_alive()]
        assert world.rounds.epoch >= 3  # one each; who finds its epoch taken goes for the next
        assert world.rounds.server_id.startswith(f"{alive.pid}.")
        world.request(1)
        with world.serving():
            until(lambda: [each.status for each in world.releases.releases.values()] == ["published"] * 2)
        assert alive.is_alive()
    finally:
        _end(*processes)
    assert rebuild(world.log, world.blobs, deep=True).identical


def test_a_server_that_sleeps_through_its_replacement_wakes_up_fenced(world: KafkaWorld) -> None:
    world.request(1)
    process = _started(world.folder)
    try:
        until(lambda: bool(world.payloads(types.InstructionSent)))
        assert process.pid is not None
        os.kill(process.pid, signal.SIGSTOP)
        new = world.server()
        with world.serving():
            until_idle(new)
        before = world.releases
        assert [each.status for each in before.releases.values()] == ["published"] * 2
        os.kill(process.pid, signal.SIGCONT)
        until(lambda: process.exitcode is not None)
        assert process.exitcode == FENCED
    finally:
        _end(process)
    assert world.releases == before
    assert world.rounds.epoch == new.epoch == 2
    assert [each.participants for each in world.rounds.rounds.values()] == [list(CLIENTS)]
    assert rebuild(world.log, world.blobs, deep=True).identical


@pytest.mark.parametrize("at", [3, 11], ids=["opening", "closing"])
def test_a_decision_that_was_torn_between_its_events_is_made_anew_by_the_next_server(
    world: KafkaWorld, kafka_url: str, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    monkeypatch.setattr(parts, "PART_BYTES", 1)
    world.request(1)
    with closing(KafkaLog(kafka_url)) as connection, world.serving():
        with pytest.raises(Killed):
            until_idle(world.server(log=Torn(connection, at)))
        until_idle(world.server())
    assert [(each.state, each.participants) for each in world.rounds.rounds.values()] == [("closed", list(CLIENTS))]
    assert len(world.payloads(types.InstructionSent)) == len(CLIENTS)
    torn, kind = ("opening", types.CohortListed) if at == 3 else ("closing", types.RepliesListed)
    assert len(world.payloads(kind)) > len(CLIENTS), f"the {torn} was begun twice"
    assert rebuild(world.log, world.blobs, deep=True).identical


def _serve(folder: Path) -> None:
    deployment = open_deployment(folder)
    server = Server(deployment.log, deployment.blobs, deployment.writer, deployment.config, evaluate=evaluate)
    try:
        server.run()
    except FencedError:
        os._exit(FENCED)


def _started(folder: Path) -> multiprocessing.process.BaseProcess:
    process = spawn.Process(target=_serve, args=(folder,))
    process.start()
    return process


def _end(*processes: multiprocessing.process.BaseProcess) -> None:
    for process in processes:
        process.kill()
        process.join()


# --- clients ---------------------------------------------------------------------------------------------------------


class Texts:
    """Who said how much feedback, as far as it counts."""

    topics = (topics.FEEDBACK,)

    def __init__(self) -> None:
        self.seqs: dict[str, list[int]] = {}

    def apply(self, record: Record, payload: types.Payload) -> None:
        if isinstance(payload, types.FeedbackRecorded):
            self.seqs.setdefault(payload.client_id, []).append(payload.seq)


def test_of_two_clients_that_claim_one_identity_the_first_to_enrol_is_heard(kafka_url: str) -> None:
    with closing(KafkaLog(kafka_url, create=True)) as log:
        log.append([samples.signed(samples.created()), samples.signed(samples.enrolled())])
        children = [fork.Process(target=_claim, args=(log, name)) for name in ("device-1", "impostor", "other impostor")]
        for child in children:
            child.start()
        for child in children:
            child.join(ANSWER_S)
        assert [child.exitcode for child in children] == [0, 0, 0]
    views = []
    for _ in range(2):
        with closing(KafkaLog(kafka_url)) as log:
            identities = Identities()
            who = Reader(log, identities)
            who.catch_up()
            reader = Reader(log, Texts(), identities=identities)
            reader.catch_up()
            views.append((dict(identities.clients), reader.fold.seqs, who.refused, reader.refused))
    assert views[0] == views[1]
    clients, seqs, not_enrolled, refused = views[0]
    assert clients["device-1"].public_key == samples.key("device-1").public_key
    assert seqs == {"device-1": list(range(CLAIMS))}
    assert (not_enrolled, refused) == (2, 2 * CLAIMS)


CLAIMS: Final = 30


def _claim(log: KafkaLog, name: str) -> None:
    """Say under one name, with a key of one's own, what any client says."""
    if name != "device-1":
        log.append([samples.signed(samples.enrolled(by=name), by=name)])
    for number in range(CLAIMS):
        # The very ids of each other.
        log.append([samples.signed(samples.feedback(number), by=name, number=number)])
    log.close()


# --- processes -------------------------------------------------------------------------------------------------------


@contextmanager
def _forked(count: int, work: Callable[[int], None]) -> Iterator[None]:
    children = [fork.Process(target=work, args=(number,)) for number in range(count)]
    for child in children:
        child.start()
    yield
    for child in children:
        child.join(ANSWER_S)
    assert [child.exitcode for child in children] == [0] * count


def test_processes_forked_from_one_producer_append_and_read_beside_it(kafka_url: str) -> None:
    log = KafkaLog(kafka_url, create=True)

    def append(name: str) -> None:
        for number in range(1, 101, 4):
            log.append([samples.signed(samples.feedback(each, name)) for each in range(number, number + 4)])

    def work(number: int) -> None:
        append(f"child-{number}")
        mine = [record for record in read_all(log, (topics.FEEDBACK,)) if record.key == f"child-{number}"]
        assert len(mine) == 100
        log.close()

    log.append([samples.signed(samples.epoch())])
    assert len(list(read_all(log))) == 1
    with _forked(3, work):
        append("parent")
    records = list(read_all(log, (topics.FEEDBACK,)))
    for name in ("parent", "child-0", "child-1", "child-2"):
        said = [msgspec.json.decode(record.data)["seq"] for record in records if record.key == name]
        assert said == list(range(1, 101))
    assert len(records) == 400
    reader = Reader(log, RoundsView())
    assert reader.catch_up() == 1
    log.close()
