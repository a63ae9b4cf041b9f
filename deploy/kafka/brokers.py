"""Real Kafka brokers on this machine, for development and tests: `python deploy/kafka/brokers.py start|stop`.

Combined KRaft nodes on loopback, Kafka from Maven's jars (pom.xml). In a secure cluster clients come by SASL_SSL with
SCRAM-SHA-512, brokers and controllers know each other by certificates of the cluster's own authority, and whatever no ACL allows
is denied. An acknowledged record survives the death of a broker's process; on one node it does not survive the loss of power.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import fcntl
import hashlib
import os
import random
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Self

import msgspec
from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient, ScramCredentialInfo, ScramMechanism, UserScramCredentialUpsertion
from fedloop_events.errors import FedloopError, UnreachableError, UsageError
from fedloop_events.files import write_private
from msgspec import Struct

HERE: Final = Path(__file__).resolve().parent
ADMIN: Final = "admin"
"""The super user of a secure cluster."""

HEAP_MB: Final = 320
START_S: Final = 120.0
"""Three JVMs on two busy cores take a minute."""
STOP_S: Final = 20.0
DOWNLOAD_S: Final = 300.0
ANSWER_S: Final = 30.0
# Below the ports that Linux and macOS give to outgoing connections: none of those can take one between its choice and its use.
_PORTS: Final = range(20_000, 32_000)


class _State(Struct, frozen=True, forbid_unknown_fields=True):
    """What a cluster was formatted as; for each node its directory's id and its ports for clients, brokers, controllers."""

    cluster_id: str
    secure: bool
    directories: list[str]
    ports: list[tuple[int, int, int]]


def why_not() -> str:
    """Why no broker can run here, or "" (Kafka's jars are fetched to know)."""
    missing = [name for name, program in (("Java", "java"), ("Maven", "mvn")) if shutil.which(program) is None]
    if "Java" in missing or (missing and not _libs_match()):
        return f"no {' and no '.join(missing)}"
    try:
        _libs()
    except UnreachableError as error:
        return error.message
    return ""


