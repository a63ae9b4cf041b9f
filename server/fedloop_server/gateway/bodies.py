"""Reading what a request brings: no more than allowed, not for longer than allowed, and exactly what its digest says."""

from __future__ import annotations

import asyncio
import hashlib
import re
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Final

from starlette.requests import Request

from fedloop_server.gateway.limits import Limits
from fedloop_server.gateway.problems import Problem

_TOKENS: Final = re.compile(rb'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]')


class Bodies:
    """Reads bodies; all that are being read at one time have `bodies_bytes` at most."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = 0

    async def read(self, request: Request, headers: dict[str, str], most: int, content_sha256: bytes) -> bytes:
        """The body, of `most` bytes, whose SHA-256 is as signed. Raises `Problem`."""
        with self._reserved(self.length(headers, most)):
            parts = [part async for part in self.parts(request, most, content_sha256)]
        return parts[0] if len(parts) == 1 else b"".join(parts)

    async def parts(self, request: Request, most: int, content_sha256: bytes) -> AsyncIterator[bytes]:
        """The body as it comes. Raises `Problem`, for a wrong digest at the end: use nothing before this ends."""
        digest, size, more = hashlib.sha256(), 0, True
        loop = asyncio.get_running_loop()
        started = loop.time()
        while more:
            allowed_s = self._limits.body_timeout_s + size / self._limits.slowest_bytes_per_s
            try:
                async with asyncio.timeout_at(started + allowed_s):
                    message = await request.receive()
            except TimeoutError:
                raise Problem("slow", "the body came too slowly") from None
            if message["type"] != "http.request":
                raise Problem("malformed", "the body ended early")
            part, more = message.get("body", b""), message.get("more_body", False)
            size += len(part)
            if size > most:
                raise _too_large(most)
            digest.update(part)
            if part:
                yield part
        if digest.digest() != content_sha256:
            raise Problem("digest", "the body is not the one that the Content-Digest names")

    def length(self, headers: dict[str, str], most: int, *, required: bool = False) -> int:
        """The body's length by its header; `most` if there is none. Raises `Problem`."""
        stated = headers.get("content-length")
        if stated is None and not required:
            return most
        if stated is None or not stated.isascii() or not stated.isdigit() or len(stated) > 15:
            raise Problem("no-length", "the request must state the length of its body")
        if int(stated) > most:
            raise _too_large(most)
        return int(stated)

    @contextmanager
    def _reserved(self, size: int) -> Iterator[None]:
        if self._held and self._held + size > self._limits.bodies_bytes:
            raise Problem("busy", "more is being read than can be held", retry_after_s=1)
        self._held += size
        try:
            yield
        finally:
            self._held -= size


def is_deeper(data: bytes, depth: int) -> bool:
    """Whether the arrays and objects of a JSON text are nested deeper than `depth`."""
    if data.count(b"[") + data.count(b"{") <= depth:
        return False
    level = 0
    for token in _TOKENS.finditer(data):
        first = data[token.start()]
        level += 1 if first in b"[{" else -1 if first in b"]}" else 0
        if level > depth:
            return True
    return False


def _too_large(most: int) -> Problem:
    return Problem("too-large", f"the body is longer than the {most:,} bytes that it may have")
