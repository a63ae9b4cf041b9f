"""The demo's course: a deployment, its devices and its server as processes, waves of feedback, a round after each."""

from __future__ import annotations

import math
import secrets
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
from fedloop_events import locations
from fedloop_events.errors import UnreachableError, UsageError
from fedloop_server.deployment import open_deployment
from fedloop_server.operations import rounds as operations
from fedloop_server.operations.followed import Followed
from fedloop_server.operations.rounds import summaries
from fedloop_tasks.table import name_of
from fedloop_tasks.task import Task
from msgspec import Struct

from fedloop_cli import deploying, documents
from fedloop_cli.demo import device, gateway, users
from fedloop_cli.demo.processes import Child, Nursery
from fedloop_cli.options import Where

DELTA: Final = 1e-5
DEADLINE_S, SPOKEN_DEADLINE_S = 180.0, 600.0
"""For one round: a device that is killed in it has to load everything again. A model that writes answers takes a minute for its
first one, several on a busy machine."""
FEW: Final = 500
FEW_EXAMPLES: Final[dict[str, dict[str, float]]] = {
    "classification": {"sums_share": 0.8, "sampling_rate": 1.0, "steps": 3},
    "chat": {"sampling_rate": 1.0, "server_lr": 0.007},
}
"""By task: of a few hundred examples a device all take part in a step, and most of a classifier's budget goes to the sums. Chosen
on the corpus, which is public."""
STALL_TIMEOUT_S: Final = 900.0
START_TIMEOUT_S: Final = 60.0
POLL_S: Final = 0.25
PATIENCE_S: Final = 30.0
"""For a trigger, once all feedback is published: the gate may hold some back, so that it is not enough."""
ENOUGH: Final = 0.9
"""Of a round's share of the messages."""


_PRINTED: Final = "output"
"""What the processes print, in the demo's folder."""


class Options(Struct, frozen=True):
    """What the user of the demo decides. `epsilon` None is a run without differential privacy; with `gateway` the devices have no
    connection to the log but through one."""

    clients: int
    rounds: int
    epsilon: float | None
    strategy: str
    seed: int
    gateway: bool = False


class Scene:
    """Everything a view shows: it is changed by the course of the demo, and read by the view."""

    def __init__(self, where: Where, task: type[Task], options: Options, given: users.Users) -> None:
        assert where.directory is not None
        self.where, self.directory, self.task, self.options, self.users = where, where.directory, task, options, given
        self.began = time.monotonic()
        self.doing = "making the deployment"
        self.devices = [f"device-{number + 1}" for number in range(options.clients)]
        self.progress = {name: device.Progress(0) for name in self.devices}
        self.ready: set[str] = set()
        self.followed: Followed | None = None
        self.events: list[str] = []
        """What a reader should know: restarts, rounds."""
        self.noted: set[str] = set()
        """The rounds that stand there."""

    @property
    def first_wave(self) -> float:
        """Share of the messages that is written before the first round."""
        return users.FIRST_SPOKEN_WAVE if self.task.speaks else users.FIRST_WAVE

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def note(self, what: str) -> None:
        self.events.append(f"{self.seconds:6.1f} s  {what}")


def play(scene: Scene, refresh: Callable[[], None]) -> list[Path]:
    """Run the whole demo; the files that hold what the processes printed. `refresh` is called again and again.

    Every process is gone when this returns or raises. Raises `FedloopError` if a process does not stay up, or nothing happens
    for `STALL_TIMEOUT_S`.
    """
    with _processes(scene, refresh) as children:
        devices = {child.name: child for child in children if child.name in scene.progress}
        ends = {
            name: users.waves(len(messages), scene.options.rounds, scene.first_wave)
            for name, messages in zip(scene.devices, scene.users.devices, strict=True)
        }
        for number in range(scene.options.rounds):
            scene.doing = f"feedback before round {number + 1}"
            for name, messages in zip(scene.devices, scene.users.devices, strict=True):
                first = ends[name][number - 1] if number else 0
                wave = device.Wave(number + 1, first, messages[first : ends[name][number]])
                devices[name].send(msgspec.json.encode(wave))
            _until(scene, children, partial(_published, scene, number + 1), refresh)
            scene.doing = f"round {number + 1}"
            asked = _Asked(scene, number + 1)
            _until(scene, children, asked.ended, refresh)
        scene.doing = "ending the processes"
        refresh()
    return [file for child in children for file in child.files]


