"""A release beside its base model's own tensors: which matrix each pair of factors changes, without loading a model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final, NamedTuple

from fedloop_events.blobs import tensors
from fedloop_events.blobs.tensors import Array, TensorSpec
from fedloop_events.types import CausalSpec

from fedloop_tasks.models.families import Part, family_of
from fedloop_tasks.models.sources import CONFIG
from fedloop_tasks.programs import factors
from fedloop_tasks.programs.factors import FIXED
from fedloop_tasks.task import Arrays

_LAYERS: Final = ("model.layers.", "transformer.h.")


class Pair(NamedTuple):
    """The factors A [r, in] and B [out, r] of one matrix of the base, those that are fixed last. Its change is B A times alpha by
    the spec's rank, whatever r is."""

    layer: int
    part: Part
    a: Array
    b: Array

    @property
    def rank(self) -> int:
        return len(self.a)

    @property
    def module(self) -> str:
        """The path of the linear module in the base."""
        return self.part.name.removesuffix(".weight")


def config_of(folder: Path) -> dict[str, Any]:
    """`config.json` of a base model."""
    found: dict[str, Any] = json.loads((folder / CONFIG).read_bytes())
    return found


def pairs(spec: CausalSpec, config: dict[str, Any], arrays: Arrays) -> list[Pair]:
    """The pairs of a release, in its order. Raises `TensorError` unless its tensors are exactly those of the model."""
    found = list(_matrices(spec, config))
    expected: list[TensorSpec] = []
    for name, _, part in found:
        out, into = part.shape[::-1] if part.laid == "transposed" else part.shape
        expected += [TensorSpec(f"{name}.A", "F32", (spec.rank, into)), TensorSpec(f"{name}.B", "F32", (out, spec.rank))]
    fixed = [(name, a) for name, _, _ in found if (a := arrays.get(f"{name}{FIXED}.A")) is not None]
    shapes = {each.name: each.shape for each in expected}
    for name, a in fixed:
        (_, into), (out, _) = shapes[f"{name}.A"], shapes[f"{name}.B"]
        expected += [
            TensorSpec(f"{name}{FIXED}.A", "F32", (len(a), into)),
            TensorSpec(f"{name}{FIXED}.B", "F32", (out, len(a))),
        ]
    tensors.check(tensors.specs(arrays), expected)
    return [Pair(layer, part, *factors.whole(arrays, name)) for name, layer, part in found]


def _matrices(spec: CausalSpec, config: dict[str, Any]) -> Iterator[tuple[str, int, Part]]:
    """The adapted matrices, with their layers and what their factors' names begin with, as `CausalModel` orders them."""
    layers: dict[int, dict[str, Part]] = {}
    for part in family_of(config).parts():
        prefix = next((each for each in _LAYERS if part.name.startswith(each)), None)
        if prefix is not None and part.name.endswith(".weight") and len(part.shape) == 2:
            layer, path = part.name.removeprefix(prefix).removesuffix(".weight").split(".", 1)
            layers.setdefault(int(layer), {})[path] = part
    for number in sorted(layers)[-spec.layers :]:
        for path, part in sorted(layers[number].items()):
            if any(path == target or path.endswith(f".{target}") for target in spec.targets):
                yield f"lora.{number}.{path}", number, part
