"""Base images for tests of the Dockerfiles and of docker-compose.yml, made of what this machine has: no registry is asked.

They stand in for the images that the files name: this Python (its installed packages are known to pip there, and are mounted at
`/deps` when a container runs), and this Java with Kafka's jars, under the names and paths of the official image.
"""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from collections.abc import Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Final

PROGRAMS: Final = ("sh", "chown", "cp", "env", "install", "mkdir", "mv", "rm", "touch")
DEPS: Final = "/deps"
_SITE: Final = "usr/local/lib/python3.11/site-packages"
_BUILDERS: Final = ("hatchling", "packaging", "pathspec", "pip", "pluggy", "tomlkit", "trove-classifiers")
"""What the build stage runs, as opposed to what it finds installed."""
_KAFKA: Final = {
    "kafka-server-start.sh": "kafka.Kafka",
    "kafka-storage.sh": "kafka.tools.StorageTool",
    "kafka-topics.sh": "org.apache.kafka.tools.TopicCommand",
}


def import_python(tag: str) -> None:
    """An image with this Python and a shell. Of the packages it has what pip looks at; `DEPS` is where they are to be mounted."""
    with _importing(tag, ["ENV LD_LIBRARY_PATH=/usr/local/lib", "CMD python"]) as tar:
        _add_skeleton(tar)
        binary = Path(sys.executable).resolve()
        tar.add(binary, "usr/local/bin/python3.11")
        for name in ("python", "python3"):
            _link(tar, f"usr/local/bin/{name}", "python3.11")
        stdlib = Path(sysconfig.get_path("stdlib"))
        left_out = {"site-packages", "dist-packages", "test", "__pycache__", "idlelib", "tkinter", "ensurepip"}
        tar.add(stdlib, "usr/local/lib/python3.11", filter=lambda info: None if Path(info.name).name in left_out else info)
        _add_packages(tar)
        programs = [Path(path) for name in PROGRAMS if (path := shutil.which(name))]
        for program in programs:
            tar.add(program.resolve(), f"usr/bin/{program.name}")
        installed = Path(sysconfig.get_path("platlib"))
        compiled = [*(stdlib / "lib-dynload").glob("*.so"), *installed.rglob("*.so*")]
        _add_libraries(tar, [binary, *programs, *compiled])


def import_kafka(tag: str, jars: Path) -> None:
    """An image with this Java and `jars`, and the programs of the official image that docker-compose.yml calls."""
    java = Path(shutil.which("java") or "java").resolve()
    home = java.parent.parent
    with _importing(tag, ["ENV PATH=/opt/kafka/bin:/opt/java/bin:/usr/bin LD_LIBRARY_PATH=/usr/local/lib"]) as tar:
        _add_skeleton(tar)
        left_out = {"jmods", "man", "include", "demo", "src.zip", "legal"}
        for path in _files(home, left_out):
            tar.addfile(*_as_file(path, f"opt/java/{path.relative_to(home)}"))
        for jar in sorted(jars.glob("*.jar")):
            tar.add(jar, f"opt/kafka/libs/{jar.name}")
        for name, main in _KAFKA.items():
            quick = "$KAFKA_HEAP_OPTS -XX:+UseSerialGC -XX:TieredStopAtLevel=1"
            text = f'#!/bin/sh\nexec java {quick} -cp "/opt/kafka/libs/*" {main} "$@"\n'
            _write(tar, f"opt/kafka/bin/{name}", text, mode=0o755)
        shell = Path(shutil.which("sh") or "/bin/sh")
        tar.add(shell.resolve(), "usr/bin/sh")
        _add_libraries(tar, [shell, java, *home.rglob("*.so")])


