"""Feedback on many messages at once, from a file: each message counts once, however often and in whatever file it comes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import msgspec
from fedloop_events import ids
from fedloop_events.errors import UsageError
from fedloop_tasks.task import BadRow, Message, Messages, Task
from fedloop_tasks.words import normalised
from msgspec import Struct

from fedloop_clients.agent import Agent
from fedloop_clients.chatting import ChatResponse
from fedloop_clients.conversations import turns_of
from fedloop_clients.feedback import MAX_TEXT_CHARS, ConflictingFeedbackError, FeedbackInput, check_input, check_text


class Imported(Struct, frozen=True):
    """How many rows were `recorded` anew, of which the model answered `right` (None: it was not asked), were `known` before, or
    `skipped`, by reason."""

    recorded: int
    known: int
    right: int | None
    skipped: dict[str, int]


def take_in(agent: Agent, messages: Messages, *, skip_bad: bool = False) -> Imported:
    """Answer each message and record what is right about it; of a model that writes its own answers, record those that the
    messages tell of.

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
        response, what = told(agent, message) if task.speaks else (agent.predict(message.text), task.remark(message.answer))
        try:
            agent.feedback(response.response_id, feedback_id=feedback_id, **what)
        except ConflictingFeedbackError:  # another process takes in the same file
            continue
        recorded += 1
        right += response.answer == message.answer
    return Imported(recorded, len(good) - recorded, None if task.speaks else right, dict(Counter(each.reason for each in bad)))


def told(agent: Agent, message: Message) -> tuple[ChatResponse, dict[str, Any]]:
    """Keep the answers that a message tells of, without asking the model; the one that it is about, and what its user did about
    that, as arguments of `Agent.feedback`."""
    asked = turns_to(message)
    worse = None if message.rejected is None else agent.record_answer(asked, message.rejected)
    response = agent.record_answer(asked, message.answer)
    if worse is not None:
        return response, {"preferred_over": worse.response_id}
    if message.good is not None:
        return response, {"thumb": "up" if message.good else "down"}
    return response, agent.task.remark(message.answer)


def turns_to(message: Message) -> list[dict[str, str]]:
    """A message and what was said before it, as `Agent.chat` takes them."""
    return [*msgspec.to_builtins(message.earlier), {"role": "user", "content": message.text}]


def _checked(messages: Messages, task: Task) -> tuple[list[Message], list[BadRow]]:
    good, bad = [], [*messages.bad]
    for line, message in zip(messages.lines, messages.rows, strict=True):
        try:
            check_text("text", message.text, MAX_TEXT_CHARS)
            check_input(FeedbackInput(**task.remark(message.answer)), task.words)
            if task.speaks:
                turns_of(turns_to(message))
            good.append(message)
        except UsageError as error:
            bad.append(BadRow(line, error.message))
    return good, bad


def _ids(messages: Sequence[Message]) -> list[str]:
    """The caller's ids: the agent derives its own from them with its key."""
    found, seen = [], Counter[tuple[str, ...]]()
    for message in messages:
        said = (*(text for turn in message.earlier for text in (turn.role, normalised(turn.content))), normalised(message.text))
        told = (f"{message.rejected}", f"{message.good}") if (message.rejected, message.good) != (None, None) else ()
        each = (*said, normalised(message.answer), *told)
        found.append(ids.derived_id("message", *each, seen[each]))
        seen[each] += 1
    return found
