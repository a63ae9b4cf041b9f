"""What must always hold in the project's own files."""

from __future__ import annotations

import ast
import re
import subprocess
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import grimp
import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("events", "privacy", "tasks", "clients", "server", "cli")
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "torch.load", "torch.save", "torch.hub.load"}


def sources() -> Iterator[tuple[Path, ast.Module]]:
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def test_nothing_that_ships_can_run_code_from_data() -> None:
    """No pickle in any of its forms, no `eval`, no loader that runs what it loads. Schemas are written by a developer's tool."""
    found = []
    for path, tree in sources():
        for node in ast.walk(tree):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            bad = [name for name in names if name.split(".")[0] in FORBIDDEN_MODULES and path.name != "schemas.py"]
            bad += [ast.unparse(node.func)] if isinstance(node, ast.Call) and ast.unparse(node.func) in FORBIDDEN_CALLS else []
            found += [f"{path.relative_to(ROOT)}: {name}" for name in bad]
    assert not found


@pytest.mark.parametrize(("name", "fewest"), [("requirements.lock", 50), ("requirements-models.lock", 1)])
def test_a_lock_pins_every_package_with_a_hash_and_names_no_address(name: str, fewest: int) -> None:
    lock = (ROOT / name).read_text(encoding="utf-8")
    assert not re.search(r"://|--index|--find-links|--extra-index", lock)
    pinned = re.findall(r"^([a-z0-9][a-z0-9._-]*)==\S+.*?((?:\n    --hash=sha256:[0-9a-f]{64}(?: \\)?)+)", lock, re.MULTILINE)
    assert len(pinned) == len(re.findall(r"^[a-z0-9]", lock, re.MULTILINE)) >= fewest


@pytest.mark.parametrize("package", PACKAGES)
def test_each_package_says_that_it_is_typed(package: str) -> None:
    assert (ROOT / package / f"fedloop_{package}" / "py.typed").exists()


def test_tracked_files_name_no_folder_of_a_developers_machine() -> None:
    listed = subprocess.run(
        ["git", "grep", "-nIE", r"(^|[^A-Za-z0-9_./])/(home|root|work|Users)/"], cwd=ROOT, capture_output=True, text=True
    )
    lines = [line for line in listed.stdout.splitlines() if not line.startswith("tests/test_project.py")]
    assert not lines


TASK_WORDS = {"label", "labels", "head"}
OTHER_MEANINGS = {
    "server/fedloop_server/telemetry/metrics.py": "labels of Prometheus",
    "server/fedloop_server/gateway/app.py": "HTTP's HEAD",
    "server/fedloop_server/gateway/describing.py": "HTTP's HEAD",
    "cli/fedloop_cli/commands/log.py": "the beginning of a line",
    "cli/fedloop_cli/demo/live.py": "the head of a column",
    "cli/fedloop_cli/demo/satisfaction.py": "labels of a plot",
    "server/fedloop_server/operations/examples.py": "columns of files for training",
    "server/fedloop_server/triggers.py": "what a drift is of",
}
FEEDBACK = "server/fedloop_server/feedback/"
"""Reads feedback of any task, whose events have a field for a label."""


def words(tree: ast.Module) -> Iterator[str]:
    """The words of every name and text in a module, but for its comments."""
    for node in ast.walk(tree):
        for field in ("id", "attr", "arg", "name", "asname", "module", "value"):
            if isinstance(text := getattr(node, field, None), str):
                yield from re.findall(r"[a-z]+", text.lower())


def test_server_and_command_line_know_no_task() -> None:
    """Which labels there are, and which tensors are a head, stands in `tasks` alone, behind its table and its seams. (The models
    on this machine are of no task, and feedback is read as its events have it.)"""
    named, imported = {}, []
    for path, tree in sources():
        where = str(path.relative_to(ROOT))
        if not where.startswith(("server/", "cli/")) or where.startswith("cli/fedloop_cli/corpus/"):
            continue
        if not where.startswith(FEEDBACK) and (found := TASK_WORDS & set(words(tree))):
            named[where] = found
        modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        modules |= {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        allowed = (
            "fedloop_tasks.table",
            "fedloop_tasks.task",
            "fedloop_tasks.evaluation",
            "fedloop_tasks.models",
            "fedloop_tasks.models.registry",
            "fedloop_tasks.updates",
            "fedloop_tasks.words",
        )
        imported += [f"{where}: {name}" for name in modules if name.startswith("fedloop_tasks") and name not in allowed]
    assert named.keys() == OTHER_MEANINGS.keys(), named
    assert not imported


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Nor for types alone: what is in a circle can only be understood, moved and tested together."""
    graph = grimp.build_graph(*(f"fedloop_{package}" for package in PACKAGES), cache_dir=None)
    assert len(graph.modules) > 150
    TopologicalSorter({module: graph.find_modules_directly_imported_by(module) for module in graph.modules}).prepare()
