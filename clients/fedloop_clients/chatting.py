"""Chatting: answers in the model's own words, whole or in pieces as they are written, each kept so that feedback can name it."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from queue import SimpleQueue
from types import TracebackType
from typing import Final, Self

from fedloop_events import ids
from fedloop_events.errors import UsageError
from fedloop_tasks.chats import Answer, Chats
from fedloop_tasks.turns import Turn
from fedloop_tasks.words import normalised
from msgspec import Struct
from msgspec.structs import replace

from fedloop_clients.conversations import Sampling
from fedloop_clients.interactions import Interactions
from fedloop_clients.releases import KeptRelease
from fedloop_clients.remembering import Memory
from fedloop_clients.stopping import stopped
from fedloop_clients.store_file import NotWritableError
from fedloop_clients.usage import Timed, Usage

THREAD: Final = "fedloop-chat"
"""The name of a thread that writes an answer."""
Lend = Callable[[], AbstractContextManager[tuple[Chats, KeptRelease]]]
"""The device's model, as long as the block lasts, and the release that it holds. What it raises, chatting raises."""
_NOTHING: Final = Answer("", 0, 0.0, finished=False, cut=0)


class ConversationTooLongError(UsageError):
    """The conversation leaves the model no room for an answer."""


class ChatResponse(Struct, frozen=True):
    """An answer in the model's own words; `response_id` is the handle for feedback.

    `confidence` is how probable its tokens were on average, from 0 to 1. It is `finished` if the model ended it, not the bound on
    its tokens or the reader. One that is `remembered` was not written by the model: a user of this device has corrected an answer
    to the same messages so. On a disk that is full it cannot be kept: then its id is "", no feedback can name it, and `note` says
    why.
    """

    response_id: str
    release: str
    text: str
    confidence: float
    finished: bool
    prompt_tokens: int
    tokens: int
    note: str = ""
    remembered: bool = False

    @property
    def answer(self) -> str:
        """What was answered, whatever the task is."""
        return self.text


class Begun(Struct, frozen=True):
    """An answer that is about to be written; `remembered` is the feedback that it is taken from, if it is."""

    response_id: str
    release: str
    prompt_tokens: int
    remembered: str | None = None


Keep = Callable[[Begun, Answer], ChatResponse]
Found = Answer | BaseException | None
"""What has been written so far, why no more will be, or the end."""


class ChatStream:
    """The pieces of an answer, each a str, as they are written; its id and its release are known from the start.

    Once it is exhausted the answer is kept, and `response` is the whole. A reader who stops early closes it (`close()`, or by
    leaving it as a context manager): what was read until then is kept as the answer, not finished; nothing, if nothing was read.
    A stream that is dropped without that keeps nothing, and so does one in which the model fails: the error is raised where it
    happened. The answer is written in a thread of its own: however slowly it is read, the model is free for others as soon as it
    is written. For one reader; `close` may be called from any thread.
    """

    def __init__(self, begun: Begun, found: SimpleQueue[Found], stop: threading.Event, keep: Keep) -> None:
        self.response_id, self.release = begun.response_id, begun.release
        self.response: ChatResponse | None = None
        """The answer, once the stream has ended."""
        self._begun, self._found, self._stop, self._keep = begun, found, stop, keep
        self._read, self._over = _NOTHING, threading.Event()
        self._ending = threading.Lock()
        weakref.finalize(self, stop.set)

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> str:
        while not self._over.is_set():
            found = self._found.get()
            with self._ending:
                if self._over.is_set():
                    break
                if isinstance(found, Answer):
                    before, self._read = self._read.text, found
                    if len(found.text) > len(before):
                        return found.text[len(before) :]
                    continue
                self._over.set()
                if found is not None:
                    raise found
                self.response = self._keep(self._begun, self._read)
        raise StopIteration

    def close(self) -> None:
        """Read no more of it. Closing what has ended changes nothing."""
        self._stop.set()
        with self._ending:
            if not self._over.is_set():
                self._over.set()
                if self._read.text:
                    self.response = self._keep(self._begun, self._read._replace(finished=False))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()


