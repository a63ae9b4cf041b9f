"""A deployment without a server: the tests append themselves what a server would."""

from __future__ import annotations

import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import pytest
from fedloop_clients import Agent, keys
from fedloop_clients.device import Status
from fedloop_events import types
from fedloop_events.blobs import tensors
from fedloop_events.envelope import decode
from fedloop_events.flower.records import content_sha256
from fedloop_events.locations import BLOB_FOLDER, open_blobs, open_log
from fedloop_events.logs.port import read_all
from fedloop_events.masked import MaskedText
from fedloop_events.signatures import SigningKey
from fedloop_events.types import BlobRef, Content, Mechanism, RoundOpened
from fedloop_events.writer import EventWriter
from fedloop_privacy.masking import MaskingError

if TYPE_CHECKING:
    from clients.classified import Classified

P = TypeVar("P", bound=types.Payload)
_UNSPOKEN = pytest.StashKey[str]()
ORIGIN = "test.example"
DEAD = ["folder", "http refused", "http silent", "kafka refused", "kafka silent"]
"""Kinds of `dead_location`."""
LABELS = ["card-lost", "loan", "transfer"]
MECHANISM = Mechanism(sampling_rate=1.0, noise_multiplier=2.0, clip_norm=1.0, steps=1, divisor=1.0)
"""Costs an epsilon of 1.99 at delta 1e-5."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Nothing in Python speaks as espeak-ng does: where it is not installed, what needs it is left out, and a line says so."""
    wanting = [item for item in items if item.get_closest_marker("speech")]
    if wanting and shutil.which("espeak-ng") is None:
        config.hook.pytest_deselected(items=wanting)
        items[:] = [item for item in items if item not in wanting]
        config.stash[_UNSPOKEN] = f"{len(wanting)} tests of speech were left out: espeak-ng is not installed"


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    if unspoken := config.stash.get(_UNSPOKEN, ""):
        terminalreporter.write_line(unspoken, yellow=True)


class DigitMasker:
    """Masks digits, and fails on certain texts."""

    def mask(self, text: str) -> MaskedText:
        if "unmaskable" in text:
            raise MaskingError("no", cause="the deadline passed")
        if "explosive" in text:
            raise ValueError(text)
        masked, count = re.subn(r"\d+", "<NUMBER_1>", text)
        return MaskedText._from_masker(masked, {"NUMBER": count} if count else {})


@contextmanager
def clock_ahead(seconds: float) -> Iterator[None]:
    """The clock by which this process stamps what it appends is wrong for a while."""
    right = time.time_ns
    with pytest.MonkeyPatch.context() as wrong:
        wrong.setattr(time, "time_ns", lambda: right() + int(seconds * 1e9))
        yield


def settled(status: Status) -> bool:
    return status.settled


def answered(count: int = 1) -> Callable[[Status], bool]:
    return lambda status: sum(status.answers.values()) >= count and status.unsent == 0


def back_up(agent: Agent, folder: Path) -> None:
    """Copy the store of an agent that is open, whole."""
    agent._device.store._writable().execute("PRAGMA wal_checkpoint(TRUNCATE)")
    shutil.copytree(agent._device.store.path.parent, folder)


def unpack(recorded: Path, folder: Path) -> None:
    """Copy a recorded device and its deployment to where they may be changed."""
    for name in ("device", "deployment"):
        shutil.copytree(recorded / name, folder / name)
    (folder / "device" / keys.KEY_FILE).chmod(0o600)


@contextmanager
def dead_location(kind: str, folder: Path) -> Iterator[str]:
    """A location at which no log answers: it is gone, it refuses, or it takes every connection and never says a word."""
    scheme, _, how = kind.partition(" ")
    if scheme == "folder":
        yield str(folder / "gone")
        return
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"{scheme}://127.0.0.1:{listener.getsockname()[1]}"
        if how == "refused":
            listener.close()
        yield address


