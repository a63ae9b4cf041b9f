"""A real Kafka broker in a container, for tests on machines that have Docker and no Java."""

from __future__ import annotations

import random
import subprocess
import time
from typing import Final, Self

from confluent_kafka import KafkaException
from confluent_kafka.admin import AdminClient
from fedloop_events.errors import UnreachableError

IMAGE: Final = "apache/kafka:4.3.1"
START_S: Final = 300.0
"""With the download of the image."""


def why_not() -> str:
    """Why no container can run here, or ""."""
    try:
        _docker("info", timeout_s=20)
    except UnreachableError:
        return "no Docker"
    return ""


class Container:
    """One broker, thrown away at the end; a context manager. Raises `UnreachableError` if it does not answer."""

    def __init__(self) -> None:
        self._port = random.SystemRandom().randrange(20_000, 32_000)
        self._id = ""
        self.bootstrap = f"127.0.0.1:{self._port}"

    def __enter__(self) -> Self:
        settings = {
            "KAFKA_PROCESS_ROLES": "broker,controller",
            "KAFKA_NODE_ID": "1",
            "KAFKA_CONTROLLER_QUORUM_VOTERS": "1@127.0.0.1:9093",
            "KAFKA_LISTENERS": f"PLAINTEXT://:{self._port},CONTROLLER://127.0.0.1:9093",
            "KAFKA_ADVERTISED_LISTENERS": f"PLAINTEXT://{self.bootstrap}",
            "KAFKA_LISTENER_SECURITY_PROTOCOL_MAP": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "KAFKA_CONTROLLER_LISTENER_NAMES": "CONTROLLER",
            "KAFKA_AUTO_CREATE_TOPICS_ENABLE": "false",
            "KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR": "1",
            "KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR": "1",
            "KAFKA_TRANSACTION_STATE_LOG_MIN_ISR": "1",
            "KAFKA_GROUP_INITIAL_REBALANCE_DELAY_MS": "0",
        }
        options = [each for name, value in settings.items() for each in ("--env", f"{name}={value}")]
        published = f"127.0.0.1:{self._port}:{self._port}"
        self._id = _docker("run", "--detach", "--rm", "--publish", published, *options, IMAGE, timeout_s=START_S).strip()
        try:
            self._wait()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        _docker("rm", "--force", self._id, timeout_s=60)

    def _wait(self) -> None:
        admin = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 0, "error_cb": lambda error: None})
        deadline = time.monotonic() + START_S
        while True:
            try:
                admin.list_topics(timeout=1.0)
                return
            except KafkaException as error:
                if time.monotonic() > deadline:
                    raise UnreachableError(f"the container of {IMAGE} did not answer", cause=str(error)) from None


def _docker(*arguments: str, timeout_s: float) -> str:
    try:
        done = subprocess.run(["docker", *arguments], capture_output=True, text=True, timeout=timeout_s, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        said = error.stderr if isinstance(error, subprocess.CalledProcessError) else str(error)
        raise UnreachableError(f"docker {arguments[0]} failed", cause=said.strip()) from None
    return done.stdout
