"""The models on this machine: whole or absent, found by name, and known again when they are damaged."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import gguf_files
import pytest
from fedloop_events import files
from fedloop_events.errors import UsageError
from fedloop_tasks.models import folder as folders
from fedloop_tasks.models import registry
from fedloop_tasks.task import ModelError

MODEL = gguf_files.small("llama")
KILLED_AT = """
import os, signal, sys
from fedloop_tasks.models import registry
left, sync = int(sys.argv[1]), os.fsync
def counted(descriptor):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    sync(descriptor)
os.fsync = counted
registry.add(sys.argv[2])
"""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "fedloop" / "models"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return gguf_files.write(tmp_path / "small.gguf", MODEL)


def ended(*command: str | Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=120, env=environment)


def test_a_model_is_made_once_and_found_by_its_name(path: Path, folder: Path) -> None:
    made, again = registry.add(str(path)), registry.add(str(path))
    assert (made.new, again.new) == (True, False)
    assert registry.listed() == [again] == [registry.show("small")]
    assert made.folder == folder / "small" == folders.locate("small")
    assert registry.added("small") == made.folder
    assert folders.locate("small", folder) == made.folder
    with pytest.raises(ModelError):
        folders.locate("../models/small")


def test_another_model_does_not_take_its_place(path: Path, tmp_path: Path) -> None:
    made = registry.add(str(path))
    before = {each.name: each.stat().st_mtime_ns for each in made.folder.iterdir()}
    other = gguf_files.write(tmp_path / "other.gguf", gguf_files.small("qwen2"))
    with pytest.raises(UsageError, match="is there already, and is not this model"):
        registry.add(str(other), name="small")
    with pytest.raises(UsageError, match="is there already, and is not this model"):
        registry.add(str(path), dtype="bf16")
    assert {each.name: each.stat().st_mtime_ns for each in made.folder.iterdir()} == before
    (made.folder.parent / "mine").mkdir()
    with pytest.raises(UsageError, match="is there already"):
        registry.add(str(path), name="mine")


def test_of_several_that_make_it_at_once_one_does_and_all_have_it(path: Path, folder: Path) -> None:
    code = "import sys; from fedloop_tasks.models import registry; print(registry.add(sys.argv[1]).new)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", code, str(path)]
    started = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment) for _ in range(3)]
    said = [each.communicate(timeout=120)[0].strip() for each in started]
    assert sorted(said) == ["False", "False", "True"]
    assert [each.name for each in folder.iterdir()] == ["small"]


def test_one_that_is_made_while_another_writes_it_is_taken(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free: Callable[[Path], int | None] = files.free_bytes

    def meanwhile(at: Path) -> int | None:
        monkeypatch.setattr(files, "free_bytes", free)
        assert registry.add(str(path)).new
        return free(at)

    monkeypatch.setattr(files, "free_bytes", meanwhile)
    assert not registry.add(str(path)).new
    assert [each.name for each in folder.iterdir()] == ["small"]


@pytest.mark.parametrize("step", range(9))
def test_killed_at_any_step_it_leaves_a_whole_model_or_none(path: Path, folder: Path, step: int) -> None:
    killed = ended(sys.executable, "-c", KILLED_AT, str(step), path)
    assert killed.returncode in (-signal.SIGKILL, 0), killed.stderr
    assert (killed.returncode == 0) == (step == 8)
    there = registry.listed()
    assert len(there) == (step > 6)
    assert (folders.locate("small") if there else registry.added("small")) == (there[0].folder if there else None)
    assert registry.add(str(path)).new == (not there)
    assert registry.show("small").manifest.family == "llama"


@pytest.mark.slow
def test_a_full_disk_is_said_before_anything_is_written(path: Path, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    own_mounts = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    mounted = f'mount -t tmpfs -o size=1m tmpfs "{disk}" && "$@"; status=$?; ls -A "{disk}"; exit $status'
    add: list[str | Path] = [sys.executable, "-m", "fedloop_cli.main", "model", "add", path, "--model-dir", disk]
    found = ended(*own_mounts, "sh", "-c", mounted, "sh", *add)
    assert (found.returncode, found.stdout) == (2, ""), found.stderr
    assert "error: the model small needs 1," in found.stderr
    assert "are free in" in found.stderr


def test_a_disk_that_fills_up_meanwhile_leaves_nothing(path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(UsageError) as found:
            registry.add(str(path))
    assert "the disk is full (" in found.value.cause
    assert [*folder.iterdir()] == []
    assert registry.add(str(path)).new


@pytest.mark.parametrize("name", [*registry.FILES, registry.MANIFEST])
def test_a_damaged_file_is_found(path: Path, name: str) -> None:
    made = registry.add(str(path))
    data = bytearray((made.folder / name).read_bytes())
    data[len(data) // 2] ^= 1
    (made.folder / name).write_bytes(data)
    with pytest.raises(UsageError, match="is damaged"):
        registry.show("small")
    with pytest.raises(UsageError, match="is damaged"):
        registry.add(str(path))
    if name in registry.FILES:
        assert registry.sha256(made.folder) != made.manifest.sha256
    (made.folder / name).unlink()
    with pytest.raises(UsageError):
        registry.show("small")


def test_models_are_where_the_system_keeps_a_users_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("XDG_DATA_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert registry.default_folder().is_relative_to(tmp_path)
    assert registry.default_folder().parts[-2:] == ("fedloop", "models")
