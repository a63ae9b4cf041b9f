"""The tensors of a release in a model: LoRA factors, those that are fixed among them, and what else is learnt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from fedloop_events.errors import TensorError
from numpy.typing import NDArray
from torch import nn

from fedloop_tasks.models import lora
from fedloop_tasks.programs.factors import FIXED, is_fixed

Arrays = dict[str, NDArray[np.float32]]


class Adapted:
    """A model that holds one release at a time in the parameters `_tensors`, by their names in it and in its order.

    After them a release may have fixed factors of some adapters (`programs.factors`), in the adapters' order.
    """

    _tensors: dict[str, nn.Parameter]
    _adapters: dict[str, lora.Lora]
    """By what the names of their factors begin with."""
    _fixed_bytes = 0

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Names and shapes of the tensors that are learnt, in order."""
        return {name: tuple(p.shape) for name, p in self._tensors.items()}

    def check_memory(self, release_bytes: int = 0) -> None:
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

    def fitting_rank(self, most: int, release_bytes: int = 0) -> int:
        """See `Model`."""
        return min(most, self._rank)

    @property
    def _rank(self) -> int:
        """That at which the adapters are trained now."""
        return next(len(p) for name, p in self._tensors.items() if name.endswith(".A"))

    @contextmanager
    def at_rank(self, rank: int) -> Iterator[None]:
        """See `Model`."""
        if rank >= self._rank:
            yield
            return
        before = dict(self._tensors)
        with ExitStack() as stack:
            stack.callback(self._tensors.update, before)
            for name, adapter in self._adapters.items():
                stack.enter_context(lora.cut(adapter, rank))
                self._tensors |= {name + ".A": adapter.trained[0], name + ".B": adapter.trained[1]}
            yield

    def load(self, arrays: Mapping[str, NDArray[Any]]) -> None:
        """Take a release's tensors. Raises TensorError unless they are exactly this model's, float32 and finite; the model is
        then as it was."""
        fixed = [name + FIXED for name in self._adapters if f"{name}{FIXED}.A" in arrays]
        if list(arrays) != [*self._tensors, *(f"{name}.{factor}" for name in fixed for factor in "AB")]:
            count = sum(not is_fixed(name) for name in arrays)
            raise TensorError(f"the release holds {count} tensors, not exactly the {len(self._tensors)} of the model")
        for name, value in arrays.items():
            p = self._tensors.get(name)
            _check(name, value, self._shape_of_fixed(name, arrays) if p is None else tuple(p.shape))
        with torch.no_grad():
            for name, p in self._tensors.items():
                p.copy_(torch.tensor(arrays[name]))
            for name, adapter in self._adapters.items():
                here = self._tensors[name + ".A"].device
                given = [torch.tensor(arrays[f"{name}{FIXED}.{each}"], device=here) for each in "AB" if name + FIXED in fixed]
                adapter.fixed = lora.Factors(*given) if given else None
        self._fixed_bytes = sum(values.nbytes for name, values in arrays.items() if name not in self._tensors)

    def _shape_of_fixed(self, name: str, arrays: Mapping[str, NDArray[Any]]) -> tuple[int, ...]:
        """What it must be, of a rank of its own, which is at most that of the matrix."""
        adapter = name[:-2].removesuffix(FIXED)
        into, out = self._tensors[adapter + ".A"].shape[1], self._tensors[adapter + ".B"].shape[0]
        rank = min(max((1, *arrays[f"{adapter}{FIXED}.A"].shape[:1])), into, out)
        return (rank, into) if name.endswith(".A") else (out, rank)

    def arrays(self, names: Sequence[str] | None = None) -> Arrays:
        """Copies of the tensors `names` (the whole release, if None), in that order. Raises TensorError for a name that is not
        learnt."""
        found = {name: p.detach() for name, p in self._chosen(names).items()}
        if names is None:
            found |= self._fixed()
        return {name: values.to("cpu", copy=True).numpy() for name, values in found.items()}

    def _fixed(self) -> dict[str, torch.Tensor]:
        fixed = {name + FIXED: each for name, adapter in self._adapters.items() if (each := adapter.fixed) is not None}
        return {f"{name}.{factor}": values for name, each in fixed.items() for factor, values in zip("AB", each, strict=True)}

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


def _check(name: str, value: NDArray[Any], shape: tuple[int, ...]) -> None:
    if value.shape != shape or value.dtype != np.float32:
        raise TensorError(f"tensor {name} is {value.dtype} {list(value.shape)}, the model's is float32 {list(shape)}")
    if not np.isfinite(value).all():
        raise TensorError(f"tensor {name} holds values that are not finite")
