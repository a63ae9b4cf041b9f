"""A second task, as small as one can be: its model answers every text with the same word, and it is in no module but this one."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np
from fedloop_events.blobs.tensors import Array
from fedloop_events.errors import UsageError
from fedloop_events.folds.releases import Evaluation
from fedloop_events.types import CausalSpec, Mechanism
from fedloop_tasks.precision import BaseDtype
from fedloop_tasks.scratch import Scratch
from fedloop_tasks.task import (
    Arrays,
    Evaluate,
    Interaction,
    Material,
    Message,
    Messages,
    Option,
    Plan,
    Provenance,
    Terms,
    Verdict,
)
from msgspec import Struct

NAME = "chat"
"""The tag of its spec: a log takes specs of the known kinds alone."""
WORD = "noted"


class NotesPlan(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """See `Plan`: no round is ever planned."""

    epsilon: float | None = 8.0
    delta: float = 1e-5
    strategy: Literal["pile"] | None = None
    planned_rounds: int = 8
    nominal_examples: int = 1000
    pages: int = 3

    MEANING: ClassVar[Mapping[str, str]] = {
        name: f"What {name} is." for name in ("epsilon", "delta", "strategy", "planned_rounds", "nominal_examples", "pages")
    }
    NONE: ClassVar[Mapping[str, str]] = {"epsilon": "none", "strategy": "default"}

    def mechanisms(self) -> dict[str, Mechanism]:
        return {}

    @property
    def programs(self) -> Sequence[str]:
        return []

    def next_program(self, made: Sequence[str]) -> str | None:
        return None

    def terms(self, program: str, mechanism: Mechanism | None) -> Terms:
        raise NotImplementedError

    @property
    def exhausted(self) -> str:
        return "no round is planned"


class NotesModel:
    """See `Model`."""

    def __init__(self, spec: CausalSpec) -> None:
        self.spec = spec

    def load(self, arrays: Arrays) -> None:
        assert list(arrays) == ["page"]

    def arrays(self, names: Sequence[str] | None = None) -> dict[str, Array]:
        raise NotImplementedError

    def predict(self, texts: Sequence[str]) -> tuple[list[str], list[float]]:
        return [WORD] * len(texts), [1.0] * len(texts)


class Notes:
    """See `Task`."""

    plan: ClassVar[type[Plan]] = NotesPlan
    base_model: ClassVar[str] = "a notebook"
    speaks: ClassVar[bool] = False
    files: ClassVar[Sequence[Option]] = (
        Option("book", "FILE", "The notes to measure with.", required=True),
        Option("data", "BOOK", "More notes."),
        Option("pages", "N", "How many there are.", int),
    )
    remarks: ClassVar[Sequence[Option]] = (Option("preferred-over", "ID", "The response that was the worse of two.", str),)
    metrics: ClassVar[Sequence[str]] = ("tidiness",)
    columns: ClassVar[Sequence[Option]] = (Option("note-key", "NAME", "What a note is called; default: note.", str),)

    def __init__(self, spec: CausalSpec) -> None:
        self.spec = spec

    @classmethod
    def read(cls, path: Path, columns: Mapping[str, str | None] = {}) -> Messages:
        notes, key = [json.loads(line) for line in path.read_text().splitlines()], columns.get("note-key") or "note"
        if any(key not in note for note in notes):
            raise UsageError(f"{path} has no {key}")
        return Messages(path, [Message(note[key], note["better"]) for note in notes], list(range(1, len(notes) + 1)))

    @classmethod
    def material(cls, files: Mapping[str, Path | None], columns: Mapping[str, str | None] = {}) -> Material:
        book = files["book"]
        assert book is not None
        return Material([], cls.read(book, columns).rows, {})

    @classmethod
    def material_of(cls, messages: Messages, held_out: Messages) -> Material:
        raise NotImplementedError

    @classmethod
    def written(cls, messages: Sequence[Message]) -> str:
        raise NotImplementedError

    @classmethod
    def files_of(cls, material: Material) -> dict[str, str]:
        raise NotImplementedError

    @classmethod
    def make(cls, material: Material, base_model: str, model_dir: Path | None, seed: int) -> tuple[CausalSpec, dict[str, Array]]:
        spec = CausalSpec(base_model, {}, rank=1, alpha=1.0, targets=["page"], layers=1)
        return spec, {"page": np.zeros(1, np.float32)}

    @classmethod
    def remark(cls, answer: str) -> dict[str, Any]:
        return {"correction": answer}

    def summary(self) -> dict[str, int]:
        return {"layers": self.spec.layers}

    def check(self, arrays: Arrays) -> None:
        assert list(arrays) == ["page"]

    def keep(self, folder: Path, held_out: Sequence[Message], mask: Callable[[str], str | None]) -> dict[str, int]:
        return {}

    def evaluator(self, folder: Path, model_dir: Path | None) -> Evaluate:
        raise NotImplementedError

    def gate(self, candidate: Evaluation, incumbent: Evaluation, margin: float) -> Verdict:
        raise NotImplementedError

    def export(self, arrays: Arrays, provenance: Provenance) -> dict[str, bytes]:
        raise NotImplementedError

    @property
    def words(self) -> Sequence[str]:
        return [WORD]

    def taught(self, interaction: Interaction) -> str | None:
        return None if interaction.edit is None else interaction.edit.text

    def examples(self, interactions: Iterable[Interaction]) -> Sequence[Any]:
        return [taught for each in interactions if (taught := self.taught(each)) is not None]

    def model(self, model_dir: Path | None, scratch: Scratch | None = None, base_dtype: BaseDtype = "f32") -> NotesModel:
        return NotesModel(self.spec)
