"""The documents that --json prints: programs rest on their keys, so none is renamed, lost or added unnoticed."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf_files
import pytest
from devices import World
from fedloop_cli.main import run
from fedloop_tasks.evaluation import Measured

Document = Callable[..., dict[str, Any]]

ROUND = (
    "round_id number state kind strategy base_release release decision accuracy metrics leading cohort participants excluded"
    " opened seconds bytes_up bytes_down aborted request reason"
)
RELEASE = (
    "release number status current accuracy metrics leading round_id base_release strategy updates sha256 size_bytes proposed"
    " reason"
)
AWAITED = "what request_id round_id quorum there asked missing excluded left_s epoch decided_s hint"
BUDGET = "client_id budget delta epsilon spends kept suspended revoked"
EVENT = "stream offset appended topic key id type source data"
MODEL = "name folder family dtype parameters size_bytes licence chat_template sha256"
VERIFIED = (
    "log verified events by_topic clients blobs blob_bytes unknown stale repeated rivals wrong findings client_wrong misconduct"
    " not_seen"
)
REPLAYED = (
    "log events seconds types unknown refused first_refused epoch clients revoked rounds releases current stale_decisions spends"
    " suspended matching differing"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment after a round in which one of three devices declined."""
    world = World(tmp_path_factory.mktemp("documents") / "deployment")
    for name in ("ann", "bob"):
        world.device(name)
    world.device("cem", behave=lambda opened, arrays: "busy")
    world.request(reason="drift: satisfaction fell")
    with world.serving():
        world.server().run(rounds=1)
    world.log.close()
    return world.folder


