"""What the device's memory of corrections is worth, on banking77: the same question again, another one of its intent, and others.

`python -m benchmarks.remembered` prints what each similarity comes to on the training questions: `remembering.SIMILAR` is the
least of them at which no question of another intent is answered from memory. The rows are of the test questions.

The release is one that has seen a few questions of each intent (a head of their means), so that there is something to correct. A
device corrects a question that it answers wrongly, through the store and the memory that ship; vectors are computed before.
"""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
from fedloop_clients.feedback import FeedbackInput
from fedloop_clients.interactions import Interactions
from fedloop_clients.remembering import SIMILAR, Memory
from fedloop_clients.store import Store
from fedloop_events.errors import FedloopError
from fedloop_tasks.classification.model import EmbeddingClassifier, describe

from benchmarks.harness import MIN_RUNS, Row, counted, rates, scratch
from benchmarks.utility import Questions, banking77

SEEN: Final = 5
"""Questions of each intent that the release has seen."""
ASKED, OTHERS, CORRECTIONS = 10, 30, 20
"""Questions of the corrected intent, and of others, for each correction; corrections of one device that has several."""
SIMILARITIES: Final = (0.7, 0.75, 0.8, 0.85, 0.9)


class Release:
    """Questions, and what a release makes of them: a `Model`, as far as a memory needs one."""

    def __init__(self, questions: Questions, vectors: Any, head: Any, labels: Sequence[str]) -> None:
        self.questions = questions
        self._rows = {text: row for row, text in enumerate(questions.texts)}
        self._vectors = vectors
        self._own = [labels[each] for each in (vectors @ head.T).argmax(1)]

    def predict(self, texts: Sequence[str]) -> tuple[list[str], list[float]]:
        return [self._own[self._rows[text]] for text in texts], [1.0] * len(texts)

    def embed(self, texts: Sequence[str]) -> Any:
        return self._vectors[[self._rows[text] for text in texts]]


class Counts(NamedTuple):
    """How many were asked, right by the release alone, right with the memory, and answered by the memory."""

    asked: int
    alone: int
    right: int
    remembered: int

    @property
    def accuracies(self) -> tuple[float, float]:
        """With the memory and without it."""
        return self.right / self.asked, self.alone / self.asked


class Device:
    """One device's store and memory."""

    def __init__(self, folder: Path, release: Release, labels: Sequence[str], similar: float) -> None:
        self._release, self._labels = release, labels
        self._store = Store.create(folder / f"{secrets.token_hex(4)}.db", bytes(32))
        self._interactions, self._memory = Interactions(self._store), Memory(self._store, similar)

    def correct(self, row: int) -> None:
        text, label = self._release.questions.texts[row], self._release.questions.labels[row]
        [own], _ = self._release.predict([text])
        response = self._interactions.respond(text, None, own, "0000-a", self._labels)
        self._interactions.record(response, FeedbackInput(label=label), self._labels)

    def ask(self, rows: Sequence[int]) -> Counts:
        alone = right = remembered = 0
        for row in rows:
            text, label = self._release.questions.texts[row], self._release.questions.labels[row]
            [own], _ = self._release.predict([text])
            found = self._memory.label(self._release, "0000-a", text, own, self._labels)  # type: ignore[arg-type]
            alone, remembered = alone + (own == label), remembered + (found is not None)
            right += (found.answer if found else own) == label
        return Counts(len(rows), alone, right, remembered)

    def close(self) -> None:
        self._store.close()


class Found(NamedTuple):
    same: Counts
    alike: Counts
    others: Counts
    several: Counts
    """Any questions, on a device with several corrections."""


