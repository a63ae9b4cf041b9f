"""What a round costs when training costs nothing: clients in processes of their own over the log, against Flower's own.

In each run every candidate starts anew, runs as many rounds as the other, and drops the first.

`python -m benchmarks.rounds ours|ray FOLDER CLIENTS MEGABYTES ROUNDS [KAFKA]` measures one candidate and prints JSON; KAFKA is
the location of the log, which is a file otherwise.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from fedloop_events.blobs.store import BlobStore
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.logs.kafka import KafkaLog
from fedloop_events.logs.port import EventLog
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_events.signatures import SigningKey
from fedloop_events.types import DeploymentCreated
from fedloop_events.writer import EventWriter
from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from msgspec import Struct

from benchmarks import superlink
from benchmarks.broker import broker
from benchmarks.client import serve
from benchmarks.harness import MIN_RUNS, Row, costs, in_turn, peak_rss_bytes, scratch
from benchmarks.trivial import LIMIT_S, timed_rounds, trivial_app

QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_DEDUP_LOGS": "0", "OMP_NUM_THREADS": "1"}


class Report(Struct, frozen=True):
    """Seconds a round after the first (median), and the most memory that the server's process held."""

    seconds: float
    peak_bytes: int


def rows(quick: bool) -> Iterator[Row]:
    if quick:
        yield from _against_ray(2, 1, 3, None, runs=1)
        return
    yield from _against_ray(2, 1, 12, 1.0)
    yield from _against_ray(10, 1, 12, 1.0)
    yield from _against_ray(10, 10, 8, 0.67)
    yield _against_superlink("round", _ours, 2, 1, 5, 50.0)
    yield _against_superlink("round", _ours, 10, 10, 4, 10.0)
    yield _against_superlink("round on Kafka", _ours_on_kafka, 10, 1, 4, 20.0)


def _against_ray(clients: int, megabytes: int, rounds: int, at_least: float | None, runs: int = MIN_RUNS) -> list[Row]:
    what, peer = f"round, {clients} clients x {megabytes} MB", "Flower simulation on Ray, in memory"
    measured = in_turn([partial(each, clients, megabytes, rounds) for each in (_ours, _ray)], runs=runs)
    times = [(ours.seconds, theirs.seconds) for ours, theirs in measured]
    peaks = [(ours.peak_bytes / 1e6, theirs.peak_bytes / 1e6) for ours, theirs in measured]
    return [costs(what, peer, times, "s", at_least), costs(f"{what}: server's peak memory", peer, peaks, "MB", 2.0)]


def _against_superlink(
    what: str, ours: Callable[[int, int, int], Report], clients: int, megabytes: int, rounds: int, at_least: float
) -> Row:
    def ours_s() -> float:
        return ours(clients, megabytes, rounds).seconds

    def theirs_s() -> float:
        with scratch() as folder:
            return superlink.seconds_a_round(folder, clients, megabytes, rounds)

    peer = "Flower SuperLink and SuperNodes, loopback"
    times = [(mine, theirs) for mine, theirs in in_turn([ours_s, theirs_s], runs=MIN_RUNS)]
    return costs(f"{what}, {clients} clients x {megabytes} MB", peer, times, "s", at_least)


def _ours(clients: int, megabytes: int, rounds: int) -> Report:
    return _measure("ours", clients, megabytes, rounds)


def _ours_on_kafka(clients: int, megabytes: int, rounds: int) -> Report:
    with broker() as bootstrap:
        return _measure("ours", clients, megabytes, rounds, f"kafka://{bootstrap}/bench")


def _ray(clients: int, megabytes: int, rounds: int) -> Report:
    return _measure("ray", clients, megabytes, rounds)


def _measure(candidate: str, clients: int, megabytes: int, rounds: int, *kafka: str) -> Report:
    with scratch() as folder:
        arguments = [candidate, str(folder), str(clients), str(megabytes), str(rounds), *kafka]
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.rounds", *arguments],
            env=os.environ | QUIET,
            capture_output=True,
            text=True,
            check=True,
            timeout=LIMIT_S,
        )
    report: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return Report(report["seconds"], int(report["peak_bytes"]))


# --- what runs -------------------------------------------------------------------------------------------------------


def _open(folder: Path, kafka: str) -> EventLog:
    return KafkaLog(kafka, create=True) if kafka else SqliteLog(folder / "log.sqlite")


def run_ours(folder: Path, clients: int, megabytes: int, rounds: int, kafka: str = "") -> float:
    from fedloop_server.flower.grid import LogGrid
    from fedloop_server.flower.journal import start_epoch

    key = SigningKey.generate()
    log = _open(folder, kafka)
    writer = EventWriter(log, key)
    writer.append(DeploymentCreated(origin="benchmark", public_key=key.public_key))
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=_serve, args=(folder, kafka, number), daemon=True) for number in range(clients)]
    for process in processes:
        process.start()
    try:
        _wait_until_enrolled(log, clients)
        epoch = start_epoch(log, writer, run_id="run", server_id="server")
        grid = LogGrid(log, BlobStore(folder / "blobs"), writer, run_id="run", epoch=epoch)
        return timed_rounds(grid, clients, megabytes, rounds)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _serve(folder: Path, kafka: str, number: int) -> None:
    serve(_open(folder, kafka), BlobStore(folder / "blobs"), number)


def _wait_until_enrolled(log: EventLog, clients: int) -> None:
    reader, deadline = Reader(log, Identities()), time.monotonic() + LIMIT_S
    while len(reader.fold.clients) < clients:
        if time.monotonic() > deadline:
            raise TimeoutError("the clients did not enrol")
        reader.wait(1.0)


def run_ray(folder: Path, clients: int, megabytes: int, rounds: int, kafka: str = "") -> float:
    from flwr.simulation import run_simulation

    server, seconds = ServerApp(), []

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        seconds.append(timed_rounds(grid, clients, megabytes, rounds))

    run_simulation(
        server,
        trivial_app(),
        clients,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": 2, "include_dashboard": False, "log_to_driver": False},
        },
    )
    return float(seconds[0])


def _main(candidate: str, folder: str, clients: str, megabytes: str, rounds: str, kafka: str = "") -> None:
    logging.getLogger("flwr").setLevel(logging.ERROR)
    run = {"ours": run_ours, "ray": run_ray}[candidate]
    seconds = run(Path(folder), int(clients), int(megabytes), int(rounds), kafka)
    with suppress(BrokenPipeError):
        print(json.dumps({"seconds": seconds, "peak_bytes": peak_rss_bytes()}), flush=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
