"""`fedloop doctor` on what is really broken: it names what, says what to do, ends with 1, and shows no secret."""

from __future__ import annotations

import json
import re
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import samples
from brokers import Cluster
from confluent_kafka.admin import (
    AclBinding,
    AclOperation,
    AclPermissionType,
    AdminClient,
    NewPartitions,
    ResourcePatternType,
    ResourceType,
)
from fedloop_cli.doctor import broker_version, diagnosis, findings
from fedloop_cli.main import run
from fedloop_cli.provisioning.certificates import make_ca
from fedloop_clients.agent import Agent
from fedloop_events import types
from fedloop_events.errors import UnreachableError
from fedloop_events.logs.kafka import KafkaLog, rights
from fedloop_events.logs.kafka.rights import User
from fedloop_events.logs.kafka.settings import KafkaSettings
from fedloop_server.config import ServerConfig
from fedloop_server.deployment import create_deployment
from fedloop_tasks.classification.plan import ClassificationPlan
from gateway.harness import serving
from kafka_partitions import written

Doctor = Callable[..., tuple[int, dict[str, Any]]]


@pytest.fixture
def doctor(capsys: pytest.CaptureFixture[str]) -> Doctor:
    """Run it; its exit status and its document. Whatever it finds, it prints no secret and no traceback."""

    def examine(*arguments: str | Path) -> tuple[int, dict[str, Any]]:
        status = run(["doctor", *map(str, arguments), "--json"])
        printed = capsys.readouterr()
        assert "Traceback" not in printed.out + printed.err
        document: dict[str, Any] = json.loads(printed.out)
        assert status == (1 if document["failed"] else 0), document
        for each in document["findings"]:
            assert each["level"] == "ok" or each["hint"], each
        return status, document

    return examine


@pytest.fixture
def deployment(tmp_path: Path) -> Path:
    import numpy as np

    spec = types.ClassificationSpec("none", "0" * 64, ["ham", "spam"], rank=2, alpha=4.0, targets=["query"], layers=1)
    arrays = {
        "lora.0.query.A": np.ones((2, 3), np.float32),
        "lora.0.query.B": np.zeros((3, 2), np.float32),
        "head.weight": np.zeros((2, 3), np.float32),
        "head.bias": np.zeros(2, np.float32),
    }
    create_deployment(tmp_path / "deployment", spec, arrays, ServerConfig(plan=ClassificationPlan())).log.close()
    return tmp_path / "deployment"


def said(document: dict[str, Any], level: str, words: str) -> str:
    """The hint of the one finding of this level that holds the words."""
    (found,) = [each for each in document["findings"] if each["level"] == level and words in each["what"]]
    return str(found["hint"])


# --- this machine and its folders -------------------------------------------------------------------------------------


def test_a_whole_deployment_and_a_whole_device_have_nothing_wrong(doctor: Doctor, deployment: Path, tmp_path: Path) -> None:
    Agent.enrol(str(deployment), tmp_path / "store", key_from="file").close()
    for arguments in ((deployment,), ("--store", tmp_path / "store"), ()):
        status, document = doctor(*arguments)
        assert (status, document["failed"]) == (0, 0)
        said(document, "ok", "with the fix of the WAL reset")
    status, document = doctor("--store", tmp_path / "store")
    said(document, "ok", "its key opens it")
    said(document, "ok", "log.sqlite opens")


def test_a_key_that_others_can_read_is_named_with_what_to_do(doctor: Doctor, deployment: Path, tmp_path: Path) -> None:
    key = deployment / "server" / "key.pem"
    key.chmod(0o644)
    status, document = doctor(deployment)
    assert status == 1
    assert said(document, "fail", f"{key} is open to others (mode 0644)") == f"chmod 600 {key}"
    Agent.enrol(str(deployment), tmp_path / "store", key_from="file").close()
    (tmp_path / "store").chmod(0o755)
    (tmp_path / "store" / "store.db").chmod(0o640)
    status, document = doctor("--store", tmp_path / "store")
    assert said(document, "fail", "(mode 0755)") == f"chmod 700 {tmp_path / 'store'}"
    assert said(document, "fail", "(mode 0640)") == f"chmod 600 {tmp_path / 'store' / 'store.db'}"


def test_a_log_or_a_held_out_set_that_others_can_read_is_named_with_what_to_do(doctor: Doctor, deployment: Path) -> None:
    log, held = deployment / "log.sqlite", deployment / "server" / "heldout.json"
    held.touch(mode=0o600)
    assert said(doctor(deployment)[1], "ok", f"{log} is its owner's alone") == ""
    log.chmod(0o644)
    held.chmod(0o640)
    status, document = doctor(deployment)
    assert status == 1
    assert said(document, "fail", f"{log} is open to others (mode 0644)") == f"chmod 600 {log}"
    assert said(document, "fail", f"{held} is open to others (mode 0640)") == f"chmod 600 {held}"


