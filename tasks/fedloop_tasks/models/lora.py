"""LoRA on a linear module: factors that are trained, and fixed ones beside them. PEFT's (0.21) private corners are touched here.

The fixed ones are a second adapter of PEFT's layer, so they act where the first one does and are turned off with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final, NamedTuple

import torch
from peft.tuners.lora.layer import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

_TRAINED: Final = "default"
_FIXED: Final = "fixed"


class Factors(NamedTuple):
    """A [r, in] and B [out, r]."""

    a: Tensor
    b: Tensor


class Lora:
    """The adapter on one module."""

    def __init__(self, layer: LoraLayer) -> None:
        self._layer: Any = layer

    @property
    def trained(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self._layer.lora_A[_TRAINED].weight, self._layer.lora_B[_TRAINED].weight

    @trained.setter
    def trained(self, factors: tuple[nn.Parameter, nn.Parameter]) -> None:
        self._layer.lora_A[_TRAINED].weight, self._layer.lora_B[_TRAINED].weight = factors

    @property
    def acts(self) -> bool:
        """Whether it changes anything: a first one, whose B is zero, does not."""
        return self.fixed is not None or bool(self.trained[1].any())

    @property
    def fixed(self) -> Factors | None:
        if _FIXED not in self._layer.lora_A:
            return None
        return Factors(self._layer.lora_A[_FIXED].weight.detach(), self._layer.lora_B[_FIXED].weight.detach())

    @fixed.setter
    def fixed(self, factors: Factors | None) -> None:
        """Their product is scaled as that of the factors that are trained."""
        layer = self._layer
        if factors is None:
            for parts in (layer.lora_A, layer.lora_B, layer.lora_dropout, layer.scaling):
                if _FIXED in parts:
                    del parts[_FIXED]
        else:
            layer.lora_A[_FIXED], layer.lora_B[_FIXED] = _linear(factors.a), _linear(factors.b)
            layer.lora_dropout[_FIXED], layer.scaling[_FIXED] = nn.Identity(), layer.scaling[_TRAINED]
        layer._active_adapter = list(layer.lora_A)


def adapters(module: nn.Module, tensors: Mapping[str, nn.Parameter]) -> dict[str, Lora]:
    """The adapters in `module` by what the names of their factors among the `tensors` begin with, in their order."""
    layers = {id(each.lora_A[_TRAINED].weight): each for each in module.modules() if isinstance(each, LoraLayer)}
    return {name[:-2]: Lora(layers[id(p)]) for name, p in tensors.items() if name.endswith(".A")}


@contextmanager
def turned_off(module: nn.Module) -> Iterator[None]:
    """No adapter acts. Nothing that autograd has recorded is disturbed, nor what is trained."""
    layers: list[Any] = [each for each in module.modules() if isinstance(each, BaseTunerLayer)]
    before = [each._disable_adapters for each in layers]
    try:
        for each in layers:  # PEFT's own switch makes every adapter that it turns on trainable
            each._disable_adapters = True
        yield
    finally:
        for each, off in zip(layers, before, strict=True):
            each._disable_adapters = off


@contextmanager
def acting_from(module: nn.Module, begin: int) -> Iterator[None]:
    """Adapters change nothing of the first `begin` tokens of what the module runs. No gradient may be recorded."""

    def silence(part: nn.Module, given: object, output: Tensor) -> None:
        output[:, :begin] = 0

    layers = (each for each in module.modules() if isinstance(each, LoraLayer))
    hooks = [part.register_forward_hook(silence) for each in layers for part in each.lora_B.values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def cut(adapter: Lora, rank: int) -> Iterator[None]:
    """The first `rank` components alone are trained as long as the block lasts, the others fixed."""
    (a, b), fixed = adapter.trained, adapter.fixed
    rest = Factors(a.detach()[rank:], b.detach()[:, rank:])
    counts = rest.b.any(dim=0)
    rest = Factors(rest.a[counts], rest.b[:, counts])
    small = (
        nn.Parameter(a.detach()[:rank].clone(), requires_grad=False),
        nn.Parameter(b.detach()[:, :rank].clone(), requires_grad=False),
    )
    if len(rest.a):
        both = rest if fixed is None else Factors(torch.cat([fixed.a, rest.a]), torch.cat([fixed.b, rest.b], dim=1))
        adapter.fixed = both
    adapter.trained = small
    try:
        yield
    finally:
        with torch.no_grad():
            a[:rank] = small[0]
            b[:, :rank] = small[1]
        adapter.trained = (a, b)
        adapter.fixed = fixed


def _linear(weight: Tensor) -> nn.Linear:
    made = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    made.weight = nn.Parameter(weight, requires_grad=False)
    return made