def _deploy(scene: Scene) -> None:
    options, given = scene.options, scene.users
    examples = max(2, round(sum(map(len, given.devices)) / options.clients))
    deadline_s = SPOKEN_DEADLINE_S if scene.task.speaks else DEADLINE_S
    settings: dict[str, Any] = {
        "epsilon": "none" if options.epsilon is None else options.epsilon,
        "delta": DELTA,
        "strategy": options.strategy,
        "planned_rounds": max(2, options.rounds),
        "nominal_examples": examples,
        **_against_shift(scene),
        **({} if scene.task.speaks else {"trigger": _triggers(scene)}),
        **(FEW_EXAMPLES.get(name_of(scene.task), {}) if options.epsilon is not None and examples < FEW else {}),
        "quorum": min(2, options.clients),
        "cohort_size": max(2, min(256, options.clients)),
        "deadline_s": deadline_s,
        "quorum_wait_s": deadline_s,
    }
    deploying.deploy(scene.directory, scene.where.place, scene.task, given.material, settings, seed=options.seed)
    scene.followed = scene.where.follow()


def _against_shift(scene: Scene) -> dict[str, Any]:
    """A second round of sums: the first one knows only half of what users will ask, and what training alone learns of the rest at
    this noise is little."""
    options = scene.options
    private = options.epsilon is not None and "sums_rounds" in scene.task.plan.MEANING
    return {"sums_rounds": 2} if private and options.rounds > 2 else {}


