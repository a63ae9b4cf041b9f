"""`fedloop release export` of a language model's deployment, in each format."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import tiny_models as tiny
from fedloop_cli.main import app
from fedloop_events.errors import UsageError
from fedloop_server.config import ServerConfig
from fedloop_server.deployment import create_deployment
from fedloop_tasks.causal.model import CausalModel, describe
from fedloop_tasks.causal.plan import ChatPlan
from fedloop_tasks.task import ModelError
from typer.testing import CliRunner

FILES = {
    "peft": {"adapter_config.json", "adapter_model.safetensors"},
    "merged": {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"},
    "gguf": {"adapter.gguf"},
    "merged-gguf": {"model.gguf"},
}


class Made(NamedTuple):
    folder: Path
    models: Path


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(each) for each in arguments])


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Made:
    """The server of a deployment whose base model lies in a folder of its own."""
    models = tmp_path_factory.mktemp("models")
    base = tiny.save(models / "tiny-llama")
    spec = describe("tiny-llama", model_dir=models, layers=2, max_answer_tokens=12)
    model = CausalModel(spec, model_dir=models, device="cpu")
    folder = tmp_path_factory.mktemp("deployments") / "chat"
    create_deployment(folder, spec, model.initial_arrays(0), ServerConfig(plan=ChatPlan(epsilon=None), model_dir=str(models)))
    assert base.is_dir()
    return Made(folder, models)


@pytest.mark.parametrize("form", ["peft", "merged", "gguf", "merged-gguf"])
def test_each_format_is_written_and_its_files_are_listed(made: Made, tmp_path: Path, form: str) -> None:
    done = run("release", "export", made.folder, tmp_path / "out", "--format", form, "--json")
    assert done.exit_code == 0, done.output
    document = json.loads(done.stdout)
    assert (document["format"], document["folder"]) == (form, str(tmp_path / "out"))
    found = {each.name: each.read_bytes() for each in (tmp_path / "out").iterdir()}
    assert FILES[form] | {"README.md"} <= found.keys()
    assert {each["name"]: (each["size_bytes"], each["sha256"]) for each in document["files"]} == {
        name: (len(data), hashlib.sha256(data).hexdigest()) for name, data in found.items()
    }
    assert len(document["notes"]) == (0 if form == "peft" else 1)
    assert done.stderr.splitlines() == [f"note: {each}" for each in document["notes"]]
    assert f"# Release {document['release']} of default" in found["README.md"].decode()
    assert "nothing of a user went in" in found["README.md"].decode()


def test_without_a_format_it_is_for_peft(made: Made, tmp_path: Path) -> None:
    assert json.loads(run("release", "export", made.folder, tmp_path / "out", "--json").stdout)["format"] == "peft"


def test_a_format_that_there_is_not_is_refused_with_those_that_there_are(made: Made, tmp_path: Path) -> None:
    done = run("release", "export", made.folder, tmp_path / "out", "--format", "onnx")
    assert isinstance(done.exception, UsageError)
    assert done.exception.message == "this model cannot be exported as 'onnx', but as peft or merged or gguf or merged-gguf"
    assert not any(tmp_path.iterdir())


def test_the_base_model_is_found_where_the_server_has_it_or_where_it_is_named(made: Made, tmp_path: Path) -> None:
    assert run("release", "export", "--log", made.folder, tmp_path / "one").exit_code == 0
    absent = run("release", "export", made.folder, tmp_path / "two", "--model-dir", tmp_path)
    assert isinstance(absent.exception, ModelError)
    assert "no base model 'tiny-llama'" in absent.exception.message
    assert run("release", "export", made.folder, tmp_path / "two", "--model-dir", made.models).exit_code == 0
    assert sorted(each.name for each in tmp_path.iterdir()) == ["one", "two"]
