"""What leaves a deployment: a release as files that other programs load, with where it came from."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final

from fedloop_events import files as durable
from fedloop_events import types
from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_events.errors import UsageError
from fedloop_tasks.task import Export, Provenance, Step, Streamed
from msgspec import Struct

from fedloop_server.operations import registry
from fedloop_server.operations.followed import Followed
from fedloop_server.operations.registry import Ancestor

_ROOM_BYTES: Final = 65_536
"""For the folder itself."""


class Exported(Struct, frozen=True):
    """A release in one format, its large files not yet computed."""

    release: str
    form: str
    export: Export


class WrittenFile(Struct, frozen=True):
    """A file of an exported release."""

    name: str
    size_bytes: int
    sha256: str


def export(
    followed: Followed,
    blobs: BlobStore,
    release: str | None,
    form: str | None = None,
    *,
    model_dir: Path | None = None,
    model: str = types.DEFAULT_MODEL,
) -> Exported:
    """`release`, by default the one in force, in the format `form`, by default the task's first.

    Raises `UsageError` for a format that the task does not have and for a release that is unknown or was never published,
    `BlobError` if its blob is gone or its bytes are wrong, `ModelError` for a base model that is needed and not in `model_dir`.
    """
    releases = followed.releases
    state = registry.current(releases, model) if release is None else registry.find(releases, release)
    if state.status != "published":
        raise UsageError(f"release {state.release} was never published", hint="`fedloop release list` shows which were")
    task = registry.task_of_model(releases, state.model)
    form = task.formats[0] if form is None else form
    if form not in task.formats:
        raise UsageError(
            f"this model cannot be exported as {form!r}, but as {' or '.join(task.formats)}",
            hint=f"leave --format out for {task.formats[0]}",
        )
    arrays = tensors.decode(blobs.get(state.blob))
    return Exported(state.release, form, task.export(arrays, provenance(followed, state.release), form, model_dir))


def write(exported: Exported, folder: Path) -> list[WrittenFile]:
    """Make the new folder of the release's files, whole or not at all; they are given in the order in which they were written.

    Raises `UsageError` if the folder is there and not empty, cannot be made, or has no room for them.
    """
    files = exported.export.files
    needed = _ROOM_BYTES + sum(each.size_bytes if isinstance(each, Streamed) else len(each) for each in files.values())
    free = durable.free_bytes(folder)
    if free is not None and free < needed:
        raise UsageError(
            f"the release needs {needed:,} bytes, and {free:,} are free where {folder} is to be",
            hint="make room, or name a folder on another disk",
        )
    found: list[WrittenFile] = []
    try:
        durable.write_folder(folder, {name: _counted(name, data, found) for name, data in files.items()})
    except OSError as error:
        raise UsageError(
            f"the folder {folder} cannot be made",
            cause=durable.reason(error, folder),
            hint="" if durable.is_full(error) else "name one that is new or empty",
        ) from None
    return found


def _counted(name: str, data: bytes | Streamed, found: list[WrittenFile]) -> Iterator[bytes | memoryview]:
    """The chunks of a file, which stands in `found` after the last one."""
    digest, size_bytes = hashlib.sha256(), 0
    for chunk in data.chunks if isinstance(data, Streamed) else (data,):
        digest.update(chunk)
        size_bytes += len(chunk)
        yield chunk
    found.append(WrittenFile(name, size_bytes, digest.hexdigest()))


def provenance(followed: Followed, release: str) -> Provenance:
    """Where a release comes from, as the log has it. Raises `UsageError` as `registry.lineage`."""
    state = registry.find(followed.releases, release)
    ancestors = registry.lineage(followed.rounds, followed.releases, release)
    steps = [
        Step(
            each.release,
            each.base_release,
            each.round_id,
            each.strategy,
            ["" if update.blob is None else update.blob.sha256 for update in each.contributions],
            _mechanism(followed, each),
        )
        for each in ancestors
    ]
    unprotected = [each.round_id for each in steps if each.round_id is not None and each.mechanism is None]
    metrics = {} if state.evaluation is None else state.evaluation.metrics
    epsilon, delta = (0.0, 0.0) if unprotected else _most(followed, ancestors)
    return Provenance(
        release=release,
        model=state.model,
        sha256=state.blob.sha256,
        metrics={name: value for name, value in metrics.items() if value is not None},
        steps=steps,
        unprotected=unprotected,
        epsilon=epsilon,
        delta=delta,
    )


def _mechanism(followed: Followed, step: Ancestor) -> types.Mechanism | None:
    made = followed.rounds.rounds.get(step.round_id or "")
    return None if made is None or made.opened is None else made.opened.mechanism


def _most(followed: Followed, ancestors: Sequence[Ancestor]) -> tuple[float, float]:
    """The largest epsilon of the clients whose updates went in, at that client's delta: of their rounds in this lineage alone."""
    from fedloop_privacy.dp import accounting

    paid: dict[str, list[types.Mechanism]] = {}
    for each in ancestors:
        mechanism = _mechanism(followed, each)
        for contribution in each.contributions:
            paid.setdefault(contribution.client_id, []).extend([] if mechanism is None else [mechanism])
    clients = followed.identities.clients
    return max(
        ((accounting.epsilon(mechanisms, clients[name].delta), clients[name].delta) for name, mechanisms in paid.items()),
        default=(0.0, 0.0),
    )
