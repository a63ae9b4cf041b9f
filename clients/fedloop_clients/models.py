"""The device's models in memory: made when first needed, each holding one release at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedloop_events.blobs import tensors
from fedloop_events.types import BlobRef, Spec
from fedloop_tasks.precision import BaseDtype
from fedloop_tasks.scratch import Scratch
from fedloop_tasks.table import task_of
from fedloop_tasks.task import Arrays, Model

from fedloop_clients.personal import PersonalLayers


class Held:
    """A model, and what it holds: a release, and perhaps a personal layer on top."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self._holds: tuple[str, str] | None = None

    def load(self, blob: BlobRef, fetch: Callable[[BlobRef], bytes], layers: PersonalLayers) -> Model:
        """The model with the release in `blob`, which `fetch` gives and checks, and the personal layer for it. Raises what that
        raises, or `TensorError`."""
        wanted = blob.sha256, layers.sha256(self.model.spec)
        if self._holds != wanted:
            self._holds = None
            release: Arrays = tensors.decode(fetch(blob))
            layer = layers.layer(wanted[1]) if wanted[1] else None
            self.model.load(release if layer is None else layer.on(release))
            self._holds = wanted
        return self.model

    @contextmanager
    def holding(self, arrays: Arrays) -> Iterator[Model]:
        """The model with other tensors, as long as the block lasts. Raises `TensorError`."""
        before = self.model.arrays()
        try:
            self.model.load(arrays)
            yield self.model
        finally:
            self.model.load(before)


class Models:
    """Models of one spec, lent one to each thread that asks: predicting does not wait for training.

    A model is not safe for concurrent use, and shares what it has computed for a text between training and predicting; so the
    idle one is lent first, and a second one is made only when both happen at once.
    """

    def __init__(self, model_dir: Path | None, scratch: Scratch, base_dtype: BaseDtype = "auto") -> None:
        self._model_dir, self._scratch, self._base_dtype = model_dir, scratch, base_dtype
        self._idle: list[Held] = []
        self._lock = threading.Lock()

    @contextmanager
    def borrowed(self, spec: Spec) -> Iterator[Held]:
        """A model of `spec`. Raises `ModelError` if its base is not on this machine."""
        with self._lock:
            held = self._idle.pop() if self._idle else None
        if held is None or held.model.spec != spec:
            held = Held(task_of(spec).model(self._model_dir, self._scratch, self._base_dtype))
        try:
            yield held
        finally:
            with self._lock:
                self._idle.append(held)
