"""The server's held-out set: taken in as devices see texts, and the accuracy of a release on it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from fedloop_events.files import write_private
from fedloop_events.types import ClassificationSpec
from msgspec import Struct

from fedloop_tasks.evaluation import Measured, Scores
from fedloop_tasks.held_out import FILE as FILE
from fedloop_tasks.held_out import read
from fedloop_tasks.task import Arrays, Message

if TYPE_CHECKING:
    from fedloop_tasks.classification.model import EmbeddingClassifier

ACCURACY: Final = "accuracy"
"""The metric that leads: the part of the held-out texts that get their label."""


class HeldOut(Struct, frozen=True, forbid_unknown_fields=True):
    """Masked texts and their labels."""

    texts: list[str]
    labels: list[str]


def keep(folder: Path, held_out: Sequence[Message], mask: Callable[[str], str | None]) -> dict[str, int]:
    """See `Task.keep`."""
    if (folder / FILE).exists():
        return {}
    held, failed = HeldOut([], []), 0
    for message in held_out:
        if (masked := mask(message.text)) is None:
            failed += 1
        else:
            held.texts.append(masked)
            held.labels.append(message.answer)
    write_private(folder / FILE, msgspec.json.encode(held))
    return {"could not be masked": failed} if failed else {}


class Evaluator:
    """Accuracy on the held-out set in `folder`. The model is loaded when it is first needed.

    Raises `UsageError` if there is no held-out set.
    """

    def __init__(self, folder: Path, spec: ClassificationSpec, model_dir: Path | None) -> None:
        self._held, self._sha256 = read(folder, HeldOut)
        self._spec, self._model_dir = spec, model_dir
        self._model: EmbeddingClassifier | None = None

    def __call__(self, arrays: Arrays) -> Measured:
        if self._model is None:
            from fedloop_tasks.classification.model import EmbeddingClassifier

            self._model = EmbeddingClassifier(self._spec, model_dir=self._model_dir)
        self._model.load(arrays)
        correct = self._model.correct(self._held.texts, self._held.labels)
        scores = Scores.of(correct) if correct else None
        return Measured({ACCURACY: 0.0 if scores is None else scores.mean}, ACCURACY, len(correct), self._sha256, scores=scores)
