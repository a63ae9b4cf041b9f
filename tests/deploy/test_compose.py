"""docker-compose.yml and what it mounts: read as Compose reads it, and, where a Docker engine runs, started."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Final

import compose_run
import pytest
import yaml
from compose_run import MissingError
from devices import World
from fedloop_cli.provisioning import composing
from fedloop_server.feedback import exposed
from fedloop_server.feedback.pipeline import Pipeline
from fedloop_server.feedback.states import States
from fedloop_server.telemetry import metrics
from fedloop_server.telemetry.metrics import MeteredLog
from fedloop_tasks.classification.task import Classification

ROOT: Final = Path(__file__).parents[2]
FILE: Final = ROOT / "docker-compose.yml"
ONCE: Final = {"prepare", "format", "topics", "deployment"}
PINNED: Final = re.compile(r"[a-z0-9./-]+:v?[0-9]+(\.[0-9]+)+(-[a-z0-9.-]+)?")
FILLED: Final = {"FEDLOOP_SECRETS": "/s", "FEDLOOP_DEMO": "/d", "KAFKA_CLUSTER_ID": "id", "FEDLOOP_INIT": "--x"}


@pytest.fixture(scope="module")
def document() -> dict[str, Any]:
    return compose_run.load(FILE, FILLED)


def services() -> list[str]:
    return list(yaml.safe_load(FILE.read_text(encoding="utf-8"))["services"])


@pytest.mark.parametrize("name", services())
def test_a_service_is_pinned_hardened_and_watched(document: dict[str, Any], name: str) -> None:
    service = document["services"][name]
    assert PINNED.fullmatch(service["image"])
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert service["security_opt"] == ["no-new-privileges:true"]
    assert name == "prepare" or (
        "cap_add" not in service and int(service["user"].split(":")[0] if "user" in service else 10001) > 0
    )
    assert name != "prepare" or (service["network_mode"], set(service["cap_add"])) == ("none", {"CHOWN", "DAC_OVERRIDE"})
    assert not {"privileged", "pid", "ipc", "devices", "env_file"} & set(service)
    if name in ONCE:
        assert service["restart"] == "no"
    else:
        assert service["restart"] == "unless-stopped"
        assert service["healthcheck"]["test"][0] == "CMD"


def test_ports_are_on_loopback_alone_and_the_log_and_the_blobs_have_none(document: dict[str, Any]) -> None:
    published = {name: each["ports"] for name, each in document["services"].items() if "ports" in each}
    assert set(published) == {"prometheus", "grafana"}
    assert all(port.startswith("127.0.0.1:") for ports in published.values() for port in ports)
    on = {name for name, each in document["services"].items() if "backend" in each.get("networks", [])}
    assert document["networks"]["backend"] == {"internal": True}
    assert on == {"kafka", "blobs", "topics", "deployment", "server", "feedback", *composing.AGENTS}


def test_what_is_kept_is_kept_in_volumes_that_have_a_name(document: dict[str, Any]) -> None:
    mounted = [volume.split(":") for each in document["services"].values() for volume in each.get("volumes", [])]
    sources = {parts[0] for parts in mounted}
    assert {source for source in sources if source[0] not in "./"} == set(document["volumes"])
    # Whatever is the host's is read, and never written.
    assert all(parts[-1] == "ro" for parts in mounted if parts[0][0] in "./")
    assert all((ROOT / source).exists() for source in sources if source.startswith("./"))


def test_a_service_waits_for_those_it_needs_until_they_are_ready(document: dict[str, Any]) -> None:
    for name, service in document["services"].items():
        for needed, how in service.get("depends_on", {}).items():
            expected = "service_completed_successfully" if needed in ONCE else "service_healthy"
            assert how["condition"] == expected, f"{name} on {needed}"


def test_no_secret_stands_in_the_file_and_each_comes_from_init_compose(tmp_path: Path) -> None:
    text = FILE.read_text(encoding="utf-8")
    keys = re.findall(r"^\s+([A-Za-z_]*(?:PASSWORD|SECRET|TOKEN|KEY)[A-Za-z_]*):\s*(\S.*)$", text, re.MULTILINE | re.IGNORECASE)
    assert all(re.fullmatch(r".*__FILE", name) and value.startswith("/") for name, value in keys)
    made = composing.compose(tmp_path, Classification)
    assert set(re.findall(r"\$\{([A-Z_]+)", text)) - {"TORCH_INDEX"} == set(compose_run.dotenv(made.env_file))
    secrets = _random_values(tmp_path)
    files = [
        path
        for folder in ("deploy", "server", "clients")
        for path in (ROOT / folder).rglob("*")
        if path.suffix in {".yml", ".json"}
    ]
    assert not any(secret in path.read_text(encoding="utf-8") for secret in secrets for path in [FILE, made.env_file, *files])


@pytest.mark.parametrize("name", sorted(FILLED))
def test_compose_refuses_the_file_until_init_compose_has_run(name: str) -> None:
    with pytest.raises(MissingError, match=f"{name}: run fedloop init compose"):
        compose_run.load(FILE, {key: value for key, value in FILLED.items() if key != name})


def test_compose_itself_takes_the_file(tmp_path: Path) -> None:
    compose = ["docker", "compose"] if _succeeds(["docker", "compose", "version"]) else []
    if not compose:
        pytest.skip("Docker has no Compose plugin here")
    made = composing.compose(tmp_path, Classification)
    assert _succeeds([*compose, "--file", str(FILE), "--env-file", str(made.env_file), "config", "--quiet"])
    assert not _succeeds([*compose, "--file", str(FILE), "--env-file", "/dev/null", "config", "--quiet"])


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """The names of all samples that a server and a pipeline can show."""
    world = World(tmp_path_factory.mktemp("exported") / "deployment")
    log = MeteredLog(world.log)
    families = list(metrics.registry(world.server(log=log), log).collect())
    with States(world.folder / "states") as states:
        pipeline = Pipeline(log, world.writer, [], states)
        families += list(exposed.registry(pipeline, exposed.Found(), log).collect())
    world.log.close()
    endings = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}
    return {f"{each.name}{ending}" for each in families for ending in endings.get(each.type, ("",))} | {"up"}


def test_the_dashboard_and_the_alerts_ask_for_metrics_that_there_are(exported: set[str]) -> None:
    dashboard = json.loads((ROOT / "deploy/grafana/dashboards/fedloop.json").read_text(encoding="utf-8"))
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    asked = [each["expr"] for each in targets] + [each["expr"] for each in dashboard["annotations"]["list"]]
    alerts = yaml.safe_load((ROOT / "deploy/prometheus/alerts.yml").read_text(encoding="utf-8"))
    asked += [rule["expr"] for group in alerts["groups"] for rule in group["rules"]]
    named = {name for each in asked for name in re.findall(r"\b(?:fedloop|process|python)_[a-z0-9_]+", each)}
    assert len(named) > 20
    assert named <= exported
    # Whatever the server shows of learning and privacy, the dashboard shows.
    shown = {re.sub(r"_(bucket|count|sum)$", "", name) for name in exported if name.startswith("fedloop_")}
    assert shown <= {re.sub(r"_bucket$", "", name) for name in named}


def test_prometheus_and_grafana_point_at_services_of_the_file(document: dict[str, Any]) -> None:
    config = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    targets = {target for job in config["scrape_configs"] for static in job["static_configs"] for target in static["targets"]}
    assert targets == {"server:9464", "feedback:9465", "127.0.0.1:9090"}
    for name, port in (("server", ":9464"), ("feedback", ":9465")):
        assert document["services"][name]["command"][-1].endswith(port)
        assert set(document["services"][name]["networks"]) & set(document["services"]["prometheus"]["networks"]) == {"monitoring"}
    assert all((ROOT / "deploy/prometheus" / Path(name).name).exists() for name in config["rule_files"])
    sources = yaml.safe_load((ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text(encoding="utf-8"))
    assert [each["url"] for each in sources["datasources"]] == ["http://prometheus:9090"]
    dashboard = (ROOT / "deploy/grafana/dashboards/fedloop.json").read_text(encoding="utf-8")
    assert set(re.findall(r'"uid": "(\w+)"', dashboard)) == {sources["datasources"][0]["uid"], "fedloop"}
    provider = yaml.safe_load((ROOT / "deploy/grafana/provisioning/dashboards/fedloop.yml").read_text(encoding="utf-8"))
    folder = provider["providers"][0]["options"]["path"]
    assert f"./deploy/grafana/dashboards:{folder}:ro" in document["services"]["grafana"]["volumes"]


def test_kafka_lets_nobody_in_without_tls_and_listens_as_controller_to_itself_alone() -> None:
    lines = (ROOT / "deploy/compose/kafka.properties").read_text(encoding="utf-8").splitlines()
    settings = dict(line.split("=", 1) for line in lines if line and not line.startswith("#"))
    protocols = dict(each.split(":") for each in settings["listener.security.protocol.map"].split(","))
    assert set(protocols.values()) == {"SASL_SSL", "SSL"}
    listeners = dict(each.split("://") for each in settings["listeners"].split(","))
    assert listeners["CONTROLLER"].startswith("127.0.0.1:")
    for name, protocol in protocols.items():
        if protocol == "SSL":
            assert settings[f"listener.name.{name.lower()}.ssl.client.auth"] == "required"
    assert settings["allow.everyone.if.no.acl.found"] == settings["auto.create.topics.enable"] == "false"


def test_the_server_is_not_given_the_texts_that_devices_learn_from(tmp_path: Path) -> None:
    made = composing.compose(tmp_path, Classification)
    assert sorted(path.name for path in (made.demo / "server").iterdir()) == ["labels.txt", "test.csv"]
    shares = [
        set((made.demo / agent / "messages.csv").read_text(encoding="utf-8").splitlines()[1:]) for agent in composing.AGENTS
    ]
    assert all(len(share) > 100 for share in shares)
    held_out = set((made.demo / "server" / "test.csv").read_text(encoding="utf-8").splitlines()[1:])
    assert not any(held_out & share for share in shares)


def _random_values(folder: Path) -> list[str]:
    chosen = json.loads((folder / "secrets" / "chosen.json").read_bytes())
    return [chosen["grafana"], *chosen["kafka"].values(), *(key for pair in chosen["s3"].values() for key in pair)]


def _succeeds(command: list[str]) -> bool:
    if shutil.which(command[0]) is None:
        return False
    return subprocess.run(command, capture_output=True, timeout=60, check=False).returncode == 0
