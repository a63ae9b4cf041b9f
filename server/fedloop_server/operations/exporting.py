"""What leaves a deployment: a release as files that other programs load, with where it came from."""

from __future__ import annotations

from collections.abc import Sequence

from fedloop_events import types
from fedloop_events.blobs import tensors
from fedloop_events.blobs.store import BlobStore
from fedloop_events.errors import UsageError
from fedloop_tasks.task import Provenance, Step
from msgspec import Struct

from fedloop_server.operations import registry
from fedloop_server.operations.followed import Followed
from fedloop_server.operations.registry import Ancestor


class Exported(Struct, frozen=True):
    """A release, and its files by name."""

    release: str
    files: dict[str, bytes]


def export(followed: Followed, blobs: BlobStore, release: str | None, model: str = types.DEFAULT_MODEL) -> Exported:
    """The files of `release`, by default of the one in force.

    Raises `UsageError` for a release that is unknown or was never published, `BlobError` if its blob is gone or its bytes are
    wrong.
    """
    releases = followed.releases
    state = registry.current(releases, model) if release is None else registry.find(releases, release)
    if state.status != "published":
        raise UsageError(f"release {state.release} was never published", hint="`fedloop release list` shows which were")
    arrays = tensors.decode(blobs.get(state.blob))
    return Exported(
        state.release, registry.task_of_model(releases, state.model).export(arrays, provenance(followed, state.release))
    )


def provenance(followed: Followed, release: str) -> Provenance:
    """Where a release comes from, as the log has it. Raises `UsageError` as `registry.lineage`."""
    state = registry.find(followed.releases, release)
    ancestors = registry.lineage(followed.rounds, followed.releases, release)
    steps = [
        Step(each.release, each.base_release, each.round_id, each.strategy, len(each.contributions), _mechanism(followed, each))
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
