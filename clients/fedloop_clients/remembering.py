"""Light now, batch later: what a user has corrected is answered as corrected at once, on this device alone, until the release in
force answers so by itself.

The memory keeps nothing: it is read from the interactions each time, so that what is taken back is gone from it. An answer that
its user rejects, and knows no better one, is not given again.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any, Final, NamedTuple

import numpy as np
from fedloop_tasks.task import Model
from fedloop_tasks.turns import Turn

from fedloop_clients import texts
from fedloop_clients.store import Store

SIMILAR: Final = 0.8
"""Two questions whose unit vectors have a product of at least this are one question: see `benchmarks/remembered.py`."""
MOST: Final = 256
"""Of labels that users have named: older ones are not looked at."""

_REJECTED: Final = """
EXISTS (
    SELECT 1 FROM responses AS later JOIN feedback AS judged ON judged.response_id = later.response_id
    WHERE later.remembered = feedback.feedback_id AND judged.label IS NULL AND (judged.thumb = 'down' OR judged.rating <= 2)
)
"""
_LABELS: Final = f"""
SELECT feedback_id, label, prompt.raw, prompt.masked, {_REJECTED}
FROM feedback JOIN responses USING (response_id)
JOIN texts AS prompt ON prompt.owner = response_id AND prompt.kind = 'prompt'
WHERE label IS NOT NULL ORDER BY feedback.number DESC LIMIT {MOST}
"""
_CORRECTION: Final = f"""
SELECT feedback_id, correction.raw, correction.masked, {_REJECTED}
FROM responses JOIN feedback USING (response_id)
JOIN texts AS correction ON correction.owner = feedback_id AND correction.kind = 'correction'
WHERE asked = ? ORDER BY feedback.number DESC LIMIT 1
"""


class Remembered(NamedTuple):
    """An answer that a user has given, in the feedback of this id, to the same question or one as similar as this (0 to 1)."""

    feedback_id: str
    answer: str
    similarity: float = 1.0


class _Known(NamedTuple):
    """What a release makes of a text by itself."""

    vector: Any
    label: str


class Memory:
    """The corrected answers in a store; texts are `similar` from this product of their vectors on. Safe to share between
    threads."""

    def __init__(self, store: Store, similar: float = SIMILAR) -> None:
        self._store, self._similar, self._lock = store, similar, threading.Lock()
        self._release, self._known = "", dict[str, _Known]()

    def label(self, model: Model, release: str, text: str, own: str, words: Sequence[str]) -> Remembered | None:
        """The label of the nearest text whose label a user has named, if it is similar enough; None where the answer is the
        model's `own`. `release` names the tensors that the model holds, `text` is what it has seen.

        A text that the release answers as its user did is left to the release, and so is what is similar to it.
        """
        named = self._labels(words)
        if not named:
            return None
        known = self._of_release(model, release, list(named))
        learnt = {each for each, found in named.items() if known[each].label == found.answer}
        if text in named:
            return None if text in learnt else named[text]
        left = [each for each in named if each not in learnt]
        if not left:
            return None
        [asked] = model.embed([text])
        similar = np.stack([known[each].vector for each in left]) @ asked
        nearest = int(similar.argmax())
        found = named[left[nearest]]
        if similar[nearest] < self._similar or found.answer == own:
            return None
        return found._replace(similarity=min(1.0, float(similar[nearest])))

    def correction(self, turns: Sequence[Turn]) -> Remembered | None:
        """The newest better answer to exactly these turns. None if the masker has left placeholders in it: they are no answer."""
        for feedback_id, raw, masked, rejected in self._store.rows(_CORRECTION, (texts.asked(turns),)):
            kept = texts.masked(masked)
            if not (rejected or (kept and kept.counts)):
                return Remembered(feedback_id, raw if kept is None else kept.text)
        return None

    def _labels(self, words: Sequence[str]) -> dict[str, Remembered]:
        """By text, the label that was named last; where that one was rejected, none."""
        newest: dict[str, Remembered | None] = {}
        for feedback_id, label, raw, masked, rejected in self._store.rows(_LABELS):
            text = raw if masked is None else texts.of(masked).text
            newest.setdefault(text, None if rejected or label not in words else Remembered(feedback_id, label))
        return {text: found for text, found in newest.items() if found is not None}

    def _of_release(self, model: Model, release: str, named: Sequence[str]) -> dict[str, _Known]:
        """What the release makes of each of the texts, computed once."""
        with self._lock:
            known = self._known if self._release == release else {}
            if missing := [text for text in named if text not in known]:
                labels, _ = model.predict(missing)
                known = known | {
                    text: _Known(vector, label) for text, vector, label in zip(missing, model.embed(missing), labels, strict=True)
                }
            self._release, self._known = release, {text: known[text] for text in named}
            return self._known