def measure(folder: Path, release: Release, labels: Sequence[str], similar: float, seed: int) -> Found:
    """One correction of each intent that has a question to correct, each on a device of its own."""
    random, questions = np.random.default_rng(seed), release.questions
    right = np.array(questions.labels) == np.array(release.predict(questions.texts)[0])
    of_intent = {label: np.flatnonzero(np.array(questions.labels) == label) for label in labels}
    corrected = [int(random.choice(wrong)) for rows in of_intent.values() if len(wrong := rows[~right[rows]])]
    same: list[Counts] = []
    alike: list[Counts] = []
    others: list[Counts] = []
    for row in corrected:
        intent = of_intent[questions.labels[row]]
        outside = np.setdiff1d(np.arange(len(questions.texts)), intent)
        device = Device(folder, release, labels, similar)
        device.correct(row)
        same.append(device.ask([row]))
        alike.append(device.ask(_some(random, intent[intent != row], ASKED)))
        others.append(device.ask(_some(random, outside, OTHERS)))
        device.close()
    device = Device(folder, release, labels, similar)
    taught = _some(random, np.array(corrected), CORRECTIONS)
    for row in taught:
        device.correct(row)
    several = device.ask(_some(random, np.setdiff1d(np.arange(len(questions.texts)), taught), ASKED * OTHERS))
    device.close()
    return Found(_sum(same), _sum(alike), _sum(others), several)


def _sum(counts: Sequence[Counts]) -> Counts:
    return Counts(*map(sum, zip(*counts, strict=True)))


def _some(random: np.random.Generator, rows: Any, most: int) -> list[int]:
    chosen: list[int] = random.permutation(rows)[:most].tolist()
    return chosen


def releases(quick: bool) -> tuple[Release, Release, list[str]]:
    """The same release with questions of the training file that it has not seen, and with those of the test file."""
    training, test = banking77("train"), banking77("test")
    labels = sorted(set(training.labels))[: 10 if quick else None]
    random, model = np.random.default_rng(0), EmbeddingClassifier(describe(labels))
    rows = {label: random.permutation(np.flatnonzero(np.array(training.labels) == label)) for label in labels}
    seen = [training.take(rows[label][:SEEN].tolist()) for label in labels]
    head = np.stack([model.embed(each.texts).mean(0) for each in seen])
    size = SEEN if quick else 4 * SEEN
    unseen = training.take([int(row) for label in labels for row in rows[label][SEEN : SEEN + size]])
    known = [row for row, label in enumerate(test.labels) if label in set(labels)]
    asked = test.take(random.permutation(known)[: 100 if quick else 2_000].tolist())
    first, second = (Release(each, model.embed(each.texts), head, labels) for each in (unseen, asked))
    return first, second, labels


def rows(quick: bool) -> Iterator[Row]:
    """Of the test questions, at the similarity that ships."""
    _, release, labels = releases(quick)
    with scratch() as folder:
        found = [measure(folder, release, labels, SIMILAR, seed) for seed in range(1 if quick else MIN_RUNS)]
    same = min(each.same.right / each.same.asked for each in found)
    yield counted("the corrected question again", "all of them right", same, 1.0, "right", 1.0)
    alone = "the release without memory"
    yield rates("another question of its intent", alone, [each.alike.accuracies for each in found], "right", 1.01)
    yield rates("questions of other intents", alone, [each.others.accuracies for each in found], "right", 0.99)
    what = f"questions of all intents after {CORRECTIONS} corrections"
    yield rates(what, alone, [each.several.accuracies for each in found], "right", 1.0)


def main() -> int:
    try:
        first, second, labels = releases(quick=False)
    except FedloopError as error:
        print(f"error: {error.message}", file=sys.stderr)
        return error.exit_status
    print(
        "| questions | similarity | its intent, answered from memory | right (alone) | others, from memory | right (alone) |"
        f" all, {CORRECTIONS} corrections (alone) |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for name, release, similarities in (("train", first, SIMILARITIES), ("test", second, (SIMILAR,))):
        for similar in similarities:
            with scratch() as folder:
                found = measure(folder, release, labels, similar, 0)
            (alike, alike_alone), (others, others_alone) = found.alike.accuracies, found.others.accuracies
            several, several_alone = found.several.accuracies
            print(
                f"| {name} | {similar} | {found.alike.remembered / found.alike.asked:.3f} | {alike:.3f} ({alike_alone:.3f}) |"
                f" {found.others.remembered / found.others.asked:.4f} | {others:.4f} ({others_alone:.4f}) |"
                f" {several:.3f} ({several_alone:.3f}) |"
            )
    return 0


if __name__ == "__main__":
    sys.exit(main())
