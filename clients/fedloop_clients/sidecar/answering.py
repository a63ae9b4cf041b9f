"""Answers of the device's own model: one at a time, in the order in which they were asked for."""

from __future__ import annotations

import asyncio
import logging
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

from fedloop_events.errors import FedloopError
from msgspec import Struct

from fedloop_clients.agent import Agent
from fedloop_clients.sidecar.asked import Asked
from fedloop_clients.sidecar.errors import ApiError, internal_error

_logger = logging.getLogger(__name__)

MOST_WAITING: Final = 64
"""Answers that may be under way or waited for at once."""
ALIAS: Final = "fedloop"
"""A name of the model that holds for every deployment."""
BUSY_S: Final = 5.0
"""After which who was not let in may ask again."""


class Begun(Struct, frozen=True):
    """An answer that is about to be written. Its id names it in feedback; "" if it cannot be kept."""

    response_id: str


class Answered(Struct, frozen=True):
    """How an answer has ended: what is known of it once its text is whole."""

    release: str
    finished: bool = True
    """Whether the model ended it, not the bound on its tokens."""
    confidence: float | None = None
    prompt_tokens: int = 0
    tokens: int = 0
    note: str = ""
    """Why no feedback can name it; "" if it can."""
    remembered: bool = False
    """Whether it is what a user has corrected an answer to, and not the model's."""


Part = Begun | str | Answered
Parts = AsyncGenerator[Part, None]
"""That an answer begins, the pieces of its text as they are written, and how it ended. Closed before, it stops the writing."""


class Answering(Protocol):
    """Whoever writes the answers; each is kept in the device's store before its end is given."""

    def answer(self, asked: Asked) -> Parts:
        """Raises `ApiError` and `FedloopError`, before the first piece or after any."""

    async def embed(self, model: str | None, texts: Sequence[str]) -> Sequence[Sequence[float]]:
        """The texts as vectors. Raises `ApiError` and `FedloopError`."""

    async def models(self) -> Sequence[str]:
        """The models that can be asked for. Raises `ApiError`."""

    def named(self, model: str | None) -> str:
        """The model that is asked for, as answers name it. Raises `ApiError` if there is none such."""

    def close(self) -> None:
        """Let go of what answering needs."""


class OwnModel:
    """The agent's release in force."""

    def __init__(self, agent: Agent, *, most_waiting: int = MOST_WAITING) -> None:
        self._agent, self._most_waiting, self._waiting = agent, most_waiting, 0
        self._worker = ThreadPoolExecutor(1, "fedloop-answers")

    async def answer(self, asked: Asked) -> Parts:
        self._come_in()
        loop, gone = asyncio.get_running_loop(), threading.Event()
        parts: asyncio.Queue[Part | Exception] = asyncio.Queue()

        def put(part: Part | Exception) -> None:
            loop.call_soon_threadsafe(parts.put_nowait, part)

        def work() -> None:
            try:
                if not gone.is_set():
                    for part in self._written(asked, gone):
                        put(part)
            except (ApiError, FedloopError) as error:
                put(error)
            except Exception as error:
                _logger.exception("an answer could not be written")
                put(internal_error(error))
            finally:
                loop.call_soon_threadsafe(self._ended)

        self._worker.submit(work)
        try:
            while True:
                part = await parts.get()
                if isinstance(part, Exception):
                    raise part
                yield part
                if isinstance(part, Answered):
                    return
        finally:
            gone.set()

    async def embed(self, model: str | None, texts: Sequence[str]) -> Sequence[Sequence[float]]:
        self._come_in()
        try:
            found = await asyncio.wrap_future(self._worker.submit(self._agent.embed, texts))
        finally:
            self._ended()
        vectors: list[list[float]] = found.tolist()
        return vectors

    async def models(self) -> Sequence[str]:
        return [self._agent.settings.model]

    def named(self, model: str | None) -> str:
        own = self._agent.settings.model
        if model not in (None, own, ALIAS):
            raise ApiError("model_not_found", f"this device has the model {own!r} alone, also named {ALIAS!r}", param="model")
        return own

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _come_in(self) -> None:
        if self._waiting >= self._most_waiting:
            raise ApiError("too_many_waiting", f"{self._waiting} answers are waited for already", retry_after_s=BUSY_S)
        self._waiting += 1

    def _ended(self) -> None:
        self._waiting -= 1

    def _written(self, asked: Asked, gone: threading.Event) -> Iterator[Part]:
        if not self._agent.task.words:
            yield from self._chatted(asked, gone)
            return
        response = self._agent.predict(asked.messages[-1]["content"])
        yield Begun(response.response_id)
        yield response.answer
        yield Answered(response.release, confidence=response.confidence, note=response.note, remembered=response.remembered)

    def _chatted(self, asked: Asked, gone: threading.Event) -> Iterator[Part]:
        """Left early, it keeps what was written until then."""
        with self._agent.chat(
            asked.messages,
            stream=True,
            max_tokens=asked.max_tokens,
            temperature=asked.temperature,
            seed=asked.seed,
            stop=asked.stop,
        ) as stream:
            yield Begun(stream.response_id)
            for piece in stream:
                yield piece
                if gone.is_set():
                    return
        whole = stream.response
        assert whole is not None
        yield Answered(
            whole.release,
            finished=whole.finished,
            confidence=whole.confidence,
            prompt_tokens=whole.prompt_tokens,
            tokens=whole.tokens,
            note=whole.note,
            remembered=whole.remembered,
        )
