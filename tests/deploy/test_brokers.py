"""The clusters that other tests and developers rest on: what they promise of data, processes, ports and folders."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import brokers
import pytest
from brokers import Cluster
from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import NewTopic
from fedloop_events.errors import UnreachableError, UsageError

pytestmark = pytest.mark.kafka


def write(cluster: Cluster, topic: str, value: bytes) -> None:
    """Raises `AssertionError` if it was not acknowledged."""
    failed: list[object] = []
    configuration = {"bootstrap.servers": cluster.bootstrap, "enable.idempotence": True, "message.timeout.ms": 60_000}
    producer = Producer({**configuration, "log_level": 0})
    producer.produce(topic, value, on_delivery=lambda error, _: failed.append(error) if error else None)
    assert producer.flush(70) == 0
    assert not failed


def read(cluster: Cluster, topic: str, count: int) -> list[bytes | None]:
    consumer = Consumer({"bootstrap.servers": cluster.bootstrap, "group.id": "none", "log_level": 0})
    consumer.assign([TopicPartition(topic, 0, 0)])
    try:
        return [message.value() for message in consumer.consume(count, timeout=30)]
    finally:
        consumer.close()


def answers(cluster: Cluster) -> bool:
    host, _, port = cluster.bootstrap.rpartition(":")
    try:
        socket.create_connection((host, int(port)), timeout=10).close()
    except ConnectionRefusedError:
        return False
    return True


def make(cluster: Cluster, topic: str, replicas: int) -> None:
    cluster.admin().create_topics([NewTopic(topic, 1, replicas)])[topic].result(30)


@pytest.mark.slow
def test_what_was_acknowledged_is_there_after_a_kill_and_in_the_next_start(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        make(cluster, "t", 1)
        write(cluster, "t", b"1")
        cluster.restart(1)
        write(cluster, "t", b"2")
        cluster.stop()
        assert not answers(cluster)
    with Cluster(tmp_path) as again:
        assert again.bootstrap == cluster.bootstrap
        assert read(again, "t", 2) == [b"1", b"2"]


@pytest.mark.slow
def test_three_brokers_go_on_without_one_of_them(tmp_path: Path) -> None:
    with Cluster(tmp_path, nodes=3) as cluster:
        make(cluster, "t", 3)
        for node in (1, 2):
            cluster.kill(node)
            write(cluster, "t", b"%d" % node)
            cluster.restart(node)
        assert read(cluster, "t", 2) == [b"1", b"2"]


@pytest.mark.slow
def test_brokers_do_not_outlive_a_test_run_that_was_killed(tmp_path: Path) -> None:
    program = "import brokers, os, pathlib, sys\nwith brokers.Cluster(pathlib.Path(sys.argv[1])): os.kill(os.getpid(), 9)"
    path = {"PYTHONPATH": str(Path(brokers.__file__).parent)}
    assert (
        subprocess.run([sys.executable, "-c", program, str(tmp_path)], env={**os.environ, **path}, check=False).returncode == -9
    )
    cluster, deadline = Cluster(tmp_path), time.monotonic() + 60
    while answers(cluster) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not answers(cluster)


@pytest.mark.slow
def test_a_paused_broker_is_silent_until_it_is_resumed(tmp_path: Path) -> None:
    with Cluster(tmp_path) as cluster:
        cluster.pause(1)
        with pytest.raises(KafkaException):
            cluster.admin().list_topics(timeout=1)
        cluster.resume(1)
        assert len(cluster.admin().list_topics(timeout=30).brokers) == 1


def test_another_kind_of_cluster_or_folder_is_refused_and_left_alone(tmp_path: Path) -> None:
    Cluster(tmp_path / "one")
    before = (tmp_path / "one" / "cluster.json").read_bytes()
    for change in ({"nodes": 3}, {"secure": True}, {"port": 1}):
        with pytest.raises(UsageError, match="holds a cluster of 1 nodes, not secure"):
            Cluster(tmp_path / "one", **change)
    assert (tmp_path / "one" / "cluster.json").read_bytes() == before
    tmp_path.chmod(0o755)
    with pytest.raises(UsageError, match="is not empty"):
        Cluster(tmp_path)
    assert stat.S_IMODE(tmp_path.stat().st_mode) == 0o755


def test_a_port_that_is_taken_is_refused(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(UsageError, match="is taken"):
        Cluster(tmp_path, port=taken.getsockname()[1])


def test_a_process_id_that_has_become_another_process_s_is_not_touched(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as other:
        (tmp_path / "node-1").mkdir()
        (tmp_path / "node-1" / "pid").write_text(str(other.pid))
        cluster.kill(1)
        cluster.stop()
        assert other.poll() is None
        other.communicate(b"\n")
        assert other.returncode == 0


@pytest.mark.slow
def test_a_broker_that_cannot_start_says_why(tmp_path: Path) -> None:
    cluster = Cluster(tmp_path)
    port = int(cluster.bootstrap.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", port)), pytest.raises(UnreachableError) as raised, cluster:
        pass
    assert "ended" in raised.value.message
    assert "Address already in use" in raised.value.cause


def test_folders_and_secrets_are_private(secure_kafka: Cluster) -> None:
    assert stat.S_IMODE(secure_kafka.folder.stat().st_mode) == 0o700
    for path in (secure_kafka.properties(), secure_kafka.properties("private"), secure_kafka.folder / "ca" / "ca.key"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    passwords = [
        line.partition("=")[2]
        for path in (secure_kafka.folder / "users").iterdir()
        for line in path.read_text().splitlines()
        if line.startswith("sasl.password=")
    ]
    logged = (secure_kafka.folder / "node-1" / "broker.log").read_text()
    shown = subprocess.run(["ps", "-ww", "-e", "-o", "args="], capture_output=True, text=True, check=True).stdout
    assert passwords
    assert not [password for password in passwords if password in logged + shown]


@pytest.mark.slow
def test_the_command_line_starts_and_stops_and_says_what_to_try(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, brokers.__file__, *arguments, "--dir", str(tmp_path / "run")]
        return subprocess.run(command, capture_output=True, text=True, timeout=200, check=False)

    assert run("stop").stdout == "no broker was started\n"
    port = str(next(iter(brokers._free_ports([], 1))))
    try:
        started = run("start", "--port", port)
        assert (started.returncode, started.stderr) == (0, "")
        assert f"Kafka answers at 127.0.0.1:{port}\ntry: fedloop demo --log 'kafka://127.0.0.1:{port}'" in started.stdout
        pid = int((tmp_path / "run" / "node-1" / "pid").read_text())
        assert run("start", "--port", port).stdout == started.stdout
        assert int((tmp_path / "run" / "node-1" / "pid").read_text()) == pid
        refused = run("start", "--port", port, "--secure")
        assert refused.returncode == 1
        assert refused.stderr.startswith("error: ")
    finally:
        assert "its data stay" in run("stop").stdout
    assert not answers(Cluster(tmp_path / "run"))
