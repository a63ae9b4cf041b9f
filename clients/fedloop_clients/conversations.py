"""What an application gives to chat: messages and how to answer them, checked before anything is made of them."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping, Sequence
from typing import Final, cast, get_args

from fedloop_events.errors import UsageError
from fedloop_tasks.turns import Role, Turn
from fedloop_tasks.words import normalised
from msgspec import Struct

from fedloop_clients.feedback import MAX_TEXT_CHARS, check_text

MAX_ANSWER_CHARS: Final = 100_000
MAX_STOP_CHARS: Final = 200
_ROLES: Final[tuple[str, ...]] = get_args(Role)
_MOST: Final = 2**63


class Sampling(Struct, frozen=True):
    """How an answer is written: in at most `max_tokens` tokens (as the model does, if None), greedily or drawn, up to the first
    of the texts `stop`."""

    max_tokens: int | None
    temperature: float
    seed: int
    stop: tuple[str, ...] = ()


def sampling(max_tokens: int | None, temperature: float, seed: int | None, stop: Sequence[str] = ()) -> Sampling:
    """Raises `UsageError`. Without a seed each answer is drawn anew."""
    if max_tokens is not None and (type(max_tokens) is not int or max_tokens < 1):
        raise UsageError("max_tokens must be a whole number of 1 or more")
    if type(temperature) not in (int, float) or not (math.isfinite(temperature) and temperature >= 0):
        raise UsageError("temperature must be a number of 0 or more")
    if seed is not None and (type(seed) is not int or not -_MOST <= seed < _MOST):
        raise UsageError("seed must be a whole number of at most 64 bits")
    if isinstance(stop, str) or not all(type(each) is str and 0 < len(each) <= MAX_STOP_CHARS for each in stop):
        raise UsageError(f"stop must be a list of texts of 1 to {MAX_STOP_CHARS} characters")
    return Sampling(max_tokens, float(temperature), secrets.randbits(63) if seed is None else seed, tuple(stop))


def turns_of(messages: object) -> list[Turn]:
    """The messages as turns: perhaps one of the system, then user and assistant in turn, and the user last.

    Raises `UsageError`, which names a message by its number and repeats nothing of it.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence):
        raise UsageError('messages must be a list, such as [{"role": "user", "content": "hello"}]')
    if not messages:
        raise UsageError("messages is empty", hint="give at least one message of the user")
    turns = [_turn(f"message {number}", each) for number, each in enumerate(messages, 1)]
    for number, turn in enumerate(turns, 1):
        before = turns[number - 2].role if number > 1 else None
        if turn.role == "system" and before is not None:
            raise UsageError(f"message {number} is of the system, which speaks first or not at all")
        if turn.role == before:
            raise UsageError(f"messages {number - 1} and {number} are both of the {turn.role}", hint="join them into one")
        if turn.role == "assistant" and before in (None, "system"):
            raise UsageError(f"message {number} is of the assistant, before anything of the user")
    if turns[-1].role != "user":
        raise UsageError(f"the last message is of the {turns[-1].role}, not of the user, so there is nothing to answer")
    return turns


def check_answer(text: object) -> None:
    """Raise `UsageError` unless `text` can be an answer; an empty one can."""
    if not isinstance(text, str):
        raise UsageError("the answer is not a text")
    if normalised(text):
        check_text("the answer", text, MAX_ANSWER_CHARS)


def _turn(name: str, message: object) -> Turn:
    if not isinstance(message, Mapping) or message.keys() != {"role", "content"}:
        raise UsageError(f"{name} is not a mapping of role and content, and nothing else")
    role, content = message["role"], message["content"]
    if role not in _ROLES:
        raise UsageError(f"{name} has a role that does not exist", hint=f"there are {', '.join(_ROLES)}")
    if not isinstance(content, str):
        raise UsageError(f"the content of {name} is not a text")
    if role != "assistant" or normalised(content):  # a model may have answered with nothing
        check_text(f"the content of {name}", content, MAX_TEXT_CHARS)
    if "\0" in content:
        raise UsageError(f"the content of {name} holds a NUL character")
    return Turn(cast(Role, role), content)
