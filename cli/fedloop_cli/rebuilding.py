"""`fedloop release rebuild`: a release made again of release 0 and the updates in the log, and compared byte by byte."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from fedloop_events import locations, tensors
from fedloop_events.errors import UsageError
from msgspec import Struct

from fedloop_cli import state


class Step(Struct, frozen=True):
    """One release on the way, and the SHA-256 that it has and that its rebuild has."""

    release: str
    round_id: str | None
    sha256: str
    rebuilt_sha256: str


class Rebuilt(Struct, frozen=True):
    """The release that was asked for. `updates` is how many went in, over its whole lineage."""

    release: str
    sha256: str
    rebuilt_sha256: str
    identical: bool
    """Whether it, and every release before it, has the same bytes."""
    updates: int
    steps: list[Step]


def rebuild(directory: Path, release: str | None = None) -> Rebuilt:
    """Merge every round of the release's lineage again, from release 0 on; the one in force if none is named.

    Of the stored releases only the first one is read. Raises `UsageError` for an unknown release, `BlobError`, `TensorError` or
    `MergeError` if an update is gone or damaged.
    """
    from fedloop_server import registry
    from fedloop_server.merging import merge

    followed, blobs = state.open_state(directory), locations.open_blobs(directory)
    if release is None:
        release = registry.current(followed.releases, state.MODEL).release
    lineage = registry.lineage(followed.rounds, followed.releases, release)[::-1]
    arrays: dict[str, Any] = {}
    steps: list[Step] = []
    for ancestor in lineage:
        if ancestor.round_id is None:
            arrays = tensors.decode(blobs.get(registry.find(followed.releases, ancestor.release).blob))
        else:
            made = followed.round(ancestor.round_id)
            if made.opened is None or made.closed is None:
                raise UsageError(f"round {ancestor.round_id} is not closed")
            arrays = merge(blobs, made.opened, arrays, made.closed.accepted)
        steps.append(Step(ancestor.release, ancestor.round_id, ancestor.sha256, _sha256(arrays)))
    identical = all(step.sha256 == step.rebuilt_sha256 for step in steps)
    last, updates = steps[-1], sum(len(ancestor.contributions) for ancestor in lineage)
    return Rebuilt(release, last.sha256, last.rebuilt_sha256, identical, updates, steps)


def as_document(rebuilt: Rebuilt) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.to_builtins(rebuilt)
    return document


def _sha256(arrays: Mapping[str, np.ndarray[Any, np.dtype[Any]]]) -> str:
    digest = hashlib.sha256()
    for chunk in tensors.encode(arrays):
        digest.update(chunk)
    return digest.hexdigest()