class Cluster:
    """`nodes` brokers whose data, logs, keys and process ids lie in `folder` (mode 0700).

    The same folder is the same cluster: started again it has its data and ports. Nodes are numbered from 1. As a context manager
    it starts, and its processes end with the block, or with the process that is in it; the data stay. Raises `UsageError` if the
    folder holds another kind of cluster.
    """

    def __init__(self, folder: Path, *, nodes: int = 1, secure: bool = False, port: int | None = None) -> None:
        self.folder = folder.absolute()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if any(self.folder.iterdir()) and not (self.folder / "cluster.json").exists():
            raise UsageError(f"{folder} is not empty and holds no cluster", hint="name a new folder")
        self.folder.chmod(0o700)
        self._children: dict[int, subprocess.Popen[bytes]] = {}
        self._guard: subprocess.Popen[bytes] | None = None
        self._admin: AdminClient | None = None
        with _locked(self.folder):
            self._state = _stored(self.folder) or _new(self.folder, nodes, secure, port)
        if (len(self._state.ports), self._state.secure) != (nodes, secure) or port not in (None, self._state.ports[0][0]):
            raise UsageError(
                f"{folder} holds a cluster of {len(self._state.ports)} nodes, {'' if self._state.secure else 'not '}secure, at "
                f"port {self._state.ports[0][0]}",
                hint="start it as that, name another folder, or delete this one",
            )
        self.nodes: Sequence[int] = range(1, nodes + 1)
        self.bootstrap = ",".join(f"127.0.0.1:{client}" for client, _, _ in self._state.ports)

    def __enter__(self) -> Self:
        # It sees the end of its input when this process is gone, however that came.
        stop = [sys.executable, str(HERE / "brokers.py"), "stop", "--dir", str(self.folder)]
        self._guard = subprocess.Popen(
            ["sh", "-c", 'cat > /dev/null; exec "$@" > /dev/null', "guard", *stop], stdin=subprocess.PIPE, start_new_session=True
        )
        try:
            self.start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for node in self.nodes:
            self.kill(node)
        if self._guard is not None:
            self._guard.kill()
            self._guard.communicate()

    def start(self) -> None:
        """Start what does not run; wait until every node answers. Raises `UnreachableError` with the end of the broker's log."""
        with _locked(self.folder):
            classpath = str(_libs() / "*")
            for node in self.nodes:
                self._format(node, classpath)
            for node in self.nodes:
                self._launch(node, classpath)
        self._wait(set(self.nodes))

    def stop(self) -> None:
        """End the nodes in good order; kill what has not ended in time."""
        for node in self.nodes:
            self._signal(node, signal.SIGTERM)
        deadline = time.monotonic() + STOP_S
        while any(map(self._pid, self.nodes)) and time.monotonic() < deadline:
            time.sleep(0.05)
        for node in self.nodes:
            self.kill(node)

    def kill(self, node: int) -> None:
        """End the process as a crash would."""
        self._signal(node, signal.SIGKILL)
        deadline = time.monotonic() + STOP_S
        while self._pid(node) and time.monotonic() < deadline:
            time.sleep(0.01)

    def pause(self, node: int) -> None:
        self._signal(node, signal.SIGSTOP)

    def resume(self, node: int) -> None:
        self._signal(node, signal.SIGCONT)

    def restart(self, node: int) -> None:
        """Start a node that was killed (one that runs is killed first), and wait until it is back among the brokers."""
        self.kill(node)
        with _locked(self.folder):
            self._launch(node, str(_libs() / "*"))
        self._wait({node})

    def properties(self, user: str = ADMIN) -> Path:
        """The client properties (librdkafka's, mode 0600) of a user of a secure cluster, who is made if there is none."""
        path = self.folder / "users" / f"{user}.properties"
        if not path.exists():
            password = secrets.token_urlsafe(32)
            mechanism = ScramCredentialInfo(ScramMechanism.SCRAM_SHA_512, 4096)
            upsertion = UserScramCredentialUpsertion(user, mechanism, password.encode())
            self.admin().alter_user_scram_credentials([upsertion])[user].result(ANSWER_S)
            self._write_properties(user, password)
        return path

    def admin(self) -> AdminClient:
        """A client with all rights, always the same one."""
        if self._admin is None:
            self._admin = self._client(self.bootstrap)
        return self._admin

    def _client(self, bootstrap: str) -> AdminClient:
        lines = self.properties().read_text(encoding="utf-8").splitlines() if self._state.secure else []
        # Brokers that are down are this module's business, and no news.
        quiet = {"log_level": 0, "error_cb": lambda error: None}
        return AdminClient({"bootstrap.servers": bootstrap, **quiet, **dict(line.split("=", 1) for line in lines)})

    def _folder(self, node: int) -> Path:
        return self.folder / f"node-{node}"

    def _format(self, node: int, classpath: str) -> None:
        folder = self._folder(node)
        if (folder / "data" / "meta.properties").exists():
            return
        folder.mkdir(exist_ok=True)
        arguments = [f"-Xmx{HEAP_MB}m", "-cp", classpath, "kafka.tools.StorageTool", "format", "--ignore-formatted"]
        arguments += ["--config", str(self._configure(node)), "--cluster-id", self._state.cluster_id]
        # (directory ids are chosen beforehand, for all nodes are formatted with the same list)
        arguments += ["--initial-controllers", self._controllers(with_ids=True)]
        if self._state.secure:
            arguments += ["--add-scram", f"SCRAM-SHA-512=[name={ADMIN},password={self._admin_password()}]"]
        # In a file, for other users of the machine see the arguments of a process.
        argument_file = folder / "format.arguments"
        write_private(argument_file, "\n".join(f'"{_escaped(each)}"' for each in arguments).encode())
        done = subprocess.run(
            ["java", f"@{argument_file}"], capture_output=True, text=True, errors="replace", timeout=START_S, check=False
        )
        argument_file.unlink()
        if done.returncode:
            raise FedloopError(f"node {node} in {self.folder} cannot be formatted", cause=_tail(done.stdout + done.stderr))

    def _controllers(self, *, with_ids: bool = False) -> str:
        addresses = [f"127.0.0.1:{controller}" for _, _, controller in self._state.ports]
        if with_ids:
            named = enumerate(zip(addresses, self._state.directories, strict=True), 1)
            return ",".join(f"{node}@{address}:{directory}" for node, (address, directory) in named)
        return ",".join(addresses)

    def _configure(self, node: int) -> Path:
        """Write the node's `server.properties`."""
        settings = _settings(self._state, node, self._controllers()) | {"log.dirs": str(self._folder(node) / "data")}
        if self._state.secure:
            from fedloop_cli.provisioning.certificates import make_ca

            authority = make_ca(self.folder / "ca")
            issued = authority.issue(f"broker-{node}", ["127.0.0.1", "localhost"], self._folder(node))
            settings |= _security(len(self.nodes), issued.keystore, authority.certificate)
        path = self._folder(node) / "server.properties"
        write_private(path, "".join(f"{key}={value}\n" for key, value in settings.items()).encode())
        return path

    def _launch(self, node: int, classpath: str) -> None:
        if self._pid(node):
            return
        configuration = self._configure(node)
        command = ["java", f"-Xmx{HEAP_MB}m", f"-Xms{HEAP_MB}m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1"]
        command += ["-Dorg.slf4j.simpleLogger.defaultLogLevel=warn", "-Dorg.slf4j.simpleLogger.showDateTime=true"]
        command += ["-cp", classpath, "kafka.Kafka", str(configuration)]
        with (self._folder(node) / "broker.log").open("wb") as log:
            # A session of its own: Ctrl-C in the terminal is not for the broker.
            child = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)
        self._children[node] = child
        write_private(self._folder(node) / "pid", str(child.pid).encode())

    def _pid(self, node: int) -> int | None:
        """The id of the node's process, if it runs: the number in the file may since be another's."""
        child = self._children.get(node)
        if child is not None:
            return child.pid if child.poll() is None else None
        try:
            pid = int((self._folder(node) / "pid").read_text(encoding="ascii"))
        except (FileNotFoundError, ValueError):
            return None
        shown = subprocess.run(["ps", "-ww", "-o", "args=", "-p", str(pid)], capture_output=True, text=True, check=False)
        return pid if shown.stdout.rstrip().endswith(str(self._folder(node) / "server.properties")) else None

    def _signal(self, node: int, what: signal.Signals) -> None:
        pid = self._pid(node)
        if pid is not None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, what)

    def _wait(self, expected: set[int]) -> None:
        """Until each of the nodes answers for itself (the others go on naming one that died), and knows of them all."""
        deadline = time.monotonic() + START_S
        for node in sorted(expected):
            admin = self._client(f"127.0.0.1:{self._state.ports[node - 1][0]}")
            while not expected <= self._brokers(admin):
                ended = self._pid(node) is None
                if ended or time.monotonic() > deadline:
                    log = self._folder(node) / "broker.log"
                    raise UnreachableError(
                        f"broker {node} of {self.bootstrap} {'ended' if ended else f'did not answer within {START_S:.0f} s'}",
                        cause=_tail(log.read_text(encoding="utf-8", errors="replace")),
                        hint=f"its whole log is {log}",
                    )

    def _brokers(self, admin: AdminClient) -> set[int]:
        try:
            return set(admin.list_topics(timeout=1.0).brokers)
        except KafkaException:
            return set()
        finally:
            time.sleep(0.02)

    def _admin_password(self) -> str:
        path = self.folder / "users" / f"{ADMIN}.properties"
        if not path.exists():
            self._write_properties(ADMIN, secrets.token_urlsafe(32))
        found = dict(line.split("=", 1) for line in path.read_text(encoding="utf-8").splitlines())
        return found["sasl.password"]

    def _write_properties(self, user: str, password: str) -> None:
        path = self.folder / "users" / f"{user}.properties"
        path.parent.mkdir(exist_ok=True)
        settings = {
            "security.protocol": "SASL_SSL",
            "sasl.mechanism": "SCRAM-SHA-512",
            "sasl.username": user,
            "sasl.password": password,
            "ssl.ca.location": str(self.folder / "ca" / "ca.pem"),
        }
        write_private(path, "".join(f"{key}={value}\n" for key, value in settings.items()).encode())


