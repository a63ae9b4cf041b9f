"""What users' reactions teach a language model: one example at most of each response, for an example is what privacy counts."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from msgspec import Struct

from fedloop_tasks.causal.examples import Example, Feedback, Judged, Pair
from fedloop_tasks.task import Interaction
from fedloop_tasks.turns import Turn

Learns = Literal["feedback", "sft", "kto", "dpo"]
_CONTENT = 4
"""Stars with which a user is content; with two fewer the user is not."""


class _Response(Struct):
    """A response, and what its user has done about it in the end. `good` is None where nobody has judged it."""

    turns: tuple[Turn, ...]
    answer: str | None
    edit: str | None = None
    good: bool | None = None
    worse: str | None = None
    """The response that this one is preferred over."""


def examples(interactions: Iterable[Interaction], learns: Learns) -> list[Feedback]:
    """An example of every response that teaches what the model `learns`, in the order in which they were last taught.

    | of a response | feedback | sft | kto | dpo |
    | --- | --- | --- | --- | --- |
    | a better answer | both: an answer to learn, and a pair | the answer | the answer, as a good one | a pair |
    | preferred over another one | a pair | | the answer, as a good one | a pair |
    | a thumb, or 1, 2, 4 or 5 stars | the answer, judged | a good one | the answer, judged | |

    The first line that applies counts, and of several thumbs, ratings and better answers the latest. A response that is the worse
    one of a pair is no example by itself; one that is the worse one of two pairs, or is already another pair's better one, is not
    used again, and what is preferred over it then is a good answer.
    """
    found = _collected(interactions)
    used: set[str] = set()
    paired: dict[str, Feedback] = {}
    for name, each in found.items():
        if each.edit is not None and (example := _corrected(each, each.edit, learns)) is not None:
            paired[name] = example
            used.add(name)
    for name, each in found.items():
        worse = found.get(each.worse or "")
        if name in used or worse is None or each.worse in used or worse is each or learns not in ("feedback", "dpo"):
            continue
        if each.answer is not None and worse.answer is not None and each.answer != worse.answer:
            paired[name] = Pair(each.turns, each.answer, worse.answer)
            used |= {name, str(each.worse)}
    taught: list[Feedback] = []
    for name, each in found.items():
        if name in paired:
            taught.append(paired[name])
        elif name not in used and (judged := _judged(each, learns)) is not None:
            taught.append(judged)
    return taught


def _collected(interactions: Iterable[Interaction]) -> dict[str, _Response]:
    found: dict[str, _Response] = {}
    for each in interactions:
        response = found.pop(each.interaction_id, None)
        if response is None:
            before = tuple(Turn(turn.role, turn.text.text) for turn in each.context)
            answer = None if each.response is None else each.response.text
            response = _Response((*before, Turn("user", each.prompt.text)), answer)
        if each.edit is not None:
            response.edit = each.edit.text
        if each.thumb is not None:
            response.good = each.thumb == "up"
        elif each.rating is not None:
            response.good = True if each.rating >= _CONTENT else False if each.rating <= _CONTENT - 2 else None
        response.worse = each.preferred_over or response.worse
        found[each.interaction_id] = response
    return found


def _corrected(response: _Response, edit: str, learns: Learns) -> Feedback | None:
    paired = response.answer is not None and response.answer != edit
    if learns == "kto":
        return Judged(response.turns, edit, good=True)
    if learns == "sft" or (learns == "feedback" and not paired):
        return Example(response.turns, edit)
    return Pair(response.turns, edit, str(response.answer), learn=learns == "feedback") if paired else None


def _judged(response: _Response, learns: Learns) -> Feedback | None:
    good = True if response.worse is not None and response.good is None else response.good
    if response.answer is None or good is None or learns == "dpo":
        return None
    if learns == "sft":
        return Example(response.turns, response.answer) if response.good else None
    return Judged(response.turns, response.answer, good)
