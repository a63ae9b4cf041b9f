"""The server's held-out conversations: taken in as devices see texts, and what a release makes of them."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from fedloop_events.errors import UsageError
from fedloop_events.files import write_private
from fedloop_events.folds.releases import Evaluation
from fedloop_events.types import CausalSpec
from msgspec import Struct
from msgspec.structs import replace

from fedloop_tasks.causal.examples import Example
from fedloop_tasks.task import Arrays, Message
from fedloop_tasks.turns import Turn

if TYPE_CHECKING:
    from fedloop_tasks.causal.model import CausalModel

FILE: Final = "heldout.json"
LOSS: Final = "loss_per_token"
"""The metric that leads, and of which less is better: cross entropy of an answer's tokens, its end included, in nats."""
EXACT: Final = "exact_match"
"""The part of the held-out prompts to which the greedy answer is the one that is held out, to the token."""
F1: Final = "token_f1"
"""How far the words of greedy answers are those wanted, over the first `WRITTEN` prompts (Rajpurkar et al. 2016, arXiv
1606.05250, without their clean-up of articles)."""
METRICS: Final = (LOSS, EXACT, F1)
WRITTEN: Final = 24
"""Answers are written for so many prompts: a second each, where a pass over all of them takes as long."""
_AGAIN: Final = "run `fedloop server init` again as before"
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
        path = folder / FILE
        try:
            data = path.read_bytes()
            self._held = msgspec.json.decode(data, type=HeldOut).messages
        except FileNotFoundError:
            raise UsageError(f"there is no held-out set {path}", hint=f"{_AGAIN}: it takes one in") from None
        except (OSError, msgspec.MsgspecError) as error:
            raise UsageError(
                f"the held-out set {path} cannot be read", cause=str(error), hint=f"move it away, then {_AGAIN}: it takes one in"
            ) from None
        self._sha256 = hashlib.sha256(data).hexdigest()
        self._spec, self._model_dir = spec, model_dir
        self._model: CausalModel | None = None

    def __call__(self, arrays: Arrays) -> Evaluation:
        if self._model is None:
            from fedloop_tasks.causal.model import CausalModel

            self._model = CausalModel(self._spec, model_dir=self._model_dir)
        self._model.load(arrays)
        turns = [(*each.earlier, Turn("user", each.text)) for each in self._held]
        scores = self._model.scores(
            self._model.encoded([Example(said, each.answer) for said, each in zip(turns, self._held, strict=True)])
        )
        answers = [self._model.generate(said).text for said in turns[:WRITTEN]]
        metrics = {
            LOSS: sum(each.loss for each in scores) / max(1, sum(each.tokens for each in scores)),
            EXACT: _mean([each.exact for each in scores]),
            F1: _mean([f1(answer, each.answer) for answer, each in zip(answers, self._held, strict=False)]),
        }
        return Evaluation(metrics, LOSS, len(scores), self._sha256)


def f1(found: str, wanted: str) -> float:
    """The harmonic mean of how many words of `found` are wanted, and how many that are wanted are there; words by UTS 18."""
    ours, theirs = (Counter(_WORD.findall(text.casefold())) for text in (found, wanted))
    shared = (ours & theirs).total()
    return 2 * shared / (ours.total() + theirs.total()) if shared else float(ours == theirs)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0