def _settings(state: _State, node: int, controllers: str) -> dict[str, str]:
    client, broker, controller = state.ports[node - 1]
    replicas = min(3, len(state.ports))
    outside, inside = ("SASL_SSL", "SSL") if state.secure else ("PLAINTEXT", "PLAINTEXT")
    advertised = f"CLIENT://127.0.0.1:{client},BROKER://127.0.0.1:{broker}"
    return {
        "process.roles": "broker,controller",
        "node.id": str(node),
        "controller.quorum.bootstrap.servers": controllers,
        "listeners": f"{advertised},CONTROLLER://127.0.0.1:{controller}",
        "advertised.listeners": advertised,
        "listener.security.protocol.map": f"CLIENT:{outside},BROKER:{inside},CONTROLLER:{inside}",
        "inter.broker.listener.name": "BROKER",
        "controller.listener.names": "CONTROLLER",
        # A broker that is silent for so long is taken for dead (default: 9 s, a heartbeat every 2 s).
        "broker.session.timeout.ms": "6000",
        "broker.heartbeat.interval.ms": "1000",
        # On a busy machine a broker may not get a turn for seconds: no new controller for that, and no giving up at the start.
        "controller.quorum.election.timeout.ms": "3000",
        "controller.quorum.fetch.timeout.ms": "8000",
        "controller.quorum.request.timeout.ms": "8000",
        "initial.broker.registration.timeout.ms": "300000",
        "num.io.threads": "2",
        "num.network.threads": "2",
        "auto.create.topics.enable": "false",
        "unclean.leader.election.enable": "false",
        "default.replication.factor": str(replicas),
        "min.insync.replicas": str(max(1, replicas - 1)),
        "offsets.topic.replication.factor": str(replicas),
        "offsets.topic.num.partitions": "4",
        "transaction.state.log.replication.factor": str(replicas),
        "transaction.state.log.min.isr": str(max(1, replicas - 1)),
        "transaction.state.log.num.partitions": "4",
        "share.coordinator.state.topic.replication.factor": str(replicas),
        "share.coordinator.state.topic.min.isr": str(max(1, replicas - 1)),
        "share.coordinator.state.topic.num.partitions": "4",
        "group.initial.rebalance.delay.ms": "0",
        "log.index.size.max.bytes": str(1 << 20),
        "log.cleaner.dedupe.buffer.size": str(16 << 20),
        "file.delete.delay.ms": "1000",
    }


