"""The server's held-out conversations: taken in as devices see texts, and what a release makes of them."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from fedloop_events.blobs import tensors
from fedloop_events.files import write_private
from fedloop_events.types import CausalSpec
from msgspec import Struct
from msgspec.structs import replace

from fedloop_tasks.causal.examples import Example, Pair
from fedloop_tasks.evaluation import Measured, Scores
from fedloop_tasks.held_out import FILE as FILE
from fedloop_tasks.held_out import read
from fedloop_tasks.scratch import Scratch
from fedloop_tasks.task import Arrays, Message, Sample
from fedloop_tasks.turns import Turn

if TYPE_CHECKING:
    from fedloop_tasks.causal.model import CausalModel

LOSS: Final = "loss_per_token"
"""The metric that leads, and of which less is better: cross entropy of an answer's tokens, its end included, in nats."""
EXACT: Final = "exact_match"
"""The part of the held-out prompts to which the greedy answer is the one that is held out, to the token."""
F1: Final = "token_f1"
"""How far the words of greedy answers are those wanted, over the first `WRITTEN` prompts (Rajpurkar et al. 2016, arXiv
1606.05250, without their clean-up of articles)."""
PREFERENCE: Final = "preference_accuracy"
"""The part of the held-out pairs of answers that are ranked right; only where there are some."""
METRICS: Final = (LOSS, EXACT, F1, PREFERENCE)
WRITTEN: Final = 24
"""Answers are written for so many prompts: half a second each, where a pass over all of them takes seconds. An answer is cut off
when it is twice as long as the one that is wanted."""
SAMPLES: Final = 5
"""Answers that are kept with a release."""
_WORD: Final = re.compile(r"\w+")


class HeldOut(Struct, frozen=True, forbid_unknown_fields=True):
    """Masked conversations, with the answers that are right, and worse ones where there are some."""

    messages: list[Message]


def keep(folder: Path, held_out: Sequence[Message], mask: Callable[[str], str | None]) -> dict[str, int]:
    """See `Task.keep`."""
    if (folder / FILE).exists():
        return {}
    masked = [_masked(each, mask) for each in held_out if each.good is not False]
    kept = [each for each in masked if each is not None]
    write_private(folder / FILE, msgspec.json.encode(HeldOut(kept)))
    left_out = {"could not be masked": len(masked) - len(kept), "no right answer": len(held_out) - len(masked)}
    return {reason: count for reason, count in left_out.items() if count}


def _masked(message: Message, mask: Callable[[str], str | None]) -> Message | None:
    text, answer = mask(message.text), mask(message.answer)
    rejected = None if message.rejected is None else mask(message.rejected)
    earlier = [(turn.role, mask(turn.content)) for turn in message.earlier]
    said = [Turn(role, content) for role, content in earlier if content is not None]
    if text is None or answer is None or len(said) < len(earlier) or (rejected is None) != (message.rejected is None):
        return None
    return replace(message, text=text, answer=answer, earlier=tuple(said), rejected=rejected)


class Evaluator:
    """The metrics on the held-out set in `folder`. The model is loaded when it is first needed.

    Raises `UsageError` if there is no held-out set.
    """

    def __init__(self, folder: Path, spec: CausalSpec, model_dir: Path | None) -> None:
        held, self._sha256 = read(folder, HeldOut)
        self._held, self._folder = held.messages, folder
        self._spec, self._model_dir = spec, model_dir
        self._model: CausalModel | None = None

    def __call__(self, arrays: Arrays) -> Measured:
        if self._model is None:
            from fedloop_tasks.causal.model import CausalModel

            self._model = CausalModel(self._spec, model_dir=self._model_dir, scratch=Scratch(self._folder))
        model = self._model
        model.load(arrays)
        asked = [(*each.earlier, Turn("user", each.text)) for each in self._held]
        found = model.scores(model.encoded([Example(turns, each.answer) for turns, each in zip(asked, self._held, strict=True)]))
        samples = [
            Sample(each.text, model.generate(turns, most=self._room(each.answer)).text, each.answer)
            for turns, each in zip(asked[:WRITTEN], self._held, strict=False)
        ]
        scores = Scores.of([each.loss / each.tokens for each in found], [each.tokens for each in found]) if found else None
        metrics = {
            LOSS: 0.0 if scores is None else scores.mean,
            EXACT: _mean([each.exact for each in found]),
            F1: _mean([f1(each.answer, each.wanted) for each in samples]),
        }
        pairs = [
            Pair(turns, each.answer, each.rejected)
            for turns, each in zip(asked, self._held, strict=True)
            if each.rejected is not None
        ]
        if pairs:
            metrics[PREFERENCE] = _mean([margin > 0 for margin in model.preferences(pairs)])
        write_private(self._folder / _file(arrays), msgspec.json.encode(samples[:SAMPLES]))
        return Measured(metrics, LOSS, len(found), self._sha256, higher_is_better=False, scores=scores)

    def _room(self, answer: str) -> int:
        """Tokens for an answer in place of this one."""
        assert self._model is not None
        return min(self._spec.max_answer_tokens, 2 * len(self._model.chat.answer(answer)))


def samples(folder: Path, arrays: Arrays) -> list[Sample]:
    """See `Task.samples`."""
    try:
        return msgspec.json.decode((folder / _file(arrays)).read_bytes(), type=list[Sample])
    except (OSError, msgspec.MsgspecError):
        return []


def _file(arrays: Arrays) -> str:
    digest = hashlib.sha256()
    for chunk in tensors.encode(arrays):
        digest.update(chunk)
    return f"samples-{digest.hexdigest()}.json"


def f1(found: str, wanted: str) -> float:
    """The harmonic mean of how many words of `found` are wanted, and how many that are wanted are there; words by UTS 18."""
    ours, theirs = (Counter(_WORD.findall(text.casefold())) for text in (found, wanted))
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if shared else float(ours == theirs)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
