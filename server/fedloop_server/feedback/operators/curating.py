"""Curating: of scored feedback, examples to train on: each once, no class out of proportion, what is retracted withdrawn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from fedloop_events import topics, types
from fedloop_events.envelope import Record, size_bytes
from fedloop_events.masked import MaskedText
from msgspec import Struct

from fedloop_server.feedback import teaching
from fedloop_server.feedback.operator import Emit

WAITING_BYTES: Final = 128 * 1024
ANSWERS: Final = 256
ANSWERS_CHARS: Final = 32 * 1024
"""At most four times as many bytes."""
RETRACTED: Final = "its feedback was retracted"
REPLACED: Final = "newer feedback on the same response replaced it"
FORGOTTEN: Final = "the other answer's feedback is remembered no longer, and could not be retracted"


class Mark(Struct, array_like=True, gc=False):
    """What is known of an example without its texts."""

    example_id: str
    kind: str
    content: str
    class_: str


class Lesson(Struct, array_like=True):
    """The piece of feedback that counts of those on one response, and the examples of it that wait or are curated."""

    response: str
    standing: int
    marks: list[Mark]


class Waiting(Struct, array_like=True):
    """An example in the buffer; `number` is its place among all that came."""

    example: types.ExampleCurated
    mark: Mark
    lesson: str
    number: int
    size: int


class Answer(Struct, array_like=True):
    """An answer, and the piece of feedback that it was published with."""

    text: MaskedText
    feedback: str


class Curation(Struct):
    """One use case's. Feedback and responses are named by digests of client and id, oldest first in each dictionary.

    Bounded to 800 kB as encoded, a third of them texts: `remembered` lessons, pairs and retractions, twice as many contents, the
    buffer's size and `WAITING_BYTES`, `ANSWERS` and `ANSWERS_CHARS`.
    """

    lessons: dict[str, Lesson] = {}
    responses: dict[str, str] = {}
    """The lesson of each response."""
    waiting: dict[str, Waiting] = {}
    contents: dict[str, None] = {}
    """Of examples that wait or are curated, longer than of the lessons."""
    curated: dict[str, dict[str, int]] = {}
    """How many examples of the lessons are curated, by kind and class."""
    pairs: dict[str, str] = {}
    """Curated or waiting pairs whose worse answer was published with another piece of feedback: which one."""
    answers: dict[str, Answer] = {}
    answers_chars: int = 0
    retracted: dict[str, None] = {}
    number: int = 0
    arrived: int = 0
    """Since the buffer was last gone through."""
    due_ms: int = 0
    """When it is gone through next, whatever arrives; 0: not before something does."""


class Curating:
    """Emits what scored feedback teaches (`teaching.examples`) as `ExampleCurated`, and takes it back as `ExampleWithdrawn`.

    Examples wait in a buffer of `size`. It is gone through in order of priority when half as many have arrived, and at the end of
    each interval of `wait_ms` of the log's clock; a full one loses the example of the lowest priority. What is in lane "high"
    does not wait, unless its class is out of proportion: a class that has `free` examples, and more than `ratio` times its even
    share of its kind, gets no more. An example whose content is curated already, or waits, is left out. Of several pieces of
    feedback on one response the newest of the highest standing counts. `remembered` pieces of feedback are known for all this; a
    retraction of an older one withdraws every example that there can be of it.
    """

    name, version, topics = "curating", 1, (topics.SCORED,)
    state_type = Curation

    def __init__(
        self, *, size: int = 64, wait_ms: int = 60_000, remembered: int = 2_000, free: int = 10, ratio: float = 1.5
    ) -> None:
        self._size, self._wait_ms, self._remembered, self._free, self._ratio = size, wait_ms, remembered, free, ratio

    def key(self, record: Record, payload: types.Payload) -> str | None:
        return record.key if isinstance(payload, types.FeedbackScored | types.ScoreWithdrawn) else None

    def apply(self, state: Curation, record: Record, payload: types.Payload) -> Iterator[Emit]:
        yield from self.advance(record.key, state, record.appended_ms)  # so that when it is asked for makes no difference
        if isinstance(payload, types.ScoreWithdrawn):
            yield from self._retract(state, record, payload)
        elif isinstance(payload, types.FeedbackScored):
            yield from self._learn(state, record, payload)

    def advance(self, key: str, state: Curation, now_ms: int) -> Iterator[Emit]:
        if 0 < state.due_ms <= now_ms:
            yield from self._flush(state, state.due_ms)

    # --- feedback ------------------------------------------------------------------------------------------------------------

    def _learn(self, state: Curation, record: Record, scored: types.FeedbackScored) -> Iterator[Emit]:
        feedback = teaching.short(scored.client_id, scored.feedback_id)
        response = teaching.short(scored.client_id, scored.response_id)
        if feedback in state.lessons or feedback in state.retracted:
            return
        reaction, worse = scored.reaction, None
        if reaction.preferred_over is not None:
            worse = state.answers.get(teaching.short(scored.client_id, reaction.preferred_over))
        if reaction.response is not None and reaction.predicted is None:
            _remember_answer(state, response, Answer(reaction.response, feedback))
        standing = teaching.standing(reaction)
        before = state.responses.get(response)
        if standing == teaching.REMARK or (before is not None and state.lessons[before].standing > standing):
            return
        if before is not None:
            yield from _withdraw(state, record, scored, before, REPLACED)
        lesson = state.lessons[feedback] = Lesson(response, standing, [])
        state.responses[response] = feedback
        for example in teaching.examples(scored, None if worse is None else worse.text):
            mark = Mark(example.example_id, example.kind, teaching.content(example), teaching.class_of(example))
            if mark.content in state.contents:
                continue
            state.contents[mark.content] = None
            lesson.marks.append(mark)
            if worse is not None and example.rejected is worse.text:
                state.pairs[mark.example_id] = worse.feedback
            yield from self._take(state, record, Waiting(example, mark, feedback, state.number, 0), scored.lane)
        yield from self._forget(state, record, scored)

    def _take(self, state: Curation, record: Record, new: Waiting, lane: str) -> Iterator[Emit]:
        state.number += 1
        if lane == "high" and self._in_proportion(state, new.mark):
            yield _curate(state, new, record.appended_ms)
            return
        new.size = size_bytes(new.example)
        state.waiting[new.mark.example_id] = new
        state.arrived += 1
        state.due_ms = state.due_ms or (record.appended_ms // self._wait_ms + 1) * self._wait_ms
        if 2 * state.arrived >= self._size:
            yield from self._flush(state, record.appended_ms)
        while len(state.waiting) > self._size or sum(each.size for each in state.waiting.values()) > WAITING_BYTES:
            least = min(state.waiting.values(), key=lambda each: (each.example.priority, each.number))
            _drop(state, least.lesson, least.mark)

    def _flush(self, state: Curation, time_ms: int) -> Iterator[Emit]:
        """Curate what waits and is in proportion, or comes to be so meanwhile."""
        state.arrived = state.due_ms = 0
        order = sorted(state.waiting.values(), key=lambda each: (-each.example.priority, each.number))
        while order:
            left = []
            for each in order:
                if self._in_proportion(state, each.mark):
                    yield _curate(state, each, time_ms)
                else:
                    left.append(each)
            if len(left) == len(order):
                return
            order = left

    def _in_proportion(self, state: Curation, mark: Mark) -> bool:
        """Whether its class is: the smallest always is."""
        classes = state.curated.get(mark.kind, {})
        count = classes.get(mark.class_, 0)
        return count < self._free or count * len(classes) <= self._ratio * sum(classes.values())

    # --- taking back ---------------------------------------------------------------------------------------------------------

    def _retract(self, state: Curation, record: Record, retracted: types.ScoreWithdrawn) -> Iterator[Emit]:
        feedback = teaching.short(retracted.client_id, retracted.feedback_id)
        state.retracted[feedback] = None
        _shorten(state.retracted, self._remembered)
        for response in [name for name, each in state.answers.items() if each.feedback == feedback]:
            state.answers_chars -= len(state.answers.pop(response).text.text)
        for example_id in [each for each, other in state.pairs.items() if other == feedback]:
            yield from _withdraw_pair(state, record, retracted, example_id, RETRACTED)
        if feedback in state.lessons:
            yield from _withdraw(state, record, retracted, feedback, RETRACTED)
            return
        for kind in teaching.KINDS:
            example_id = teaching.example_id(retracted.origin, retracted.client_id, retracted.feedback_id, kind)
            yield _withdrawal(record, retracted, example_id, RETRACTED)

    def _forget(self, state: Curation, record: Record, cause: types.UseCaseEvent) -> Iterator[Emit]:
        """Keep the bounds. A pair of two pieces of feedback is withdrawn when it is forgotten: its id says nothing of the other
        one, whose retraction would not find it."""
        _shorten(state.contents, 2 * self._remembered)
        while len(state.lessons) > self._remembered:
            feedback, lesson = next(iter(state.lessons.items()))
            for example_id in [each.example_id for each in lesson.marks if each.example_id in state.pairs]:
                yield from _withdraw_pair(state, record, cause, example_id, FORGOTTEN)
            for mark in list(lesson.marks):
                if mark.example_id in state.waiting:
                    _drop(state, feedback, mark)
                else:
                    _count(state, mark, -1)
            del state.lessons[feedback]
            state.responses.pop(lesson.response, None)


def _curate(state: Curation, waiting: Waiting, time_ms: int) -> Emit:
    state.waiting.pop(waiting.mark.example_id, None)
    _count(state, waiting.mark, 1)
    return Emit(waiting.example, ("curated", waiting.mark.example_id, waiting.example.event_id), time_ms)


def _withdraw(state: Curation, record: Record, cause: types.UseCaseEvent, feedback: str, reason: str) -> Iterator[Emit]:
    """Take back all of a lesson, and the lesson."""
    lesson = state.lessons[feedback]
    for mark in list(lesson.marks):
        if _drop(state, feedback, mark):
            yield _withdrawal(record, cause, mark.example_id, reason)
    del state.lessons[feedback], state.responses[lesson.response]


def _withdraw_pair(state: Curation, record: Record, cause: types.UseCaseEvent, example_id: str, reason: str) -> Iterator[Emit]:
    for feedback, lesson in state.lessons.items():
        for mark in lesson.marks:
            if mark.example_id == example_id:
                if _drop(state, feedback, mark):
                    yield _withdrawal(record, cause, example_id, reason)
                return


def _drop(state: Curation, feedback: str, mark: Mark) -> bool:
    """Know an example no longer; whether it was curated."""
    state.lessons[feedback].marks.remove(mark)
    state.contents.pop(mark.content, None)
    state.pairs.pop(mark.example_id, None)
    if state.waiting.pop(mark.example_id, None) is not None:
        return False
    _count(state, mark, -1)
    return True


def _withdrawal(record: Record, cause: types.UseCaseEvent, example_id: str, reason: str) -> Emit:
    # Of the record, and not by place: whether examples that were due come before it depends on when time was advanced.
    return Emit(types.ExampleWithdrawn(cause.origin, cause.use_case, example_id, reason), ("withdrawn", example_id, record.id))


def _count(state: Curation, mark: Mark, by: int) -> None:
    classes = state.curated.setdefault(mark.kind, {})
    classes[mark.class_] = classes.get(mark.class_, 0) + by
    if not classes[mark.class_]:
        del classes[mark.class_]


def _remember_answer(state: Curation, response: str, answer: Answer) -> None:
    before = state.answers.pop(response, None)
    state.answers[response] = answer
    state.answers_chars += len(answer.text.text) - (0 if before is None else len(before.text.text))
    while len(state.answers) > ANSWERS or state.answers_chars > ANSWERS_CHARS:
        state.answers_chars -= len(state.answers.pop(next(iter(state.answers))).text.text)


def _shorten(known: dict[str, None], most: int) -> None:
    while len(known) > most:
        del known[next(iter(known))]