def _triggers(scene: Scene) -> dict[str, dict[str, Any]]:
    """Enough feedback for a round, and what is to be found when the users ask for something else."""
    messages, rounds = sum(map(len, scene.users.devices)), scene.options.rounds
    smallest = min(scene.first_wave, (1 - scene.first_wave) / (rounds - 1)) if rounds > 1 else 1.0
    count = max(1, int(ENOUGH * smallest * messages))
    always = {"cooldown_s": 0.0, "max_per_day": 100}
    fell = {"kind": "drift", "metrics": ["satisfaction"], "after": count * 3 // 4, "priority": 80, **always}
    return {"enough": {"kind": "feedback", "count": count, **always}, "fell": fell}


@contextmanager
def _processes(scene: Scene, refresh: Callable[[], None]) -> Iterator[list[Child]]:
    """The deployment, and everybody in it. The nursery loads while the deployment is made."""
    printed = scene.directory / _PRINTED
    children: list[Child] = []
    with tempfile.TemporaryDirectory() as aside:
        nursery = Nursery(Path(aside), scene.task)
        try:
            _deploy(scene)
            printed.mkdir()
            scene.doing = "starting the processes"
            refresh()
            children.append(Child("server", nursery, "server", str(scene.directory), printed))
            children.append(Child("feedback", nursery, "feedback", str(scene.directory), printed))
            place = scene.where.place
            if scene.options.gateway:
                place = _gateway(scene, nursery, children, printed)
            for name, messages in zip(scene.devices, scene.users.devices, strict=True):
                store = scene.directory / "devices" / name
                terms = device.DeviceSettings(
                    place.log, place.blobs, str(store), name, scene.options.epsilon, DELTA, -(-len(messages) // users.ASKED)
                )
                receive = partial(_receive, scene, name)
                children.append(Child(name, nursery, "device", msgspec.json.encode(terms).decode(), printed, receive))
            yield children
        except BaseException:
            for child in children:
                child.kill()
            raise
        finally:
            # The devices first: each ends with what it appends, for which it needs the gateway.
            devices = [child for child in children if child.name in scene.progress]
            for group in (devices, [child for child in children if child not in devices]):
                for child in group:
                    child.end()
                for child in group:
                    child.join()
            nursery.end()


def _gateway(scene: Scene, nursery: Nursery, children: list[Child], printed: Path) -> locations.DeploymentLocation:
    """Start a gateway, one of `children`, and wait until it listens; where the devices find log and blobs."""
    terms, location = gateway.prepare(scene.where.place, scene.directory / "gateway")
    listens = threading.Event()
    children.append(
        Child("gateway", nursery, "gateway", msgspec.json.encode(terms).decode(), printed, lambda line: listens.set())
    )
    if not listens.wait(START_TIMEOUT_S):
        raise UnreachableError("the gateway does not listen", hint=f"see {printed / 'gateway.err'}")
    return locations.DeploymentLocation(location, location)


def _receive(scene: Scene, name: str, line: bytes) -> None:
    try:
        progress = msgspec.json.decode(line, type=device.Progress)
    except msgspec.MsgspecError:
        return
    scene.ready.add(name)
    known = scene.progress[name]
    scene.progress[name] = device.Progress(progress.given, max(known.wave, progress.wave), progress.unmasked)


def _until(scene: Scene, children: list[Child], done: Callable[[], bool], refresh: Callable[[], None]) -> None:
    """Look after the processes until `done`. Raises `UnreachableError` if nothing happens for too long."""
    seen: object = None
    deadline = time.monotonic() + STALL_TIMEOUT_S
    assert scene.followed is not None
    while not done():
        for child in children:
            if child.look():
                scene.ready.discard(child.name)
                scene.note(f"{child.name} was gone: started again as process {child.pid}")
        now = (dict(scene.progress), scene.followed.log.end())
        if now != seen:
            seen, deadline = now, time.monotonic() + STALL_TIMEOUT_S
        elif time.monotonic() > deadline:
            raise UnreachableError(
                f"nothing has happened for {STALL_TIMEOUT_S:.0f} s ({scene.doing})",
                hint=f"see what the processes have printed: {scene.directory / _PRINTED}",
            )
        _note_rounds(scene)
        refresh()
        time.sleep(POLL_S)
        scene.followed.catch_up()


def _published(scene: Scene, wave: int) -> bool:
    return all(progress.wave >= wave for progress in scene.progress.values())


class _Asked:
    """A round that a trigger asks for, or that the demo does: at once where it has no triggers, or after some patience."""

    def __init__(self, scene: Scene, number: int) -> None:
        self._scene, self._number = scene, number
        self._asks_at = 0.0 if scene.task.speaks else time.monotonic() + PATIENCE_S

    def ended(self) -> bool:
        """Whether so many rounds are over."""
        assert self._scene.followed is not None
        rounds = self._scene.followed.rounds
        if sum(each.over for each in summaries(self._scene.followed)) >= self._number:
            return True
        if rounds.pending is None and rounds.open_round is None and time.monotonic() > self._asks_at:
            self._asks_at = math.inf
            self._ask()
        return False

    def _ask(self) -> None:
        deployment = open_deployment(self._scene.directory, self._scene.where.place)
        with closing(deployment.log):
            operations.request(deployment.writer, 1, f"demo, round {self._number}")


def _note_rounds(scene: Scene) -> None:
    """What came of the rounds since it was last called, and what the pipeline has found."""
    assert scene.followed is not None
    for each in summaries(scene.followed):
        if each.over and each.round_id not in scene.noted:
            scene.noted.add(each.round_id)
            what = documents.figure(each.evaluation, 3) if each.evaluation is not None else each.aborted
            scene.note(f"{each.round_id} {each.state}: {len(each.participants)} took part, {what} ({each.reason})")


def stage(directory: Path | None, log: str | None, blobs: str | None) -> Where:
    """Where the run takes place: in the folder that was chosen, which must be empty, or a new temporary one. A log elsewhere that
    is not named gets a name of its own, for every run is a new deployment. Raises `UsageError`.
    """
    if log is not None and locations.scheme_of(log) == "kafka":
        before, mark, query = log.partition("?")
        if not before.partition("://")[2].partition("/")[2]:
            log = f"{before.rstrip('/')}/fedloop-demo-{secrets.token_hex(4)}{mark}{query}"
    elif log is not None and locations.is_url(log):
        raise UsageError("the demo has a server, which writes to the log itself", hint="--log kafka://HOST:PORT, or a folder")
    folder = _folder(directory)
    return Where(folder, locations.locate(folder, log, folder / locations.BLOB_FOLDER if blobs is None else blobs))


def _folder(chosen: Path | None) -> Path:
    if chosen is None:
        return Path(tempfile.mkdtemp(prefix="fedloop-demo-"))
    try:
        chosen.mkdir(parents=True, exist_ok=True)
        empty = not any(chosen.iterdir())
    except OSError as error:
        raise UsageError(f"{chosen} cannot be used", cause=error.strerror or "") from None
    if not empty:
        raise UsageError(f"{chosen} is not empty", hint="every run of the demo is a new deployment: name a new folder")
    return chosen