def test_what_is_absent_or_no_log_is_a_finding_and_no_defect(doctor: Doctor, deployment: Path, tmp_path: Path) -> None:
    assert "server init" in said(doctor(tmp_path / "nowhere")[1], "fail", "there is no folder")
    assert "agent enrol" in said(doctor("--store", tmp_path / "nowhere")[1], "fail", "there is no store")
    said(doctor("--log", "ftp://x")[1], "fail", "neither a folder nor a URL")
    (deployment / "log.sqlite").write_bytes(b"nonsense" * 1000)
    said(doctor(deployment)[1], "fail", "is no Fedloop log")
    for name in ("log.sqlite", "log.sqlite-wal", "log.sqlite-shm"):
        (deployment / name).unlink(missing_ok=True)
    assert "from a copy" in said(doctor(deployment)[1], "fail", "the log of the deployment in")


def test_a_clock_that_is_behind_the_log_is_noticed(doctor: Doctor, deployment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hour_ago = time.time() - 3600
    monkeypatch.setattr("fedloop_cli.doctor.findings.time.time", lambda: hour_ago)
    assert "NTP" in said(doctor(deployment)[1], "warn", "s behind the log")


def test_a_stamp_of_the_future_is_named_with_its_author(
    doctor: Doctor, deployment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = time.time_ns
    with monkeypatch.context() as wrong:
        wrong.setattr(time, "time_ns", lambda: right() + 3 * 86_400 * 10**9)
        Agent.enrol(deployment, tmp_path / "wrong", client_id="wrong-clock", key_from="file").close()
    Agent.enrol(deployment, tmp_path / "right", client_id="right-clock", key_from="file").close()
    hint = said(doctor(deployment)[1], "warn", "by 'wrong-clock' at")
    assert "NTP" in hint
    (what,) = [each["what"] for each in doctor(deployment)[1]["findings"] if "wrong-clock" in each["what"]]
    assert "is stamped 259,200 s later than event" in what
    assert "by 'right-clock'" in what


def test_a_full_disk_is_noticed(doctor: Doctor, deployment: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "SCARCE_BYTES", 1 << 62)
    said(doctor(deployment)[1], "warn", "GB free at")
    monkeypatch.setattr(diagnosis, "FULL_BYTES", 1 << 62)
    said(doctor(deployment)[1], "fail", "GB free at")


@pytest.mark.parametrize(
    ("version", "level"),
    [
        ("3.51.3", "ok"),
        ("3.54.1", "ok"),
        ("3.50.7", "ok"),
        ("3.44.6", "ok"),
        ("3.51.2", "fail"),
        ("3.50.6", "fail"),
        ("3.40.1", "fail"),
    ],
)
def test_a_sqlite_without_the_fix_fails(version: str, level: str) -> None:
    assert findings.sqlite("versions", version).level == level


def test_a_check_that_never_ends_or_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis, "GIVE_UP_S", 0.2)
    release = threading.Event()

    def endless() -> Iterator[findings.Finding]:
        yield findings.Finding("x", "ok", "began")
        release.wait()

    def broken() -> Iterator[findings.Finding]:
        yield findings.Finding("x", "ok", "began")
        raise ValueError("the password is hunter2")

    assert [each.level for each in diagnosis._within("x", endless)] == ["ok", "fail"]
    release.set()
    found = list(diagnosis._within("x", broken))
    assert [each.level for each in found] == ["ok", "fail"]
    assert "hunter2" not in str(found)


# --- Kafka ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def log(kafka_url: str) -> str:
    opened = KafkaLog(kafka_url, create=True)
    opened.append([samples.event(samples.created())])
    opened.close()
    return kafka_url


def test_a_development_broker_works_and_its_openness_is_named(doctor: Doctor, log: str) -> None:
    status, document = doctor("--log", log)
    assert status == 0, document
    said(document, "warn", "nothing is encrypted")
    said(document, "warn", "may do everything, also delete the log")
    said(document, "ok", "is a Kafka 4.0 or newer")
    said(document, "ok", "10 of 10 are this user's to see, and as declared")
    said(document, "ok", "this machine's agrees with the log")


def test_topics_that_are_absent_fail_and_partitions_that_were_added_are_named(doctor: Doctor, log: str, kafka: str) -> None:
    said(doctor("--log", f"{log}-absent")[1], "fail", "there is no log")
    name = f"{KafkaSettings.parse(log).prefix}.clients"
    admin = AdminClient({"bootstrap.servers": kafka})
    admin.create_partitions([NewPartitions(name, 2)])[name].result(30)
    status, document = doctor("--log", log)
    assert status == 0
    assert "nothing needs to be done" in said(document, "warn", f"{name} has more partitions than are declared")
    written(kafka, name, 1)
    assert "another prefix" in said(doctor("--log", log)[1], "fail", f"written to {name}-1")


def test_a_broker_that_is_away_fails_at_once_and_by_its_name(doctor: Doctor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    started = time.monotonic()
    assert "is it started" in said(doctor("--log", f"kafka://127.0.0.1:{port}")[1], "fail", f"127.0.0.1:{port} does not answer")
    assert time.monotonic() - started < 5


@pytest.fixture(scope="module")
def agent(secure_kafka: Cluster, tmp_path_factory: pytest.TempPathFactory) -> str:
    """The location of a log for a user with the role agent."""
    bare = f"kafka://{secure_kafka.bootstrap}/doctor"
    admin = f"{bare}?config={secure_kafka.properties()}"
    KafkaLog(admin, create=True).close()
    (granted,) = rights.grant(KafkaSettings.parse(admin), [User("agent", "doctor-agent")], tmp_path_factory.mktemp("users"))
    return f"{bare}?config={granted.properties}"


def test_a_user_with_exactly_a_role_s_rights_is_recognised_on_a_secure_cluster(doctor: Doctor, agent: str) -> None:
    status, document = doctor("--log", agent)
    assert status == 0, document
    said(document, "ok", "doctor-agent has the rights of role agent, and no other")
    said(document, "ok", "6 of 10 are this user's to see")
    said(document, "ok", "the certificate of 127.0.0.1:")
    said(document, "ok", ".properties is its owner's alone")


def test_a_user_with_other_rights_is_given_those_of_a_role_as_the_hint_says(
    doctor: Doctor, secure_kafka: Cluster, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bare = f"kafka://{secure_kafka.bootstrap}/doctor-rights"
    admin = f"{bare}?config={secure_kafka.properties()}"
    assert "server init" in said(doctor("--log", admin)[1], "fail", "there is no log")
    assert run(["init", "kafka", "--log", admin, "--into", str(tmp_path), "--create-user", "agent:doctor-more"]) == 0
    capsys.readouterr()
    more = AclBinding(
        ResourceType.TOPIC,
        "doctor-rights.releases",
        ResourcePatternType.LITERAL,
        "User:doctor-more",
        "*",
        AclOperation.WRITE,
        AclPermissionType.ALLOW,
    )
    secure_kafka.admin().create_acls([more])[more].result(30)
    location = f"{bare}?config={tmp_path / 'doctor-more.properties'}"
    hint = said(doctor("--log", location)[1], "warn", "has the rights of no role")
    (line,) = re.findall(r"`fedloop ([^`]+)`", hint)
    line = line.replace("kafka://HOST:PORT/PREFIX?config=FILE", admin).replace("ROLE:", "agent:")
    assert run([*line.split(), "--into", str(tmp_path)]) == 0
    capsys.readouterr()
    said(doctor("--log", location)[1], "ok", "doctor-more has the rights of role agent, and no other")


def changed(agent: str, folder: Path, **properties: str) -> str:
    bare, _, path = agent.partition("?config=")
    lines = dict(line.split("=", 1) for line in Path(path).read_text().splitlines()) | {
        key.replace("_", "."): value for key, value in properties.items()
    }
    target = folder / "changed.properties"
    target.touch(mode=0o600)
    target.write_text("".join(f"{key}={value}\n" for key, value in lines.items()))
    return f"{bare}?config={target}"


def test_a_wrong_password_is_named_and_not_shown(doctor: Doctor, agent: str, tmp_path: Path) -> None:
    _, document = doctor("--log", changed(agent, tmp_path, sasl_password="hunter2"))
    said(document, "fail", "do not let this user in")
    assert "hunter2" not in json.dumps(document)


def test_a_properties_file_that_others_can_read_fails(doctor: Doctor, agent: str, tmp_path: Path) -> None:
    location = changed(agent, tmp_path)
    (tmp_path / "changed.properties").chmod(0o644)
    assert said(doctor("--log", location)[1], "fail", "is open to others").startswith("chmod 600 ")


def test_a_certificate_that_has_expired_or_soon_will_is_named(doctor: Doctor, agent: str, tmp_path: Path) -> None:
    ca = make_ca(tmp_path / "ca")
    for days, level, words in ((0, "fail", "this client's certificate"), (10, "warn", "this client's certificate")):
        issued = ca.issue(f"client-{days}", [], tmp_path, days=days)
        files = {"ssl_certificate_location": str(issued.certificate), "ssl_key_location": str(issued.key)}
        assert "issue a new one" in said(doctor("--log", changed(agent, tmp_path, **files))[1], level, words)


def test_another_authority_than_the_brokers_is_named(doctor: Doctor, agent: str, tmp_path: Path) -> None:
    location = changed(agent, tmp_path, ssl_ca_location=str(make_ca(tmp_path / "other").certificate))
    assert "authority" in said(doctor("--log", location)[1], "fail", "the certificate of 127.0.0.1:")


# --- a gateway --------------------------------------------------------------------------------------------------------


def test_a_gateway_answers_and_its_certificate_and_clock_are_looked_at(doctor: Doctor, tmp_path: Path) -> None:
    with serving(tmp_path) as served:
        status, document = doctor("--log", served.url)
        assert status == 0
        said(document, "ok", "the certificate of localhost:")
        said(document, "ok", "answers for a deployment")
        said(document, "ok", "this machine's agrees with the gateway")
        other = f"{served.address}?ca={make_ca(tmp_path / 'other').certificate}"
        assert "authority" in said(doctor("--log", other)[1], "fail", "the certificate of localhost:")
    said(doctor("--log", served.url)[1], "fail", "does not answer")


# --- one connection ---------------------------------------------------------------------------------------------------


@pytest.fixture
def answering() -> Iterator[Callable[..., int]]:
    """Start a server that answers the first bytes of one connection with `answer`, under TLS if it is told so; its port."""
    servers: list[socket.socket] = []
    threads: list[threading.Thread] = []

    def start(answer: bytes, tls: ssl.SSLContext | None = None) -> int:
        server = socket.create_server(("127.0.0.1", 0))
        servers.append(server)

        def serve() -> None:
            try:
                accepted, _ = server.accept()
                with accepted, tls.wrap_socket(accepted, server_side=True) if tls is not None else accepted as connection:
                    connection.recv(1000)
                    connection.sendall(answer)
            except OSError:
                pass

        threads.append(threading.Thread(target=serve))
        threads[-1].start()
        return int(server.getsockname()[1])

    yield start
    for server in servers:
        server.close()
    for thread in threads:
        thread.join(10)


def test_a_server_s_expired_certificate_is_named_as_such(answering: Callable[..., int], tmp_path: Path) -> None:
    ca = make_ca(tmp_path / "ca")
    issued = ca.issue("old", ["127.0.0.1"], tmp_path, days=0)
    serving = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    serving.load_cert_chain(issued.certificate, issued.key)
    port = answering(b"", serving)
    with (
        pytest.raises(UnreachableError) as raised,
        findings.connected("127.0.0.1", port, ssl.create_default_context(cafile=ca.certificate)),
    ):
        pass
    assert raised.value.cause == "certificate has expired"


def api_versions(metadata_version: int | None, *, error: int = 0) -> bytes:
    """An ApiVersions answer, version 3, of a broker that knows one request and this `metadata.version`."""
    name = b"metadata.version"
    features = b"\x02" + bytes([len(name) + 1]) + name + struct.pack(">hh", 1, metadata_version or 0) + b"\x00"
    tags = b"\x00" if metadata_version is None else b"\x02\x07\x01x" + b"\x00" + bytes([len(features)]) + features
    body = struct.pack(">ih", 1, error) + b"\x02" + struct.pack(">hhh", 18, 0, 4) + b"\x00" + struct.pack(">i", 0) + tags
    return struct.pack(">i", len(body)) + body


@pytest.mark.parametrize("version", [None, 1, 20, 21, 22, 30, 300])
def test_the_newest_metadata_version_is_read(answering: Callable[..., int], version: int | None) -> None:
    with findings.connected("127.0.0.1", answering(api_versions(version)), None) as connection:
        assert broker_version.metadata_version(connection) == (version or 0)


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
        api_versions(30)[:20],
        api_versions(30, error=35),
        struct.pack(">i", 1 << 30),
        struct.pack(">i", -1),
        struct.pack(">i", 10) + struct.pack(">ih", 1, 0) + b"\xff\xff\xff\xff",
        struct.pack(">i", 12) + struct.pack(">ih", 1, 0) + b"\xff\xff\xff\xff\xff\xff",
    ],
)
def test_what_is_no_broker_is_refused_and_never_waited_for(answering: Callable[..., int], answer: bytes) -> None:
    with findings.connected("127.0.0.1", answering(answer), None) as connection, pytest.raises(UnreachableError):
        broker_version.metadata_version(connection)


@pytest.mark.parametrize(("version", "level"), [(20, "fail"), (21, "warn"), (22, "ok")])
def test_an_old_broker_is_named(answering: Callable[..., int], version: int, level: str) -> None:
    from fedloop_cli.doctor.cluster import _broker

    (found,) = _broker(f"127.0.0.1:{answering(api_versions(version))}", {})
    assert found.level == level
