"""The two seams: a task says what a model learns, a program how one round learns it. Nothing here imports torch.

Nothing outside this package knows a label, a head, a loss or a tensor's name. A new task is a folder here, a new way to learn a
file in `programs`, and both stand in the table of those that exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from fedloop_events.blobs.tensors import Array, TensorSpec
from fedloop_events.masked import MaskedText
from fedloop_events.types import RoundOpened
from msgspec import Struct

Arrays = Mapping[str, Array]
"""Tensors by name, in the order of their blob."""


class Interaction(Struct, frozen=True):
    """One response of a model, and what its user did about it. Every text is masked."""

    interaction_id: str
    release: str
    prompt: MaskedText
    response: MaskedText | None = None
    predicted: str | None = None
    """What was answered where that is one of a closed set of words, such as a label."""
    thumb: Literal["up", "down"] | None = None
    rating: int | None = None
    """1 to 5."""
    label: str | None = None
    edit: MaskedText | None = None
    """The better answer, in the user's words."""
    preferred_over: str | None = None
    """The interaction whose response was the worse of two."""


class Evaluation(Struct, frozen=True):
    """Named metrics of one release on one held-out set; `leading` names the one that decides."""

    metrics: dict[str, float]
    leading: str
    examples: int
    dataset_sha256: str


class Verdict(Struct, frozen=True):
    """The gate's: `reason` is "" for a candidate that passes."""

    reason: str = ""
    detail: str = ""


class Model(Protocol):
    """A model in memory that holds one release at a time. Not safe for concurrent use."""

    def load(self, arrays: Arrays) -> None:
        """Take a release's tensors. Raises `TensorError`, and is then as it was, unless they are exactly this model's."""

    def arrays(self, names: Sequence[str] | None = None) -> dict[str, Array]:
        """The tensors that it holds, or those named."""


class Program(Protocol):
    """How one round learns: what is uploaded, what a device computes, and what becomes of it."""

    @property
    def name(self) -> str:
        """As in `RoundOpened.strategy`; another way to compute is another name."""

    @property
    def combines(self) -> Literal["sum", "mean"]:
        """How the updates become one: the linear part of a merge, which `fedloop_server.aggregation` does."""

    def upload(self, release: Sequence[str]) -> list[str]:
        """The tensors of an update, of a release that has these."""

    def specs(self, opened: RoundOpened, base: Arrays) -> list[TensorSpec]:
        """What an update of the round holds, exactly. Raises `TensorError` if the base lacks what it rests on."""

    def starts_from_base(self) -> bool:
        """Whether an update is a changed part of the base, so that its distance from the base is what is bounded."""

    def compute(self, model: Model, examples: Any, opened: RoundOpened) -> dict[str, Array]:
        """A device's contribution; `model` holds the base release. Under a mechanism it costs exactly that mechanism."""

    def apply(self, opened: RoundOpened, base: Arrays, combined: Arrays) -> dict[str, Array]:
        """The release that the combined updates make of the base."""


class Task(Protocol):
    """What a model learns."""

    def examples(self, interactions: Iterable[Interaction]) -> Sequence[Any]:
        """What there is to learn from, oldest first: what its programs' `compute` takes."""

    def gate(self, candidate: Evaluation, incumbent: Evaluation, margin: float) -> Verdict:
        """Whether a candidate may take the place of the release in force, both evaluated on the same held-out set."""

    def model(self, model_dir: Path | None) -> Model:
        """The model on this machine, with its base checked by hash. Imports what it needs when called. Raises `ModelError`."""