@pytest.fixture
def document(capsys: pytest.CaptureFixture[str]) -> Document:
    def printed(*arguments: str | Path) -> dict[str, Any]:
        assert run([*map(str, arguments), "--json"]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return printed


def document_of(text: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(text)
    return found


def keys(found: dict[str, Any]) -> str:
    return " ".join(found)


def test_rounds(folder: Path, document: Document) -> None:
    found = document("round", "list", folder)
    assert keys(found) == "rounds requested epoch awaited"
    assert keys(found["awaited"]) == AWAITED
    (each,) = found["rounds"]
    assert keys(each) == ROUND
    assert each["excluded"] == [{"client": "cem", "reason": "declined.busy", "detail": ""}]
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", each["opened"])
    assert 0 <= each["seconds"] < 60
    assert (each["aborted"], each["request"], each["reason"]) == ("", "q1", "drift: satisfaction fell")
    assert (each["accuracy"], each["metrics"], each["leading"]) == (0.5, {"accuracy": 0.5}, "accuracy")
    shown = document("round", "show", folder, "r0001")
    assert (
        keys(shown)
        == f"{ROUND} mechanism hyperparameters quorum deadline_s enough grace_s max_staleness stale declined refused replies"
    )
    assert {name: shown[name] for name in each} == each
    assert (shown["declined"], shown["refused"], shown["replies"]) == ({"cem": "busy"}, [], 2)
    asked = document("round", "start", folder)
    assert asked.keys() == {"request_id", "rounds"}
    assert keys(document("round", "withdraw", folder, asked["request_id"])) == "request_id withdrawn"


def test_releases(folder: Path, document: Document) -> None:
    found = document("release", "list", folder)
    assert keys(found) == "current releases"
    first, second = found["releases"]
    assert keys(first) == keys(second) == RELEASE
    assert (first["current"], second["current"], found["current"]) == (False, True, second["release"])
    assert (second["accuracy"], second["metrics"], second["leading"]) == (0.5, {"accuracy": 0.5}, "accuracy")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first["proposed"])
    shown = document("release", "show", folder, second["release"])
    assert keys(shown) == f"{RELEASE} lineage"
    step = shown["lineage"][0]
    assert keys(step) == "release number sha256 base_release round_id strategy contributions"
    assert keys(step["contributions"][0]) == "client_id update_id blob weight"
    rebuilt = document("release", "rebuild", folder)
    assert keys(rebuilt) == "release identical published_sha256 rebuilt_sha256 steps"
    assert keys(rebuilt["steps"][0]) == "release published_sha256 rebuilt_sha256 clients"


@pytest.fixture(scope="module")
def by_loss(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A deployment whose releases are judged by a loss; the second one's was not finite."""
    world = World(tmp_path_factory.mktemp("loss") / "deployment")
    world.device("ann")
    world.device("bob")
    world.request(2)
    losses = iter([3.0, 2.5, math.nan])

    def evaluate(arrays: object) -> Measured:
        metrics = {"loss_per_token": next(losses), "exact_match": 0.25}
        return Measured(metrics, "loss_per_token", 8, "e" * 64, higher_is_better=False)

    with world.serving():
        world.server(evaluate=evaluate).run(rounds=2)
    world.log.close()
    return world.folder


def test_no_other_metric_stands_under_the_name_of_accuracy(by_loss: Path, document: Document) -> None:
    for found, name in (("round", "rounds"), ("release", "releases")):
        *_, good, bad = document(found, "list", by_loss)[name]
        assert (good["accuracy"], good["leading"]) == (None, "loss_per_token")
        assert good["metrics"] == {"loss_per_token": 2.5, "exact_match": 0.25}
        assert (bad["accuracy"], bad["metrics"]["loss_per_token"]) == (None, None)


def test_a_person_reads_the_leading_metric_by_its_own_name(by_loss: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def printed(*arguments: str | Path) -> str:
        assert run([*map(str, arguments)]) == 0
        return capsys.readouterr().out

    for command in ("round", "release"):
        head, *rows = printed(command, "list", by_loss).splitlines()
        start, end = head.index("loss per token"), head.index("loss per token") + len("loss per token")
        column = [row[start:end].strip() for row in rows]
        assert column[-3:][-2:] == ["2.5", "-"]
        assert "accuracy" not in head
    shown = printed("round", "show", by_loss, "r0001")
    assert re.search(r"^loss per token +2\.5$", shown, re.MULTILINE)
    assert re.search(r"^exact match +0\.25$", shown, re.MULTILINE)
    release = document_of(printed("release", "list", by_loss, "--json"))["current"]
    shown = printed("release", "show", by_loss, release)
    assert re.search(r"^loss per token +2\.5$", shown, re.MULTILINE)
    assert not re.search(r"^(accuracy|metrics|leading)", shown, re.MULTILINE)


def test_budgets(folder: Path, document: Document) -> None:
    found = document("audit", "budget", folder)
    assert keys(found) == "clients kept"
    assert [keys(each) for each in found["clients"]] == [BUDGET] * 3


def test_the_log(folder: Path, document: Document) -> None:
    tail = document("log", "tail", folder, "-n", "2")
    assert keys(tail) == "log events"
    assert [keys(each) for each in tail["events"]] == [EVENT] * 2
    assert keys(document("log", "verify", folder)) == VERIFIED
    assert keys(document("log", "replay", folder)) == REPLAYED


def test_the_blobs(folder: Path, document: Document) -> None:
    found = document("blobs", "sweep", folder, "--dry-run")
    assert keys(found) == "blobs named young removed freed_bytes dry_run"
    assert (found["removed"], found["dry_run"]) == (0, True)


def test_models(tmp_path: Path, document: Document) -> None:
    models, path = tmp_path / "models", gguf_files.write(tmp_path / "small.gguf", gguf_files.small("llama"))
    added = document("model", "add", path, "--model-dir", models)
    assert keys(added) == f"{MODEL} new"
    assert (added["name"], added["folder"], added["dtype"], added["new"]) == ("small", str(models / "small"), "f32", True)
    assert not document("model", "add", path, "--model-dir", models)["new"]
    named = document("model", "add", path, "--model-dir", models, "--name", "half", "--dtype", "bf16")
    assert (named["name"], named["dtype"]) == ("half", "bf16")
    found = document("model", "list", "--model-dir", models)
    assert keys(found) == "model_dir models"
    assert [keys(each) for each in found["models"]] == [MODEL] * 2
    shown = document("model", "show", "small", "--model-dir", models)
    assert keys(shown) == f"{MODEL} files source_sha256"
    assert {name: shown[name] for name in found["models"][1]} == found["models"][1]
    assert shown["files"].keys() == {each.name for each in (models / "small").iterdir()} - {"fedloop.json"}


def test_the_doctor(folder: Path, document: Document) -> None:
    found = document("doctor", folder)
    assert keys(found) == "findings failed warned"
    assert {keys(each) for each in found["findings"]} == {"subject level what hint"}


def test_commands(tmp_path: Path, document: Document) -> None:
    world = World(tmp_path / "deployment")
    world.device("ann")
    world.device("bob")
    world.request()
    with world.serving():
        world.server().run(rounds=1)
    zero, _ = world.releases.releases
    assert document("release", "rollback", world.folder, zero, "--reason", "worse").keys() == {"release", "withdrawn", "reason"}
    assert document("server", "revoke", world.folder, "ann") == {"client_id": "ann", "reason": "operator"}
