"""Making a deployment: the model, the held-out set, release 0."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedloop_events.errors import UsageError
from fedloop_events.locations import DeploymentLocation
from fedloop_events.types import DEFAULT_MODEL
from fedloop_tasks.table import task_of
from fedloop_tasks.task import Material, Task
from msgspec import Struct
from msgspec.structs import replace

Mask = Callable[[str], str | None]
"""A text as devices see it; None if it cannot be masked."""


class Deployed(Struct, frozen=True):
    """A deployment that was made. `skipped` are held-out messages that could not be used, by reason."""

    deployment: str
    origin: str
    release: str
    model: dict[str, int]
    """What the task shows of the model."""
    held_out: int
    skipped: dict[str, int]
    settings: str


def deploy(
    directory: Path,
    place: DeploymentLocation,
    task: type[Task],
    material: Material,
    settings: dict[str, Any],
    *,
    base_model: str | None = None,
    seed: int = 0,
    as_is: bool = False,
) -> Deployed:
    """Make a deployment of `task` in `directory`, its log and blobs at `place`; `settings` are keys of `server.toml`.

    Devices see masked texts alone, so the figure that counts is that on masked texts: held-out texts are masked when they are
    taken in, unless they are to be taken `as_is`. The words that a model answers with are published as they are, so one that
    the masker would mask is refused, where there is a masker. Raises `UsageError`, also for settings with which no round can ever
    run; `ModelError`, `UnreachableError`.
    """
    from fedloop_server import config as configuration

    config = configuration.decode(settings, task.plan)
    masking = _masking_or_none() if as_is else _masking()

    from fedloop_server.deployment import CONFIG_FILE, create_deployment
    from fedloop_server.rounds.planner import Planner

    model_dir = Path(config.model_dir) if config.model_dir else None
    spec, initial = task.make(material, base_model or task.base_model, model_dir, seed)
    # An update has at most all of the model's tensors; twice that leaves room for a model that grows.
    config = replace(config, max_upload_bytes=max(config.max_upload_bytes, 2 * sum(each.nbytes for each in initial.values())))
    learnt, planner = task_of(spec), Planner(config)
    if masking is not None:
        _check_words(learnt.words, masking)
    planner.check(initial)  # seconds: what the first round would take
    made = create_deployment(directory, spec, initial, config, place)
    if made.config.plan == config.plan:
        planner.keep_in(made.plan_file)
    failed = learnt.keep(made.folder, material.held_out, _as_it_is if as_is or masking is None else masking)

    from fedloop_server.operations.followed import Followed

    followed = Followed(made.log)
    current = followed.releases.current(DEFAULT_MODEL)
    assert current is not None
    made.log.close()
    return Deployed(
        str(directory),
        followed.identities.origin,
        current.release,
        learnt.summary(),
        len(material.held_out) - sum(failed.values()),
        failed,
        str(made.folder / CONFIG_FILE),
    )


def as_document(made: Deployed) -> dict[str, Any]:
    return {
        "deployment": made.deployment,
        "origin": made.origin,
        "release": made.release,
        **made.model,
        "held_out": made.held_out,
        "skipped": made.skipped,
        "settings": made.settings,
    }


def _masking() -> Mask:
    """Raises `UsageError` where the masker is not installed: a server needs none but for this."""
    try:
        from fedloop_privacy.masking import Masker, MaskingError
    except ImportError as error:
        raise UsageError(
            "the masker is not installed here, so the held-out messages cannot be masked",
            cause=f"there is no {error.name}" if error.name else "",
            hint="install fedloop[client] here, or mask them where it is and say --held-out-as-is",
        ) from None
    masker = Masker()

    def mask(text: str) -> str | None:
        try:
            return masker.mask(text).text
        except MaskingError:
            return None

    return mask


def _masking_or_none() -> Mask | None:
    with suppress(UsageError):
        return _masking()
    return None


def _check_words(words: Sequence[str], mask: Mask) -> None:
    for word in words:
        masked = mask(word)
        if masked != word:
            raise UsageError(
                f"{word!r}, which the model would answer with, would be masked",
                cause=f"the masker reads {masked}; answers are published as they are" if masked else "the masker cannot read it",
                hint="rename it, so that it names nobody",
            )


def _as_it_is(text: str) -> str:
    return text
