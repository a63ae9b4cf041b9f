"""What one reaction teaches: the examples that are made of it, and how much it weighs beside others about the same response.

The rules are those by which devices learn (`fedloop_tasks.classification.examples`, `fedloop_tasks.causal.reactions`), but for
one: there an example is what privacy counts, and a response makes one at most; here it makes one of each kind.
"""

from __future__ import annotations

import hashlib
from base64 import b64encode
from collections.abc import Iterator
from typing import Any, Final

from fedloop_events import ids, types
from fedloop_events.envelope import MAX_EVENT_BYTES, size_bytes
from fedloop_events.masked import MaskedText
from fedloop_tasks.words import normalised
from msgspec import structs

KINDS: Final = ("label", "sft", "kto", "dpo")
REMARK, JUDGEMENT, PREFERENCE, ANSWER = range(4)
"""How much a reaction weighs: one that says what is right the most, one that judges nothing nothing."""
_CONTENT: Final = 4
"""Stars with which a user is content; with two fewer the user is not."""


def standing(reaction: types.Reaction) -> int:
    """Of several reactions to one response, those with the highest standing count, and of these the newest."""
    if reaction.label is not None or (reaction.correction is not None and not _of_labels(reaction)):
        return ANSWER
    if reaction.preferred_over is not None:
        return PREFERENCE
    return REMARK if reaction.thumb is None and reaction.rating is None else JUDGEMENT


def examples(scored: types.FeedbackScored, worse: MaskedText | None = None) -> Iterator[types.ExampleCurated]:
    """The examples of a piece of feedback, one of a kind at most.

    `worse` is the answer that this one is preferred over, where it is known. Of what does not fit into one event the oldest turns
    are left out; where that does not suffice, the example is.
    """
    if not _shows(scored.reaction.text):
        return
    for kind, fields in _taught(scored.reaction, worse):
        example = _fitted(_example(scored, kind, fields))
        if example is not None and all(map(_shows, filter(None, (example.completion, example.rejected)))):
            yield example


def example_id(origin: str, client_id: str, feedback_id: str, kind: str) -> str:
    """Of the example of this kind that a piece of feedback makes, whether or not it makes one."""
    return ids.derived_id(origin, "example", client_id, feedback_id, kind)


def content(example: types.ExampleCurated) -> str:
    """A digest of what an example teaches: equal for the same prompt, context and target, as people compare texts. Whether the
    prompt is in upper or lower case does not count."""
    said = [f"{turn.role} {normalised(turn.text.text)}" for turn in example.context]
    target = [
        example.label,
        example.desirable,
        *(each and normalised(each.text) for each in (example.completion, example.rejected)),
    ]
    return short(example.kind, *said, normalised(example.text.text).casefold(), *target)


def class_of(example: types.ExampleCurated) -> str:
    """What an example is balanced against others of its kind by."""
    return "" if example.label is None and example.desirable is None else short(example.label, example.desirable)


def short(*parts: object) -> str:
    """A digest of 72 bits in 12 characters: states hold thousands, and a client that finds two of its own alike harms itself."""
    return b64encode(hashlib.blake2b("\x00".join(map(str, parts)).encode(), digest_size=9).digest()).decode()


def _shows(text: MaskedText) -> bool:
    """Whether there is something to read in it; its beginning nearly always says so."""
    return bool(normalised(text.text[:100]) or normalised(text.text))


def _of_labels(reaction: types.Reaction) -> bool:
    """Whether the answer was one of a closed set of words: a correction in words of the user's own is then no answer."""
    return reaction.predicted is not None


def _taught(reaction: types.Reaction, worse: MaskedText | None) -> Iterator[tuple[str, dict[str, Any]]]:
    good = _judged(reaction)
    if _of_labels(reaction) or reaction.label is not None:
        label = reaction.label if reaction.label is not None else reaction.predicted if good else None
        if label is not None:
            yield "label", {"label": label}
        return
    answer, better = reaction.response, reaction.correction
    if better is not None:
        yield "sft", {"completion": better}
    chosen, rejected = (better, answer) if better is not None else (answer, worse)
    if chosen is not None and rejected is not None and normalised(chosen.text) != normalised(rejected.text):
        yield "dpo", {"completion": chosen, "rejected": rejected}
    if good is None and better is None and reaction.preferred_over is not None:
        good = True
    if answer is not None and good is not None:
        yield "kto", {"completion": answer, "desirable": good}


def _judged(reaction: types.Reaction) -> bool | None:
    """Whether the user was content; None if the reaction does not say so."""
    if reaction.thumb is not None:
        return reaction.thumb == "up"
    if reaction.rating is None or _CONTENT - 2 < reaction.rating < _CONTENT:
        return None
    return reaction.rating >= _CONTENT


def _example(scored: types.FeedbackScored, kind: str, fields: dict[str, Any]) -> types.ExampleCurated:
    return types.ExampleCurated(
        origin=scored.origin,
        use_case=scored.use_case,
        example_id=example_id(scored.origin, scored.client_id, scored.feedback_id, kind),
        kind=kind,  # type: ignore[arg-type]
        client_id=scored.client_id,
        feedback_id=scored.feedback_id,
        event_id=scored.event_id,
        release=scored.release,
        text=scored.reaction.text,
        context=scored.reaction.context,
        priority=scored.priority,
        language=scored.language,
        **fields,
    )


def _fitted(example: types.ExampleCurated) -> types.ExampleCurated | None:
    left = size_bytes(example) - MAX_EVENT_BYTES
    for turns, turn in enumerate(example.context, 1):
        if left <= 0:
            break
        left -= size_bytes(turn)
        if left <= 0:
            return structs.replace(example, context=example.context[turns:])
    return example if left <= 0 else None
