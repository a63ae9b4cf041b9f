"""A server that speaks as much HTTP as a test lets it: one script for each request, which may lie, hang or go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

HEAD = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
DONE = b"data: [DONE]\n\n"
Script = Callable[[asyncio.StreamWriter], Awaitable[None]]


def chunk(text: str = "", reason: str | None = None, **more: Any) -> bytes:
    choice = {"index": 0, "delta": {"content": text} if text else {}, "finish_reason": reason}
    return b"data: " + json.dumps({"id": "theirs", "choices": [choice], **more}).encode() + b"\n\n"


USAGE = b'data: {"choices": [], "usage": {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}}\n\n'
ANSWER = HEAD + b": a comment\n\n" + chunk("Hello ") + chunk("there") + chunk(reason="stop") + USAGE + DONE


def document(status: str, body: object) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n".encode() + data


class FakeUpstream:
    """Listens at `url`; answers with the bytes of `answer`, or as the script does that it is."""

    def __init__(self) -> None:
        self.answer: bytes | Script = ANSWER
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.gone = threading.Event()
        """Set when a client has gone before its answer was whole."""
        self._loop = asyncio.new_event_loop()
        self._server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}/v1"
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
                await self._answer(reader, writer)
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        first, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")[:-2]
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines)}
        body = await reader.readexactly(int(headers.get("content-length", "0")))
        self.requests.append((first, headers, json.loads(body) if body else None))
        if isinstance(self.answer, bytes):
            writer.write(self.answer)
            await writer.drain()
            return
        answering = asyncio.ensure_future(self.answer(writer))
        watching = asyncio.ensure_future(reader.read(1))
        try:
            done, _ = await asyncio.wait((answering, watching), return_when=asyncio.FIRST_COMPLETED)
            if answering not in done:
                self.gone.set()
        finally:
            answering.cancel()
            watching.cancel()
            await asyncio.gather(answering, watching, return_exceptions=True)

    def close_listener(self) -> None:
        """Take no connection any more."""
        self._loop.call_soon_threadsafe(self._server.close)

    def close(self) -> None:
        async def end() -> None:
            self._server.close()
            under_way = asyncio.all_tasks() - {asyncio.current_task()}
            for task in under_way:
                task.cancel()
            await asyncio.gather(*under_way, return_exceptions=True)
            await asyncio.sleep(0)

        asyncio.run_coroutine_threadsafe(end(), self._loop).result(30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(30)
        self._loop.close()


@contextlib.contextmanager
def fake_upstream() -> Iterator[FakeUpstream]:
    made = FakeUpstream()
    try:
        yield made
    finally:
        made.close()
