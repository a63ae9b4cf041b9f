"""What a device answers with: the release in force as the log names it, and the one whose tensors are kept, in the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import cast

from fedloop_events.blobs import tensors
from fedloop_events.errors import BlobError, UsageError
from fedloop_events.folds.releases import ReleaseState
from fedloop_events.types import Spec
from fedloop_tasks.chats import Chats
from fedloop_tasks.personal import trained
from fedloop_tasks.programs.adapter import Trains
from fedloop_tasks.table import task_of
from fedloop_tasks.task import Export, Model, Provenance

from fedloop_clients.device import Device
from fedloop_clients.personal import Personalised
from fedloop_clients.refreshing import Refresher
from fedloop_clients.releases import KeptRelease, NoReleaseError


class InForce:
    """The releases that one device knows. Raises `NoReleaseError` where it knows none."""

    def __init__(self, device: Device, refresher: Refresher) -> None:
        self._device, self._refresher = device, refresher

    def named(self) -> tuple[Spec, ReleaseState]:
        """As the device has read it: its tensors may not have come yet."""
        device = self._device
        for refresh in (self._refresher.refresh, self._refresher.refresh_first):
            refresh()
            spec, release = device.spec, device.view.releases.current(device.settings.model)
            if spec is not None and release is not None:
                return spec, release
        raise self.none()

    def kept(self) -> KeptRelease:
        """The newest whose tensors the device has."""
        for refresh in (self._refresher.refresh, self._refresher.refresh_first):
            refresh()
            if (release := self._device.releases.current(self._device.settings.model)) is not None:
                return release
        raise self.none()

    def exported(self, form: str) -> tuple[str, Export]:
        """The name of the one that is kept, and its files in a format of its task. Its card tells no more of its lineage than a
        device knows. Raises `UsageError` for a model that does not chat or has no such format, and what `Task.export` does."""
        while True:
            release = self.kept()
            task = task_of(release.spec)
            check_chats(release.spec)
            if form not in task.formats:
                raise UsageError(f"this model cannot be exported as {form!r}, but as {' or '.join(task.formats)}")
            try:
                arrays = tensors.decode(self._device.releases.tensors(release.blob))
            except BlobError:
                if self._device.releases.current(release.model) == release:
                    raise
                continue  # another one took its place meanwhile
            about = Provenance(release=release.release, model=release.model, sha256=release.blob.sha256)
            return release.release, task.export(arrays, about, form, self._device.settings.model_dir)

    @contextmanager
    def to_predict(self) -> Iterator[tuple[Model, KeptRelease]]:
        """The model, as long as the block lasts, with the release that is kept. Raises `UsageError` for one that chats, and what
        loading raises."""
        with self._lent(check_predicts) as lent:
            yield lent

    @contextmanager
    def to_chat(self) -> Iterator[tuple[Chats, KeptRelease]]:
        """The same for one that chats, and for no other."""
        with self._lent(check_chats) as (model, release):
            yield cast(Chats, model), release

    @contextmanager
    def to_embed(self) -> Iterator[tuple[Model, KeptRelease]]:
        """The same for any model."""
        with self._lent(lambda spec: None) as lent:
            yield lent

    @contextmanager
    def _lent(self, check: Callable[[Spec], None]) -> Iterator[tuple[Model, KeptRelease]]:
        while True:
            release = self.kept()
            check(release.spec)
            with self._device.models.borrowed(release.spec) as held:
                try:
                    model = held.load(release.blob, self._device.releases.tensors, self._device.personal)
                except BlobError:
                    if self._device.releases.current(release.model) == release:
                        raise
                    continue  # another one took its place meanwhile
                yield model, release
                return

    def personalised(self) -> Personalised:
        """Train a personal layer on top of the release that is kept, and keep it if it is better. Raises `UsageError`, and what
        loading raises."""
        device = self._device
        device.store.check_writable()
        retracted = device.personal.retracted()
        while True:
            release = self.kept()
            if not task_of(release.spec).speaks:
                raise UsageError("this model answers with one of a closed set of words, so it has no personal layer")
            try:
                arrays = tensors.decode(device.releases.tensors(release.blob))
                break
            except BlobError:
                if device.releases.current(release.model) == release:
                    raise
        examples = task_of(release.spec).examples(device.interactions.judged())
        with device.models.borrowed(release.spec) as held, held.holding(arrays) as model:
            found = trained(cast(Trains, model), examples)
        return device.personal.keep(release.spec, release.release, arrays, found, retracted)

    def none(self) -> NoReleaseError:
        """Why there is none."""
        model = self._device.settings.model
        known = self._device.view.releases.current(model) is not None
        what = "could not be read yet" if known else "is known to this device"
        hint = (
            "check the location of the blobs (--blobs)" if known else "connect this device to the log once: `fedloop agent run`"
        )
        return NoReleaseError(f"no release of model {model!r} {what}", cause=self._refresher.problem, hint=hint)


def check_chats(spec: Spec) -> None:
    """Raise `UsageError` for a model that answers with one of a closed set of words."""
    if not task_of(spec).speaks:
        raise UsageError("this model answers with one of a closed set of words, so it does not chat", hint="use Agent.predict")


def check_predicts(spec: Spec) -> None:
    """Raise `UsageError` for a model that answers in its own words."""
    if task_of(spec).speaks:
        raise UsageError("this model answers in its own words, so it does not predict", hint="use Agent.chat")
