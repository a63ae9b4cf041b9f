"""Reading what an OpenAI-compatible server streams: server-sent events, each of them bounded and checked."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import msgspec
from msgspec import Struct

from fedloop_clients.sidecar.errors import ApiError

MOST_EVENT_BYTES: Final = 1 << 20


class _Delta(Struct):
    content: str | None = None


class _Choice(Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class Usage(Struct):
    """How many tokens the server says that it has read and written."""

    prompt_tokens: int = 0
    completion_tokens: int = 0


class _Error(Struct):
    message: str = ""


class Chunk(Struct):
    """One event, as far as it is read."""

    choices: list[_Choice] = []
    usage: Usage | None = None
    error: _Error | str | None = None

    @property
    def text(self) -> str:
        choice = self.choices[0] if self.choices else _Choice()
        return (choice.delta.content if choice.delta else choice.text) or ""

    @property
    def finish_reason(self) -> str | None:
        return self.choices[0].finish_reason if self.choices else None


async def chunks(blocks: AsyncIterator[bytes]) -> AsyncIterator[Chunk]:
    """The chunks of a stream that ends with `[DONE]`, or after one that has a finish reason.

    Raises `ApiError` for what is none, for an error that the server reports in the stream, and for one that ends before.
    """
    finished = False
    async for data in _events(blocks):
        if data.strip() == b"[DONE]":
            return
        try:
            chunk = msgspec.json.decode(data, type=Chunk)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            raise ApiError("upstream_error", "the upstream server sent an event that is no chunk of a completion") from None
        if chunk.error is not None:
            message = chunk.error if isinstance(chunk.error, str) else chunk.error.message
            raise ApiError("upstream_error", f"the upstream server failed: {one_line(message)}")
        finished = finished or chunk.finish_reason is not None
        yield chunk
    if not finished:
        raise ApiError("upstream_error", "the upstream server closed the connection before its answer was whole")


def one_line(text: str) -> str:
    """What another program says, as it can stand in one sentence of ours."""
    return " ".join(text.split())[:300] or "no reason given"


async def _events(blocks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The data of each event (HTML standard, 9.2.6); comments and other fields are passed over."""
    rest, data = b"", b""
    async for block in blocks:
        *lines, rest = (rest + block).replace(b"\r\n", b"\n").split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                data += line[5:].removeprefix(b" ") + b"\n"
            elif not line and data:
                yield data
                data = b""
        if len(rest) + len(data) > MOST_EVENT_BYTES:
            raise ApiError("upstream_error", f"the upstream server sent an event of more than {MOST_EVENT_BYTES:,} bytes")
    if data:
        yield data
