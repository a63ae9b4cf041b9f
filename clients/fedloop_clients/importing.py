"""Feedback on many messages at once, from a file: each message counts once, however often and in whatever file it comes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from fedloop_events import ids
from fedloop_events.errors import UsageError
from fedloop_tasks.task import BadRow, Message, Messages, Task
from fedloop_tasks.turns import Turn
from fedloop_tasks.words import normalised
from msgspec import Struct

from fedloop_clients.agent import Agent
from fedloop_clients.chatting import ChatResponse
from fedloop_clients.feedback import MAX_TEXT_CHARS, ConflictingFeedbackError, FeedbackInput, Response, check_input, check_text


class Imported(Struct, frozen=True):
    """How many rows were `recorded` anew, of which the model answered `right`, were `known` before, or `skipped`, by reason."""

    recorded: int
    known: int
    right: int
    skipped: dict[str, int]


def take_in(agent: Agent, messages: Messages, *, skip_bad: bool = False) -> Imported:
    """Answer each message and record what is right about it.

    A message is known by this device, its text, its answer, and how many equal ones came before it in the file, so that the file
    may grow, change its order or its line ends: texts are compared as `fedloop_tasks.words.normalised`. Every row is checked
    before the first is recorded. Raises `UsageError` for one that cannot be used, with its line or number, unless `skip_bad`; and
    what `Agent.task` raises.
    """
    task = agent.task
    good, bad = _checked(messages, task)
    if bad and not skip_bad:
        first = min(bad, key=lambda each: each.line)
        raise UsageError(
            f"{messages.path}, {messages.unit} {first.line}: {first.reason}",
            cause=f"{len(bad)} of its rows cannot be used, so none was recorded",
            hint="mend the file, or leave such rows out with --skip-bad",
        )
    recorded = right = 0
    for message, feedback_id in zip(good, _ids(good), strict=True):
        if agent.knows(feedback_id):
            continue
        response = _answered(agent, task, message)
        try:
            agent.feedback(response.response_id, feedback_id=feedback_id, **task.remark(message.answer))
        except ConflictingFeedbackError:  # another process takes in the same file
            continue
        recorded += 1
        right += response.answer == message.answer
    return Imported(recorded, len(good) - recorded, right, dict(Counter(each.reason for each in bad)))


def _answered(agent: Agent, task: Task, message: Message) -> Response | ChatResponse:
    if task.words:
        return agent.predict(message.text)
    turns = (*message.earlier, Turn("user", message.text))
    return agent.chat([{"role": turn.role, "content": turn.content} for turn in turns])


def _checked(messages: Messages, task: Task) -> tuple[list[Message], list[BadRow]]:
    good, bad = [], [*messages.bad]
    for line, message in zip(messages.lines, messages.rows, strict=True):
        try:
            check_text("text", message.text, MAX_TEXT_CHARS)
            check_input(FeedbackInput(**task.remark(message.answer)), task.words)
            good.append(message)
        except UsageError as error:
            bad.append(BadRow(line, error.message))
    return good, bad


def _ids(messages: Sequence[Message]) -> list[str]:
    """The caller's ids: the agent derives its own from them with its key."""
    found, seen = [], Counter[tuple[str, str]]()
    for message in messages:
        each = normalised(message.text), normalised(message.answer)
        found.append(ids.derived_id("message", *each, seen[each]))
        seen[each] += 1
    return found