def _security(nodes: int, keystore: Path, ca: Path) -> dict[str, str]:
    scram = "org.apache.kafka.common.security.scram.ScramLoginModule required;"
    return {
        "ssl.keystore.type": "PEM",
        "ssl.keystore.location": str(keystore),
        "ssl.truststore.type": "PEM",
        "ssl.truststore.location": str(ca),
        "listener.name.broker.ssl.client.auth": "required",
        "listener.name.controller.ssl.client.auth": "required",
        "listener.name.client.sasl.enabled.mechanisms": "SCRAM-SHA-512",
        "listener.name.client.scram-sha-512.sasl.jaas.config": scram,
        "authorizer.class.name": "org.apache.kafka.metadata.authorizer.StandardAuthorizer",
        "allow.everyone.if.no.acl.found": "false",
        "super.users": ";".join([f"User:{ADMIN}", *(f"User:CN=broker-{node}" for node in range(1, nodes + 1))]),
    }


def _stored(folder: Path) -> _State | None:
    try:
        return msgspec.json.decode((folder / "cluster.json").read_bytes(), type=_State)
    except FileNotFoundError:
        return None
    except msgspec.MsgspecError:
        raise UsageError(f"{folder / 'cluster.json'} does not describe a cluster", hint=f"delete {folder}") from None


def _new(folder: Path, nodes: int, secure: bool, port: int | None) -> _State:
    if not 1 <= nodes <= 9:
        raise UsageError(f"{nodes} nodes make no cluster for one machine", hint="1 or 3 do")
    wanted = [port + node for node in range(nodes)] if port is not None else []
    free = iter(_free_ports(wanted, 3 * nodes))
    clients = [next(free) for _ in range(nodes)]
    state = _State(
        cluster_id=_uuid(),
        secure=secure,
        directories=[_uuid() for _ in range(nodes)],
        ports=[(client, next(free), next(free)) for client in clients],
    )
    write_private(folder / "cluster.json", msgspec.json.encode(state))
    return state


