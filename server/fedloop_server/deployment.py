"""Making a deployment, and opening the server's side of it.

A deployment is a folder: `server/` with the server's key, its configuration and whatever else is the operator's alone, and
either `log.sqlite` and `blobs/` or a `deployment.toml` that says where log and blobs are. Making one can be killed at any point
and done again: what it decided by chance (name and key) is kept in files that appear whole and are never replaced, and everything
else is a function of them.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Final

import msgspec
import numpy as np
from fedloop_events import envelope, locations, topics, types
from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore, Identifiable
from fedloop_events.errors import InvalidEventError, UsageError
from fedloop_events.files import PRIVATE, SHARED, write_whole
from fedloop_events.folds.identities import Identities
from fedloop_events.ids import derived_id
from fedloop_events.locations import DeploymentLocation
from fedloop_events.logs.port import EventLog, read_all
from fedloop_events.parts import split
from fedloop_events.signatures import SigningKey
from fedloop_events.types import DEFAULT_MODEL
from fedloop_events.writer import EventWriter
from fedloop_tasks.table import task_of
from fedloop_tasks.task import Plan
from msgspec import Struct

from fedloop_server import config as configuration
from fedloop_server.config import ServerConfig

SERVER_FOLDER: Final = locations.SERVER_FOLDER
KEY_FILE: Final = "key.pem"
CONFIG_FILE: Final = "server.toml"
INTENT_FILE: Final = "deployment.json"
PLAN_FILE: Final = "plan.json"
_FIRST_FILES: Final = (locations.PLACE_FILE, *(locations.LOG_FILE + end for end in ("", "-wal", "-shm", "-journal")))
"""What a run writes before the intent."""


class Deployment(Struct, frozen=True):
    """The server's side of a deployment, opened."""

    folder: Path
    """`DIR/server`: the operator's alone."""
    log: EventLog
    blobs: BlobStore
    writer: EventWriter
    """Speaks with the server's key."""
    config: ServerConfig

    @property
    def plan_file(self) -> Path:
        """Where the planner keeps its noise multipliers, which take seconds to find."""
        return self.folder / PLAN_FILE


class _Intent(Struct, frozen=True, forbid_unknown_fields=True):
    """What the folder is to become; written before anything else."""

    origin: types.Identifier
    spec: types.Spec
    initial: types.BlobRef


def create_deployment(
    directory: Path | str,
    spec: types.Spec,
    initial_arrays: Mapping[str, tensors.Array],
    config: ServerConfig,
    place: DeploymentLocation | None = None,
) -> Deployment:
    """Make a deployment whose release 0 is `initial_arrays`; one that is there already, of the same model, is opened as it is.

    Its log and blobs are at `place`, which the folder remembers; by default in the folder itself. Raises `UsageError` if the
    folder holds anything else or has lost its log, the log holds another deployment, or if the arrays are not finite F32 tensors
    that the task takes for a model of this spec.
    """
    root = Path(directory)
    folder = root / SERVER_FOLDER
    place = place or locations.locate(root)
    if place.blobs is None:
        raise UsageError("nothing says where the blobs shall be", hint="name their folder or URL with --blobs")
    _check(spec, initial_arrays)
    chunks = list(tensors.encode(initial_arrays))
    initial = _reference(chunks)
    begun = (folder / INTENT_FILE).exists()
    if not begun:
        _check_empty(root)
    # The log is made before anything else: a folder that has begun and whose log is gone has lost it.
    lost = begun and not locations.is_url(place.log) and place.log == locations.locate(root).log
    with closing(locations.open_log(place.log, create=not lost)) as log:
        _check_free(log, folder / KEY_FILE)
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        _remember(root, place)
        fresh = _Intent(f"fedloop-{secrets.token_hex(8)}", spec, initial)
        _once(folder / INTENT_FILE, msgspec.json.encode(fresh))
        intent = _read_intent(folder / INTENT_FILE)
        if (intent.spec, intent.initial) != (spec, initial):
            raise UsageError(
                f"{directory} holds a deployment of another model or of other initial tensors", hint="choose another folder"
            )
        _once(folder / KEY_FILE, SigningKey.generate().to_pem())
        _once(folder / CONFIG_FILE, configuration.dump(config).encode())
        locations.open_blobs(place.blobs).put(chunks)
        _announce(EventWriter(log, SigningKey.load(folder / KEY_FILE)), intent)
    return open_deployment(root, place)


def open_deployment(directory: Path | str, place: DeploymentLocation | None = None) -> Deployment:
    """The server's side of the deployment in a folder, whose log and blobs are at `place` if they are not where the folder says.

    Raises `UsageError` if there is none, its making was cut short, or the log is another deployment's.
    """
    root = Path(directory)
    folder = root / SERVER_FOLDER
    place = place or locations.locate(root)
    log = locations.open_log(place.log)
    if not (folder / KEY_FILE).exists():
        raise UsageError(
            f"{directory} holds no server's key", hint=f"run this where the server was set up, or restore {folder / KEY_FILE}"
        )
    key, config = SigningKey.load(folder / KEY_FILE), configuration.load(folder / CONFIG_FILE, _plan(folder / INTENT_FILE))
    blobs = locations.open_blobs(place.blobs)
    for each in (log, blobs):
        if isinstance(each, Identifiable):
            each.identify("server", key)
    if _server_key(log) != key.public_key:
        raise UsageError(
            f"the log is not the one of the deployment in {directory}",
            hint="name that log; or, if its making was cut short, run `fedloop server init` again as before, to its end",
        )
    return Deployment(folder, log, blobs, EventWriter(log, key), config)