class Chatting:
    """The answers of one device. They are written one at a time: a second model would need as much memory again. Without a
    `memory` all of them are the model's."""

    def __init__(self, interactions: Interactions, lend: Lend, memory: Memory | None, usage: Usage) -> None:
        self._interactions, self._lend, self._memory, self._usage = interactions, lend, memory, usage
        self._turn, self._closed = threading.Lock(), threading.Event()

    def whole(self, turns: Sequence[Turn], how: Sampling) -> ChatResponse:
        """See `Agent.chat`."""
        timed = Timed()
        with self._turn, self._lend() as (model, release):
            begun, pieces = self._begin(model, release, turns, how)
            *_, answer = pieces
        return self._keep(turns, begun, answer, timed)

    def stream(self, turns: Sequence[Turn], how: Sampling) -> ChatStream:
        """See `Agent.chat`."""
        begun: SimpleQueue[Begun | BaseException] = SimpleQueue()
        found: SimpleQueue[Found] = SimpleQueue()
        stop, timed = threading.Event(), Timed()
        threading.Thread(target=self._write, args=(turns, how, begun, found, stop, timed), name=THREAD).start()
        try:
            first = begun.get()
        except BaseException:
            stop.set()
            raise
        if isinstance(first, BaseException):
            raise first
        return ChatStream(first, found, stop, lambda begun, answer: self._keep(turns, begun, answer, timed))

    def close(self) -> None:
        """Write no more."""
        self._closed.set()

    def _write(
        self,
        turns: Sequence[Turn],
        how: Sampling,
        first: SimpleQueue[Begun | BaseException],
        found: SimpleQueue[Found],
        stop: threading.Event,
        timed: Timed,
    ) -> None:
        try:
            with self._turn, self._lend() as (model, release):
                begun, pieces = self._begin(model, release, turns, how)
                first.put(begun)
                for answer in pieces:
                    if stop.is_set() or self._closed.is_set():
                        raise UsageError("the answer was not written to its end, because its reader or the agent was closed")
                    found.put(answer)
            timed.written()
            found.put(None)
        except BaseException as error:  # whatever it is, the reader waits for it
            first.put(error)
            found.put(error)

    def _begin(self, model: Chats, release: KeptRelease, turns: Sequence[Turn], how: Sampling) -> tuple[Begun, Iterator[Answer]]:
        """What is about to be written, and the writing of it. Raises `UsageError` where there is room for no token.

        Nothing is remembered where an answer is drawn: it is asked for to have another one.
        """
        begun, most = _room(model, release, turns, how)
        found = self._memory.correction(turns) if self._memory and how.temperature == 0 else None
        if found is None or not _fits(model, found.answer, how.max_tokens) or _writes(model, turns, found.answer, most):
            return begun, stopped(model.writing(turns, most=most, temperature=how.temperature, seed=how.seed), how.stop)
        answer = Answer(found.answer, 0, 1.0, finished=True, cut=0)
        return replace(begun, remembered=found.feedback_id), stopped(iter([answer]), how.stop)

    def _keep(self, turns: Sequence[Turn], begun: Begun, answer: Answer, timed: Timed) -> ChatResponse:
        response_id, note = begun.response_id, ""
        try:
            with self._usage.answered(begun.release, timed.seconds):
                self._interactions.answer(turns, answer.text, begun.release, response_id, begun.remembered)
        except NotWritableError as error:
            response_id, note = "", f"{error.message}, so no feedback can name this response"
        return ChatResponse(
            response_id=response_id,
            release=begun.release,
            text=answer.text,
            confidence=answer.confidence,
            finished=answer.finished,
            prompt_tokens=begun.prompt_tokens,
            tokens=answer.tokens,
            note=note,
            remembered=begun.remembered is not None,
        )


def _fits(model: Chats, answer: str, most: int | None) -> bool:
    """Whether an answer has at most that many tokens."""
    if most is None:
        return True
    with_it, without = (model.prompt_tokens([Turn("user", text)]) for text in (answer, ""))
    return with_it - without <= most


def _writes(model: Chats, turns: Sequence[Turn], answer: str, most: int) -> bool:
    """Whether the model's most probable answer is this one; it writes no more than it takes to see that it is not."""
    wanted, written = normalised(answer), ""
    for each in model.writing(turns, most=most, temperature=0.0, seed=0):
        written = normalised(each.text)
        if not wanted.startswith(written):
            return False
    return written == wanted


def _room(model: Chats, release: KeptRelease, turns: Sequence[Turn], how: Sampling) -> tuple[Begun, int]:
    """What is about to be written, and in how many tokens at most. Raises `UsageError` where there is room for none."""
    count = model.prompt_tokens(turns)
    room = model.context - count
    if room < 1:
        raise ConversationTooLongError(
            f"the conversation has {count:,} tokens, and the model takes at most {model.context - 1:,} before its answer",
            hint="leave out the oldest messages, or shorten them",
        )
    most = min(model.longest_answer if how.max_tokens is None else how.max_tokens, room)
    return Begun(ids.new_id(), release.release, count), most