def _free_ports(wanted: Sequence[int], count: int) -> list[int]:
    """`wanted` and then others, all bindable at once. Raises `UsageError` if a wanted one is taken."""
    with contextlib.ExitStack() as held:
        found: list[int] = []
        for port in [*wanted, *random.SystemRandom().sample(_PORTS, 200)]:
            try:
                held.enter_context(socket.create_server(("127.0.0.1", port)))
                found.append(port)
            except OSError as error:
                if port in wanted:
                    raise UsageError(f"port {port} is taken", cause=error.strerror or "", hint="name another") from None
            if len(found) == count:
                return found
    raise FedloopError("there are no free ports")


def _uuid() -> str:
    """16 random bytes as Kafka writes them; the first bit is 0, so that none looks like an option."""
    number = secrets.token_bytes(16)
    return base64.urlsafe_b64encode(bytes([number[0] & 0x7F]) + number[1:]).rstrip(b"=").decode()


def _libs() -> Path:
    """The folder of Kafka's jars, fetched once by Maven with checksums enforced. Raises `UnreachableError` if they cannot be."""
    libs = HERE / "libs"
    with _locked(HERE):
        if not _libs_match():
            fresh = HERE / "libs.new"
            shutil.rmtree(fresh, ignore_errors=True)
            command = ["mvn", "-q", "-B", "--strict-checksums", "-f", str(HERE / "pom.xml"), "dependency:copy-dependencies"]
            command += ["-DincludeScope=runtime", f"-DoutputDirectory={fresh}"]
            try:
                done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_S, check=False)
            except (OSError, subprocess.TimeoutExpired) as error:
                raise UnreachableError("Maven did not bring Kafka's jars", cause=str(error)) from None
            if done.returncode:
                raise UnreachableError("Maven did not bring Kafka's jars", cause=_tail(done.stdout + done.stderr))
            (fresh / "pom.sha256").write_text(_pom_sha256(), encoding="ascii")
            shutil.rmtree(libs, ignore_errors=True)
            fresh.rename(libs)
    return libs


def _libs_match() -> bool:
    try:
        return (HERE / "libs" / "pom.sha256").read_text(encoding="ascii") == _pom_sha256()
    except FileNotFoundError:
        return False


def _pom_sha256() -> str:
    return hashlib.sha256((HERE / "pom.xml").read_bytes()).hexdigest()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _escaped(argument: str) -> str:
    return argument.replace("\\", "\\\\").replace('"', '\\"')


def _tail(text: str) -> str:
    return "\n".join(text.strip().splitlines()[-15:])


def main() -> None:
    parser = argparse.ArgumentParser(description="A real Kafka on loopback, for development.")
    parser.add_argument("what", choices=["start", "stop"])
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument("--secure", action="store_true", help="SASL_SSL with SCRAM, and ACLs")
    parser.add_argument("--port", type=int, default=9092, help="of the first broker's clients (default: 9092)")
    parser.add_argument("--dir", type=Path, default=HERE / "run", help="where its data lie (default: deploy/kafka/run)")
    arguments = parser.parse_args()
    try:
        if arguments.what == "stop":
            stored = _stored(arguments.dir)
            if stored is not None:
                Cluster(arguments.dir, nodes=len(stored.ports), secure=stored.secure).stop()
            print(f"stopped; its data stay in {arguments.dir}" if stored is not None else "no broker was started")
            return
        cluster = Cluster(arguments.dir, nodes=arguments.nodes, secure=arguments.secure, port=arguments.port)
        cluster.start()
    except FedloopError as error:
        sys.exit("\n".join(line for line in (f"error: {error.message}", error.cause, error.hint) if line))
    location = f"kafka://{cluster.bootstrap}" + (f"?config={cluster.properties()}" if arguments.secure else "")
    print(f"Kafka answers at {cluster.bootstrap}\ntry: fedloop demo --log '{location}'")


if __name__ == "__main__":
    main()
