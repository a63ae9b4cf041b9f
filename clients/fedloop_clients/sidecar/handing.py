"""Handing the device's releases to the server that answers in its place: each once, and again if that server has lost it."""

from __future__ import annotations

import asyncio
import logging
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final, Literal, Protocol

from fedloop_events import files
from fedloop_events.errors import FedloopError
from fedloop_tasks.task import Export, Streamed

from fedloop_clients.agent import Agent
from fedloop_clients.releases import NoReleaseError
from fedloop_clients.sidecar.chunks import one_line
from fedloop_clients.sidecar.errors import ApiError
from fedloop_clients.sidecar.upstream import Upstream

_logger = logging.getLogger(__name__)

Kind = Literal["vllm", "llama.cpp"]
THREAD: Final = "fedloop-releases"
"""The name of the thread that hands releases over. It is a daemon: a server that is away holds up nobody's exit."""
PERIOD_S: Final = 30.0
"""How soon a new release is handed over, and one again that was refused or lost."""
SOON_S: Final = 2.0
PREFIX: Final = "fedloop-"
"""What an adapter's name begins with, before the release's id."""
ADAPTER: Final = "adapter.gguf"


class Hands(Protocol):
    """Who hands a release over."""

    def hand(self) -> None:
        """Hand over the release that answers, unless that was done. Raises `ApiError`, `FedloopError` and OSError."""


class ToVllm:
    """Loads each release as an adapter that is named after it, from a folder of its name; requests for the sidecar's own name of
    the model go to the newest. What came before it is unloaded and deleted one call later: an answer may just have begun.

    The server itself says which it has, so that nothing needs to be remembered. The folder is this device's alone.
    """

    def __init__(self, agent: Agent, upstream: Upstream, folder: Path) -> None:
        self._agent, self._upstream, self._folder = agent, upstream, folder.absolute()

    def hand(self) -> None:
        name = f"{PREFIX}{self._agent.release}"
        there = asyncio.run(self._upstream.known())
        if name in there:
            self._upstream.adapter = name
            self._forget_others(name, there)
            return
        if not (self._folder / name).is_dir():
            release, export = self._agent.export("peft")
            name = f"{PREFIX}{release}"  # another one may have come meanwhile
            self._folder.mkdir(parents=True, exist_ok=True)
            if not (self._folder / name).is_dir():
                _write_folder(self._folder / name, export)
        asyncio.run(self._upstream.load_adapter(name, self._folder / name))
        self._upstream.adapter = name

    def _forget_others(self, name: str, there: list[str]) -> None:
        for each in self._folder.glob(f"{PREFIX}*/adapter_config.json"):
            if (other := each.parent).name == name:
                continue
            if other.name in there:
                asyncio.run(self._upstream.unload_adapter(other.name))
            shutil.rmtree(other)


class ToFile:
    """Writes each release over the one before it, as the file that llama.cpp's server reads when it starts."""

    def __init__(self, agent: Agent, folder: Path) -> None:
        self._agent, self._path = agent, folder.absolute() / ADAPTER
        self._written = ""
        """The release that the file holds, as far as this process knows."""

    def hand(self) -> None:
        if self._agent.release == self._written and self._path.exists():
            return
        release, export = self._agent.export("gguf")
        data = {name: b"".join(_chunks(each)) for name, each in export.files.items()}
        new = not self._path.exists() or self._path.read_bytes() != data[ADAPTER]
        if new:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            for name in sorted(data, key=lambda name: name == ADAPTER):
                files.write_whole(self._path.with_name(name), data[name])
        self._written = release
        if new:
            _logger.warning(
                "release %s is in %s, and llama.cpp's server loads it when it starts: restart it with --lora %s",
                release,
                self._path,
                files.quoted(self._path),
            )


def to(kind: Kind, agent: Agent, upstream: Upstream, folder: Path) -> Hands:
    """Who hands releases to a server of this kind through the `folder`."""
    return ToVllm(agent, upstream, folder) if kind == "vllm" else ToFile(agent, folder)


class Handing:
    """Hands over, time after time. What goes wrong is one line in the log, until something else does or it goes well."""

    def __init__(self, hands: Hands) -> None:
        self._hands, self._problem = hands, ""

    def step(self) -> None:
        """One attempt; it raises nothing."""
        problem = ""
        try:
            self._hands.hand()
        except NoReleaseError:
            pass  # it is waited for, as answers wait
        except ApiError as error:
            problem = error.message
        except FedloopError as error:
            problem = "; ".join(each for each in (error.message, error.cause, error.hint) if each)
        except OSError as error:
            path = Path(error.filename or ".")
            problem = f"{path}: {files.reason(error, path)}"
        except Exception as error:
            problem = one_line(f"{type(error).__name__}: {error}")
        if problem and problem != self._problem:
            _logger.warning("the release could not be handed to the upstream server, and is tried again: %s", problem)
        self._problem = problem

    def run(self, stop: threading.Event) -> None:
        while not stop.is_set():
            self.step()
            stop.wait(PERIOD_S)


@contextmanager
def handing(hands: Hands) -> Iterator[None]:
    """Within it releases are handed over in a thread; neither answers nor rounds wait for it."""
    stop = threading.Event()
    thread = threading.Thread(target=Handing(hands).run, args=(stop,), name=THREAD, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join(SOON_S)


def _write_folder(path: Path, export: Export) -> None:
    for left in path.parent.glob(f".{PREFIX}*"):  # by a process that was killed while it wrote
        shutil.rmtree(left, ignore_errors=True)
    try:
        files.write_folder(path, {name: each if isinstance(each, bytes) else each.chunks for name, each in export.files.items()})
    except OSError as error:
        error.filename = error.filename or str(path)  # writing names no file
        raise


def _chunks(file: bytes | Streamed) -> Iterator[bytes | memoryview]:
    yield from (file,) if isinstance(file, bytes) else file.chunks
