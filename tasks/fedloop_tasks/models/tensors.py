"""The tensors of a release in a model: LoRA factors, and what else is learnt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from fedloop_events.errors import TensorError
from numpy.typing import NDArray
from torch import nn

Arrays = dict[str, NDArray[np.float32]]


class Adapted:
    """A model that holds one release at a time in the parameters `_tensors`, by their names in it and in its order."""

    _tensors: dict[str, nn.Parameter]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of a release's tensors, in order."""
        return {name: tuple(p.shape) for name, p in self._tensors.items()}

    def check_memory(self) -> None:
        """See `Model`: unless a model says otherwise, its training takes little beside its weights."""

    def initial_arrays(self, seed: int) -> Arrays:
        """The first release: A uniform on +-1/sqrt(in) as in PEFT (Kaiming with a = sqrt 5), all others, B among them, zero.

        The same seed gives the same bytes on every machine.
        """
        random = np.random.Generator(np.random.PCG64(seed))
        arrays: Arrays = {}
        for name, shape in self.shapes.items():
            draw = (2 * random.random(shape) - 1) / np.sqrt(shape[-1]) if name.endswith(".A") else np.zeros(shape)
            arrays[name] = draw.astype(np.float32)
        return arrays

    def load(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take a release's tensors. Raises TensorError unless they are exactly this model's, float32 and finite; the model is
        then as it was."""
        if list(arrays) != list(self._tensors):
            raise TensorError(f"the release holds {len(arrays)} tensors, not exactly the {len(self._tensors)} of the model")
        for name, p in self._tensors.items():
            value = arrays[name]
            if value.shape != tuple(p.shape) or value.dtype != np.float32:
                raise TensorError(f"tensor {name} is {value.dtype} {list(value.shape)}, the model's is float32 {list(p.shape)}")
            if not np.isfinite(value).all():
                raise TensorError(f"tensor {name} holds values that are not finite")
        with torch.no_grad():
            for name, p in self._tensors.items():
                p.copy_(torch.tensor(arrays[name]))

    def arrays(self, names: Sequence[str] | None = None) -> Arrays:
        """Copies of the tensors `names` (all, if None), in that order. Raises TensorError for a name that is not the model's."""
        return {name: p.detach().to("cpu", copy=True).numpy() for name, p in self._chosen(names).items()}

    @contextmanager
    def trainable(self, names: Sequence[str]) -> Iterator[dict[str, nn.Parameter]]:
        """The tensors `names` as parameters that record gradients, and no others; afterwards none does.

        Raises TensorError for a name that is not the model's.
        """
        chosen = self._chosen(names)
        for p in chosen.values():
            p.requires_grad = True
        try:
            yield chosen
        finally:
            for p in chosen.values():
                p.requires_grad = False
                p.grad = None

    def _chosen(self, names: Sequence[str] | None) -> dict[str, nn.Parameter]:
        unknown = [name for name in names or () if name not in self._tensors]
        if unknown:
            raise TensorError(f"{len(unknown)} tensors are not the model's, {unknown[0]!r} among them")
        return {name: self._tensors[name] for name in (self._tensors if names is None else names)}