class Deployment:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.log, self.blobs = open_log(folder, create=True), open_blobs(folder / BLOB_FOLDER)
        self.server = EventWriter(self.log, SigningKey.generate())
        self.server.append(types.DeploymentCreated(origin=ORIGIN, public_key=self.server.key.public_key))
        self.rounds = self.releases = 0

    def register(self) -> None:
        spec = types.ClassificationSpec(
            base_model="none", base_sha256="0" * 64, labels=LABELS, rank=1, alpha=1.0, targets=["query"], layers=1
        )
        self.server.append(types.ModelRegistered(origin=ORIGIN, model="default", spec=spec))
        self.server.append(types.EpochStarted(origin=ORIGIN, epoch=1, run_id="main", server_id="s1"))

    def put(self) -> BlobRef:
        """The blob of the next release."""
        return self.blobs.put(tensors.encode({"head.weight": np.full((3, 2), self.releases, np.float32)}))

    def release(self) -> str:
        blob = self.put()
        release = f"{self.releases:04d}-{blob.sha256[:12]}"
        proposed = types.ReleaseProposed(
            origin=ORIGIN, model="default", epoch=1, release=release, number=self.releases, blob=blob
        )
        published = types.ReleasePublished(
            origin=ORIGIN, model="default", epoch=1, release=release, number=self.releases, blob=blob
        )
        self.server.append(proposed, published)
        self.base, self.base_release = blob, release
        self.releases += 1
        return release

    def opened(
        self, *cohort: str, mechanism: Mechanism | None = MECHANISM, epoch: int = 1, deadline_s: float = 600
    ) -> RoundOpened:
        """The terms of a new round; nothing is appended yet."""
        self.rounds += 1
        return RoundOpened(
            origin=ORIGIN,
            epoch=epoch,
            run_id="main",
            round_id=f"r{self.rounds:04d}",
            request_id="q",
            number=self.rounds,
            model="default",
            base_release=self.base_release,
            base=self.base,
            strategy="ffa",
            cohort=list(cohort),
            quorum=1,
            deadline_s=deadline_s,
            upload=["x"],
            max_upload_bytes=10_000,
            max_update_norm=10.0,
            mechanism=mechanism,
        )

    def instruct(
        self,
        client_id: str,
        opened: RoundOpened | None,
        *,
        message_type: str = "train",
        ttl_s: float = 600,
        base: BlobRef | None = None,
        run_id: str = "main",
        step: int = 0,
    ) -> str:
        """Send one instruction of a round (or of none); its event id."""
        content = Content(arrays={"arrays": base or (opened.base if opened else self.base)})
        sent = types.InstructionSent(
            origin=ORIGIN,
            epoch=opened.epoch if opened else 1,
            run_id=opened.run_id if opened else run_id,
            step=step,
            client_id=client_id,
            message_type=message_type,
            content=content,
            content_sha256=content_sha256(message_type, client_id, content),
            round_id=opened.round_id if opened else None,
            ttl_s=ttl_s,
        )
        return self.server.append(sent)[0].id

    def ask(self, client_id: str, mechanism: Mechanism | None = MECHANISM) -> str:
        """Open a round for one client; the id of its instruction."""
        opened = self.opened(client_id, mechanism=mechanism)
        self.server.append(opened)
        return self.instruct(client_id, opened)

    def appended(self, kind: type[P]) -> list[P]:
        """Every event of a type, in the order of the log."""
        return [payload for record in read_all(self.log) if isinstance(payload := decode(record), kind)]

    def bytes(self) -> bytes:
        """All that the deployment keeps."""
        return b"".join(path.read_bytes() for path in sorted(self.folder.rglob("*")) if path.is_file())


@pytest.fixture
def deployment(tmp_path: Path) -> Iterator[Deployment]:
    made = Deployment(tmp_path / "deployment")
    made.register()
    made.release()
    yield made
    made.log.close()


@pytest.fixture
def masker() -> DigitMasker:
    return DigitMasker()


@pytest.fixture
def store_dir(tmp_path: Path) -> Path:
    return tmp_path / "store"


@pytest.fixture
def agent(deployment: Deployment, store_dir: Path, masker: DigitMasker) -> Iterator[Agent]:
    with Agent.enrol(deployment.folder, store_dir, client_id="phone", key_from="file", masker=masker) as agent:
        yield agent


@pytest.fixture(scope="module")
def classified(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Classified]:
    """A deployment with a real model."""
    from clients.classified import classified_in  # imports torch

    made = classified_in(tmp_path_factory.mktemp("classified"))
    yield made
    made.log.close()
