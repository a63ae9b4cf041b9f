"""The services of docker-compose.yml, started on a Docker engine until a release is published.

Images are built by the project's own Dockerfiles, on base images of what this machine has (compose_images.py); moto stands in for
SeaweedFS. Prometheus, Grafana and two of the four agents are left out, and there are only a few dozen messages for each.
"""

from __future__ import annotations

import re
import secrets
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import brokers
import compose_images
import compose_run
import containers
import pytest
from compose_run import Stack
from fedloop_cli.provisioning import composing
from fedloop_tasks.classification.task import Classification
from prometheus_client.parser import text_string_to_metric_families

ROOT: Final = Path(__file__).parents[2]
MESSAGES: Final = 40
# So few messages make something of little noise alone.
EPSILON: Final = 200
PUBLISHED_S: Final = 240.0

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(bool(containers.why_not()), reason="no Docker engine runs here"),
    pytest.mark.skipif(bool(brokers.why_not()), reason=f"no Kafka for its image: {brokers.why_not()}"),
]


@pytest.fixture(scope="module")
def images() -> Iterator[dict[str, str]]:
    """By the repositories that docker-compose.yml names: what stands in for them here."""
    run = secrets.token_hex(4)
    python, kafka = f"fedloop-test-python:{run}", f"fedloop-test-kafka:{run}"
    built = {f"fedloop-{name}": f"fedloop-test-{name}:{run}" for name in ("server", "agent")}
    try:
        compose_images.import_python(python)
        compose_images.import_kafka(kafka, brokers._libs())
        for name, folder in (("fedloop-server", "server"), ("fedloop-agent", "clients")):
            options = ["--quiet", "--file", f"{folder}/Dockerfile", "--build-arg", f"BASE={python}", "--tag", built[name]]
            done = subprocess.run(["docker", "build", *options, "."], cwd=ROOT, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
        yield built | {"apache/kafka": kafka, "chrislusf/seaweedfs": built["fedloop-server"]}
    finally:
        subprocess.run(["docker", "rmi", "--force", *built.values(), python, kafka], capture_output=True, check=False)


@pytest.fixture
def stack(images: dict[str, str], tmp_path: Path) -> Iterator[Stack]:
    made = composing.compose(tmp_path, Classification)
    for messages in made.demo.rglob("*.csv"):
        lines = messages.read_text(encoding="utf-8").splitlines(keepends=True)
        messages.write_text("".join(lines[: MESSAGES + 1]), encoding="utf-8")
    document = compose_run.load(ROOT / "docker-compose.yml", compose_run.dotenv(made.env_file))
    for service in document["services"].values():
        _adapt(service, images)
    project = f"fedloop-test-{secrets.token_hex(4)}"
    with Stack(document, project, ROOT) as stack:
        yield stack
    left = subprocess.run(
        ["docker", "ps", "--all", "--quiet", "--filter", f"label=fedloop-test={project}"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert not left.stdout


def _adapt(service: dict[str, Any], images: dict[str, str]) -> None:
    """Put the images at hand in the place of others."""
    repository = service["image"].rpartition(":")[0]
    service["image"] = images.get(repository, service["image"])
    if repository.startswith(("fedloop-", "chrislusf/")):
        service["volumes"] = [*service["volumes"], f"{compose_images.site_packages()}:{compose_images.DEPS}:ro"]
    if repository == "chrislusf/seaweedfs":
        service["entrypoint"] = ["python", "-m", "moto.server", "--host=0.0.0.0"]
        ours = {"-s3.port": "--port", "-s3.cert.file": "--ssl-cert", "-s3.key.file": "--ssl-key"}
        options = [option.split("=", 1) for option in service["command"] if "=" in option]
        service["command"] = [f"{ours[name]}={value}" for name, value in options if name in ours]
        reach = "import socket; socket.create_connection(('blobs', 8333), 2)"
        service["healthcheck"] = {"test": ["CMD", "python", "-c", reach], "interval": "2s", "timeout": "5s", "retries": 30}
    elif "test" in service.get("healthcheck", {}):
        service["healthcheck"] = {**service["healthcheck"], "interval": "3s"}
    service["command"] = [re.sub(r"--epsilon 8\b", f"--epsilon {EPSILON}", each) for each in service.get("command", [])] or None


def test_the_stack_publishes_a_release_and_goes_on_after_its_server_was_killed(stack: Stack) -> None:
    agents = composing.AGENTS[:2]
    stack.up(["server", *agents], PUBLISHED_S)
    stack.wait("server", "service_healthy", 60)
    shown = _until_published(stack, deadline=time.monotonic() + PUBLISHED_S)
    assert shown["fedloop_clients_enrolled"] == 2
    assert shown["fedloop_events_refused_total"] == 0
    assert 0 < shown["fedloop_budget_share_max"] <= 1

    _check_confinement(stack)
    stack.kill("server")
    stack.start("server")
    stack.wait("server", "service_healthy", 60)
    again = _metrics(stack)
    assert again["fedloop_epoch"] == shown["fedloop_epoch"] + 1
    assert again["fedloop_release_number"] >= shown["fedloop_release_number"]
    status, text = stack.run("server", ["fedloop", "log", "verify", "/var/lib/fedloop/bank"])
    assert status == 0, text


def _check_confinement(stack: Stack) -> None:
    """What a service that was taken over could not do."""
    for name in ("server", "agent-1", "kafka", "blobs"):
        assert stack.run(name, ["sh", "-c", "echo > /usr/written"])[0] != 0
        assert stack.run(name, ["sh", "-c", "echo > /tmp/written"])[0] == 0
    mine = "import os; print(os.getuid(), sorted(os.listdir('/var/lib/fedloop/secrets')))"
    assert stack.run("agent-1", ["python", "-c", mine])[1] == "10001 ['ca.pem', 'kafka.properties', 's3.credentials']\n"
    reads = "import os; from fedloop_events.logs.kafka import KafkaLog; KafkaLog(os.environ['FEDLOOP_LOG']).read(['updates'])"
    status, text = stack.run("agent-1", ["python", "-c", reads])
    assert status != 0
    assert "NotAllowedError" in text


def _until_published(stack: Stack, deadline: float) -> dict[str, float]:
    while (shown := _metrics(stack)).get("fedloop_release_number", 0) < 1:
        if time.monotonic() > deadline:
            said = [f"{name}:\n{stack.logs(name)}" for name in ("server", *composing.AGENTS[:2])]
            raise AssertionError("no release was published\n" + "\n".join(said))
        time.sleep(1)
    return shown


def _metrics(stack: Stack) -> dict[str, float]:
    """The server's samples without a label, as a neighbour on its network scrapes them."""
    scrape = "from urllib.request import urlopen; print(urlopen('http://server:9464/metrics', timeout=20).read().decode())"
    status, text = stack.run("server", ["python", "-c", scrape])
    assert status == 0, text
    return {
        sample.name: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if not sample.labels
    }