class _Importing:
    """A tar file that is written into `docker import` as it is made."""

    def __init__(self, tag: str, changes: Iterable[str]) -> None:
        options = [each for change in changes for each in ("--change", change)]
        self._docker = subprocess.Popen(
            ["docker", "import", *options, "-", tag], stdin=subprocess.PIPE, stdout=subprocess.DEVNULL
        )

    def __enter__(self) -> tarfile.TarFile:
        self._tar = tarfile.open(fileobj=self._docker.stdin, mode="w|", format=tarfile.PAX_FORMAT)
        return self._tar

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._tar.close()
        assert self._docker.stdin is not None
        self._docker.stdin.close()
        status = self._docker.wait()
        assert kind is not None or status == 0, "docker import failed"


_importing = _Importing


def _add_skeleton(tar: tarfile.TarFile) -> None:
    for name, mode in {"tmp": 0o1777, "proc": 0o555, "sys": 0o555, "dev": 0o755, "etc": 0o755, "var/lib": 0o755}.items():
        _folder(tar, name, mode)
    for name in ("usr/bin", "usr/lib", "usr/lib64"):
        _folder(tar, name, 0o755)
    for name in ("bin", "lib", "lib64"):
        _link(tar, name, f"usr/{name}")


def _add_packages(tar: tarfile.TarFile) -> None:
    """For each installed package what says that it is there; the build tools wholly."""
    _write(tar, f"{_SITE}/deps.pth", f"{DEPS}\n")
    names = {re.sub(r"[-_.]+", "-", each).lower() for each in _BUILDERS}
    for each in metadata.distributions():
        name = re.sub(r"[-_.]+", "-", each.name).lower()
        text = each.read_text("METADATA")
        if name == "fedloop" or text is None:
            continue
        if name not in names:
            _write(tar, f"{_SITE}/{name.replace('-', '_')}-{each.version}.dist-info/METADATA", text)
            continue
        for file in each.files or []:
            located = Path(str(each.locate_file(file)))
            if ".." not in file.parts and "__pycache__" not in file.parts and located.is_file():
                tar.add(located, f"{_SITE}/{file}")


def _add_libraries(tar: tarfile.TarFile, programs: Iterable[Path]) -> None:
    """The machine's own libraries that `programs` load, all in one folder, and the loader where programs expect it."""
    found: dict[str, Path] = {}
    listed = [str(program) for program in programs]
    for start in range(0, len(listed), 200):
        shown = subprocess.run(["ldd", *listed[start : start + 200]], capture_output=True, text=True, check=False).stdout
        found |= {Path(path).name: Path(path) for path in re.findall(r"(?:=> |\t)(/\S+) \(0x", shown)}
    inside = Path(sysconfig.get_path("platlib")).resolve()
    for name, path in sorted(found.items()):
        if name.startswith("ld-linux"):
            tar.add(path.resolve(), f"usr/lib64/{name}")
        elif not path.resolve().is_relative_to(inside):
            tar.add(path.resolve(), f"usr/local/lib/{name}")


def _files(root: Path, left_out: set[str]) -> Iterator[Path]:
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(set(folders) - left_out)
        yield from (path for name in sorted(files) if (path := Path(folder, name)).is_file() and name not in left_out)


def _as_file(path: Path, name: str) -> tuple[tarfile.TarInfo, io.BytesIO]:
    """The file that `path`, perhaps through links that lead elsewhere, stands for."""
    info = tarfile.TarInfo(name)
    data = path.read_bytes()
    info.size, info.mode = len(data), 0o755 if os.access(path, os.X_OK) else 0o644
    return info, io.BytesIO(data)


def _write(tar: tarfile.TarFile, name: str, text: str, mode: int = 0o644) -> None:
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(text.encode()), mode
    tar.addfile(info, io.BytesIO(text.encode()))


def _folder(tar: tarfile.TarFile, name: str, mode: int) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.mode = tarfile.DIRTYPE, mode
    tar.addfile(info)


def _link(tar: tarfile.TarFile, name: str, target: str) -> None:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    tar.addfile(info)


def site_packages() -> Path:
    """What is to be mounted at `DEPS`."""
    return Path(sysconfig.get_path("platlib")).resolve()
