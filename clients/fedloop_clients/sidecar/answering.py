"""Answers of the device's own model: one at a time, in the order in which they were asked for."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, Protocol

from msgspec import Struct

from fedloop_clients.agent import Agent
from fedloop_clients.sidecar.asked import Asked
from fedloop_clients.sidecar.errors import ApiError

MOST_WAITING: Final = 64
"""Answers that may be under way or waited for at once."""
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


Part = Begun | str | Answered
Parts = AsyncGenerator[Part, None]
"""That an answer begins, the pieces of its text as they are written, and how it ended. Closed before, it stops the writing."""


class Answering(Protocol):
    """Whoever writes the answers; each is kept in the device's store before its end is given."""

    def answer(self, asked: Asked) -> Parts:
        """Raises `ApiError` and `FedloopError`, before the first piece or after any."""

    def close(self) -> None:
        """Let go of what answering needs."""


class OwnModel:
    """The agent's release in force."""

    def __init__(self, agent: Agent, *, most_waiting: int = MOST_WAITING) -> None:
        self._agent, self._most_waiting, self._waiting = agent, most_waiting, 0
        self._worker = ThreadPoolExecutor(1, "fedloop-answers")

    async def answer(self, asked: Asked) -> Parts:
        if self._waiting >= self._most_waiting:
            raise ApiError("too_many_waiting", f"{self._waiting} answers are waited for already", retry_after_s=BUSY_S)
        loop, gone = asyncio.get_running_loop(), threading.Event()
        parts: asyncio.Queue[Part | Exception] = asyncio.Queue()

        def put(part: Part | Exception) -> None:
            loop.call_soon_threadsafe(parts.put_nowait, part)

        def work() -> None:
            try:
                if not gone.is_set():
                    for part in self._written(asked, gone):
                        put(part)
            except Exception as error:
                put(error)
            finally:
                loop.call_soon_threadsafe(self._ended)

        self._waiting += 1
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

    def close(self) -> None:
        self._worker.shutdown(wait=True, cancel_futures=True)

    def _ended(self) -> None:
        self._waiting -= 1

    def _written(self, asked: Asked, gone: threading.Event) -> Iterator[Part]:
        response = self._agent.predict(asked.messages[-1]["content"])
        yield Begun(response.response_id)
        yield response.answer
        yield Answered(response.release, confidence=response.confidence, note=response.note)