def read_config(directory: Path | None) -> ServerConfig | None:
    """The server's configuration, where its folder is at hand. Raises as `configuration.load`."""
    folder = None if directory is None else directory / SERVER_FOLDER
    if folder is None or not (folder / CONFIG_FILE).is_file():
        return None
    return configuration.load(folder / CONFIG_FILE, _plan(folder / INTENT_FILE))


def _plan(intent_file: Path) -> type[Plan]:
    """What the rounds are planned by: what the deployment's task plans them by. Raises `UsageError`."""
    return task_of(_read_intent(intent_file).spec).plan


def _read_intent(path: Path) -> _Intent:
    try:
        return msgspec.json.decode(path.read_bytes(), type=_Intent)
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(
            f"{path} does not say what the deployment is", cause=str(error), hint="restore it from a backup"
        ) from None


def _check_free(log: EventLog, key_file: Path) -> None:
    """Whoever has the key of the log's deployment may go on with making it; a log holds one deployment."""
    found = _server_key(log)
    if found and not (key_file.exists() and SigningKey.load(key_file).public_key == found):
        raise UsageError(
            "the log holds a deployment already, which was made in another folder",
            hint="run this in that folder, or name a log for this one: on Kafka another prefix, kafka://HOST:PORT/PREFIX",
        )


def _server_key(log: EventLog) -> str:
    """The key of the log's deployment; "" if it has none."""
    identities = Identities()
    for record in read_all(log, (topics.CLIENTS,)):
        with suppress(InvalidEventError):
            payload = envelope.decode(record)
            if payload is not None:
                identities.apply(record, payload)
        if identities.origin:
            break
    return identities.server_key


def _remember(root: Path, place: DeploymentLocation) -> None:
    """Write the `deployment.toml` that `place` takes. Raises `UsageError` if the folder names another place already."""
    text, path = locations.remembered(root, place), root / locations.PLACE_FILE
    if text:
        _once(path, text.encode(), mode=SHARED)  # it says where log and blobs are, to whoever may use them
    if locations.remembered(root, locations.locate(root)) != text:
        raise UsageError(f"{root} is a deployment whose log or blobs are elsewhere", hint=f"see {path}, or choose another folder")


def _announce(writer: EventWriter, intent: _Intent) -> None:
    """What the log does not hold yet, under ids that are functions of the intent: appended once, however often this runs."""
    origin, release = intent.origin, release_id(0, intent.initial)
    *listed, registered = split(types.ModelRegistered(origin=origin, model=DEFAULT_MODEL, spec=intent.spec))
    announced: list[tuple[types.Payload, str]] = [
        (types.DeploymentCreated(origin=origin, public_key=writer.key.public_key), derived_id(origin, "deployment")),
        *((part, derived_id(origin, DEFAULT_MODEL, "registered", "part", number)) for number, part in enumerate(listed)),
        (registered, derived_id(origin, DEFAULT_MODEL, "registered")),
        (
            types.ReleaseProposed(origin=origin, model=DEFAULT_MODEL, epoch=0, release=release, number=0, blob=intent.initial),
            derived_id(origin, DEFAULT_MODEL, release, "proposed"),
        ),
        (
            types.ReleasePublished(origin=origin, model=DEFAULT_MODEL, epoch=0, release=release, number=0, blob=intent.initial),
            derived_id(origin, DEFAULT_MODEL, release, "decided"),
        ),
    ]
    there = {record.id for record in read_all(writer.log, (topics.CLIENTS, topics.RELEASES))}
    for payload, event_id in announced:
        if event_id not in there:  # one by one: between topics a log has the order of its clock, and the deployment comes first
            writer.log.append([writer.event(payload, id=event_id)])


def release_id(number: int, blob: types.BlobRef) -> str:
    """The name of a release: its number and the beginning of its hash."""
    return f"{number:04d}-{blob.sha256[:12]}"


def _check(spec: types.Spec, arrays: Mapping[str, tensors.Array]) -> None:
    for payload in split(types.ModelRegistered(origin="x" * 80, model=DEFAULT_MODEL, spec=spec)):
        envelope.expect(envelope.encode(payload, id="0" * 32, time_s=0), type(payload))
    task_of(spec).check(arrays)
    for each in tensors.specs(arrays):
        if each.dtype != "F32" or not bool(np.isfinite(arrays[each.name]).all()):
            raise UsageError(f"the initial tensor {each.name} does not hold finite float32 numbers")


def _check_empty(root: Path) -> None:
    """Nothing may be there but what a run that was killed before its first file leaves."""
    try:
        found = {path.name for path in root.iterdir()} if root.exists() else set()
        within = [path.name for path in (root / SERVER_FOLDER).iterdir()] if SERVER_FOLDER in found else []
    except OSError as error:
        raise UsageError(f"{root} is no folder that can be read", cause=error.strerror or "") from None
    others = {name for name in found - {SERVER_FOLDER, *_FIRST_FILES} if not name.startswith(f".{locations.PLACE_FILE}.")}
    if others or not all(name.startswith(f".{INTENT_FILE}.") for name in within):
        raise UsageError(f"{root} is not empty and holds no deployment", hint="choose a folder that is empty or does not exist")


def _reference(chunks: Sequence[bytes | memoryview]) -> types.BlobRef:
    digest = hashlib.sha256()
    for chunk in chunks:
        digest.update(chunk)
    return types.BlobRef(digest.hexdigest(), sum(map(len, chunks)))


def _once(path: Path, data: bytes, *, mode: int = PRIVATE) -> None:
    """Write the file, unless it is there: it appears whole, and of two processes the first one's holds."""
    if not path.exists():
        write_whole(path, data, mode=mode, replace=False)
