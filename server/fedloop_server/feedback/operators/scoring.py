"""Gate and score: each piece of feedback becomes a `FeedbackScored` by use case, or goes to quarantine, once.

| what the reaction says | satisfaction |
| --- | --- |
| thumb up, down | 1, 0 |
| else a rating r of 1 to 5 | (r - 1) / 4 |
| else a label or correction | 1 if it is what was answered, 0 if not |
| else `preferred_over` another answer | 1 |
| else the signal "copied" | 1 |
| else the signal "regenerated", "abandoned" or "escalated" | 0 |
| else (a comment, another signal) | None |

The first line that applies counts. `correct` compares the label, or else the correction, with what was answered; where there is
neither, a thumb says of an answer from a closed set of words whether it is right. Priority is 1 - the product of (1 - weight)
over what applies: a correction of a wrong answer 0.6, a preference 0.4, satisfaction below the middle 0.4 in proportion, negative
sentiment 0.3 in proportion, novelty 0.3 in proportion. A `FeedbackRecorded` holds no confidence, so none counts. No language is
detected: `language` stays None.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import ClassVar, Final

from fedloop_events import topics, types
from fedloop_events.envelope import MAX_EVENT_BYTES, Record, size_bytes
from fedloop_events.masked import MaskedText
from fedloop_events.types import FeedbackRecorded, Payload
from fedloop_privacy.masking.errors import MaskingError
from msgspec import Struct
from msgspec.structs import replace

from fedloop_server.feedback.operator import Emit
from fedloop_server.feedback.operators import gate
from fedloop_server.feedback.operators.novelty import Embed, Sampled, novelty
from fedloop_server.feedback.operators.sentiment import sentiment

Full = Callable[[str], Mapping[str, int]]
"""Counts, by type, of what a whole masker would still mask in a text. Raises `MaskingError` where it cannot say."""

LOOKS_PERSONAL: Final = "looks-personal"
MAX_REMEMBERED: Final = 256
"""Pieces of feedback of one client whose use case is known by their id."""
MAX_USE_CASES: Final = 64
"""Of one client. What is said about another one is not scored: nobody could withdraw it any more."""
_RETRACTED: Final = ""
_NEGATIVE: Final = frozenset({"regenerated", "abandoned", "escalated"})
_POSITIVE: Final = frozenset({"copied"})


class ClientFeedback(Struct):
    """What is known of one client: at most `MAX_USE_CASES`, `MAX_REMEMBERED` and `novelty.MAX_SAMPLED` entries."""

    use_cases: list[str] = []
    remembered: dict[str, str] = {}
    """By feedback id: its use case, or "" where it was retracted; the latest last."""
    forgot: bool = False
    """Whether there was more to remember."""
    sample: list[Sampled] = []


class Scoring:
    """Reads topic `feedback`, by client. Feedback that was retracted before is left out.

    `full` reads what the fast gate finds nothing in; where it fails, the feedback is held back. `embed` gives novelty.
    `high_at` is the priority from which on feedback takes the high lane.
    """

    name: ClassVar[str] = "scoring"
    version: ClassVar[int] = 1
    topics: ClassVar[tuple[str, ...]] = (topics.FEEDBACK,)
    state_type = ClientFeedback

    def __init__(self, *, full: Full | None = None, embed: Embed | None = None, high_at: float = 0.5) -> None:
        self._full, self._embed, self._high_at = full, embed, high_at

    def key(self, record: Record, payload: Payload) -> str | None:
        return payload.key if isinstance(payload, FeedbackRecorded | types.FeedbackRetracted) else None

    def apply(self, state: ClientFeedback, record: Record, payload: Payload) -> Iterator[Emit]:
        match payload:
            case FeedbackRecorded():
                if state.remembered.get(payload.feedback_id) != _RETRACTED:
                    yield Emit(self._decide(state, record, payload))
            case types.FeedbackRetracted():
                for use_case in _withdraw(state, payload.feedback_id):
                    yield Emit(types.ScoreWithdrawn(payload.origin, use_case, payload.client_id, payload.feedback_id))
            case _:
                pass

    def advance(self, key: str, state: ClientFeedback, now_ms: int) -> Iterator[Emit]:
        return iter(())

    def released(self, record: Record, feedback: FeedbackRecorded, decided_ms: int) -> Emit | None:
        """What the release of `record` from quarantine makes of it; None if it does not fit into an event.

        It counts as recorded when that was decided: the windows in which it would have counted before are closed.
        """
        scored = self._score(record, feedback, None)
        return None if scored is None else Emit(replace(scored, recorded_ms=decided_ms), of=(record.id, "released"))

    def _decide(self, state: ClientFeedback, record: Record, feedback: FeedbackRecorded) -> Payload:
        if not _remember(state, feedback):
            detail = f"its client has given feedback about {MAX_USE_CASES} other use cases"
            return _quarantined(record, feedback, "too-many-use-cases", detail)
        try:
            found = self._found(feedback)
        except MaskingError as error:
            return _quarantined(record, feedback, "not-checked", error.message)
        if found:
            return _quarantined(record, feedback, LOOKS_PERSONAL, found=found)
        distance = None if self._embed is None else novelty(state.sample, record.id, self._embed(feedback.text.text))
        scored = self._score(record, feedback, distance)
        return scored or _quarantined(record, feedback, "too-large", "it does not fit into an event with its scores")

    def _found(self, feedback: FeedbackRecorded) -> dict[str, int]:
        """Raises `MaskingError`."""
        found = gate.found(feedback)
        if not found and self._full is not None:
            for text in gate.texts(feedback):
                for kind, count in self._full(text).items():
                    found[kind] = found.get(kind, 0) + count
        return {kind: count for kind, count in found.items() if count}

    def _score(self, record: Record, feedback: FeedbackRecorded, distance: float | None) -> types.FeedbackScored | None:
        right, mood = correct(feedback), None if feedback.comment is None else sentiment(feedback.comment.text)
        content = satisfaction(feedback)
        urgency = priority(feedback, content, right, mood, distance)
        reaction = types.Reaction(
            text=feedback.text,
            context=feedback.context,
            predicted=feedback.predicted,
            response=feedback.response,
            thumb=feedback.thumb,
            rating=feedback.rating,
            label=feedback.label,
            correction=feedback.correction,
            preferred_over=feedback.preferred_over,
            signal=feedback.signal,
        )
        scored = types.FeedbackScored(
            origin=feedback.origin,
            use_case=feedback.use_case,
            event_id=record.id,
            client_id=feedback.client_id,
            feedback_id=feedback.feedback_id,
            response_id=feedback.response_id,
            release=feedback.release,
            given_ms=record.time_s * 1000,
            recorded_ms=record.appended_ms,
            reaction=reaction,
            satisfaction=content,
            correct=right,
            sentiment=mood,
            priority=urgency,
            lane="high" if urgency >= self._high_at else "normal",
            novelty=distance,
            masked=_placeholders(feedback),
        )
        return _fitting(scored)


def satisfaction(feedback: FeedbackRecorded) -> float | None:
    """By the table above."""
    if feedback.thumb is not None:
        return 1.0 if feedback.thumb == "up" else 0.0
    if feedback.rating is not None:
        return (feedback.rating - 1) / 4
    if (right := correct(feedback)) is not None:
        return float(right)
    if feedback.preferred_over is not None or feedback.signal in _POSITIVE:
        return 1.0
    return 0.0 if feedback.signal in _NEGATIVE else None


def correct(feedback: FeedbackRecorded) -> bool | None:
    """Whether the label, or else the correction, is what was answered; of a closed set of words a thumb says it too. None where
    there is none of these, or no answer is known."""
    given = feedback.label if feedback.label is not None else _text(feedback.correction)
    if given is None:
        return None if feedback.predicted is None or feedback.thumb is None else feedback.thumb == "up"
    answers = [each for each in (feedback.predicted, _text(feedback.response)) if each is not None]
    if answers:
        return any(given.strip() == each.strip() for each in answers)
    return None if feedback.label is not None else False


def priority(
    feedback: FeedbackRecorded, content: float | None, right: bool | None, mood: float | None, distance: float | None
) -> float:
    """From 0 to 1, as above."""
    corrected = feedback.label is not None or feedback.correction is not None
    weights = (
        0.6 if corrected and right is False else 0.0,
        0.4 if feedback.preferred_over is not None else 0.0,
        0.0 if content is None else 0.4 * max(0.0, 1 - 2 * content),
        0.0 if mood is None else 0.3 * max(0.0, -mood),
        0.3 * (distance or 0.0),
    )
    left = 1.0
    for weight in weights:
        left *= 1 - weight
    return round(1 - left, 4)


def _withdraw(state: ClientFeedback, feedback_id: str) -> list[str]:
    """The use cases in which it may have been scored: its own, or if that is forgotten all that the client had."""
    known = state.remembered.get(feedback_id)
    _keep(state, feedback_id, _RETRACTED)
    if known is None:
        return list(state.use_cases) if state.forgot else []
    return [known] if known != _RETRACTED else []


def _remember(state: ClientFeedback, feedback: FeedbackRecorded) -> bool:
    """Whether it could be: a retraction finds it from then on, whether it is scored or held back."""
    if feedback.use_case not in state.use_cases:
        if len(state.use_cases) >= MAX_USE_CASES:
            return False
        state.use_cases.append(feedback.use_case)
    before = state.remembered.get(feedback.feedback_id, feedback.use_case)
    if before == feedback.use_case:
        _keep(state, feedback.feedback_id, feedback.use_case)
    else:
        # One id in two use cases: a retraction must reach both, and does as one that is forgotten.
        del state.remembered[feedback.feedback_id]
        state.forgot = True
    return True


def _keep(state: ClientFeedback, feedback_id: str, value: str) -> None:
    state.remembered.pop(feedback_id, None)
    state.remembered[feedback_id] = value
    if len(state.remembered) > MAX_REMEMBERED:
        del state.remembered[next(iter(state.remembered))]
        state.forgot = True


def _quarantined(
    record: Record, feedback: FeedbackRecorded, reason: str, detail: str = "", *, found: dict[str, int] | None = None
) -> types.EventQuarantined:
    return types.EventQuarantined(
        origin=feedback.origin,
        source_topic=record.topic,
        event_id=record.id,
        reason=reason,
        detail=detail[:200],
        client_id=feedback.client_id,
        use_case=feedback.use_case,
        release=feedback.release,
        given_ms=record.time_s * 1000,
        recorded_ms=record.appended_ms,
        found=found or {},
    )


def _fitting(scored: types.FeedbackScored) -> types.FeedbackScored | None:
    """With as much as fits into an event: turns are left out, the oldest first, then the answer, as devices do."""
    reaction = scored.reaction
    while size_bytes(scored) > MAX_EVENT_BYTES:
        if reaction.context:
            reaction = replace(reaction, context=reaction.context[1:])
        elif reaction.response is not None:
            reaction = replace(reaction, response=None)
        else:
            return None
        scored = replace(scored, reaction=reaction)
    return scored


def _placeholders(feedback: FeedbackRecorded) -> int:
    masked = [feedback.text, *(turn.text for turn in feedback.context)]
    masked += [each for each in (feedback.response, feedback.correction, feedback.comment) if each is not None]
    return sum(sum(each.counts.values()) for each in masked)


def _text(masked: MaskedText | None) -> str | None:
    return None if masked is None else masked.text
