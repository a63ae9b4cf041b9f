"""Reading what a client sends, with bounds, and noticing that it has gone."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine
from typing import Any, Final, TypeVar

from starlette.requests import ClientDisconnect, Request

from fedloop_clients.sidecar.errors import ApiError

MOST_BODY_BYTES: Final = 1 << 20
BODY_TIMEOUT_S: Final = 30.0
T = TypeVar("T")


async def read(request: Request) -> bytes:
    """The body. Raises `ApiError` for one that is too long, or comes too slowly."""
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_TIMEOUT_S):
            async for part in request.stream():
                body += part
                if len(body) > MOST_BODY_BYTES:
                    raise ApiError("too_large", f"the body is longer than {MOST_BODY_BYTES:,} bytes")
    except TimeoutError:
        raise ApiError("too_slow", f"the body did not come within {BODY_TIMEOUT_S:g} seconds") from None
    return bytes(body)


async def unless_gone(request: Request, work: Coroutine[Any, Any, T]) -> T:
    """What `work` gives, once the body is read. Whoever asked and goes away ends it, with `ClientDisconnect`."""
    doing, gone = asyncio.ensure_future(work), asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait((doing, gone), return_when=asyncio.FIRST_COMPLETED)
        if not doing.done():
            raise ClientDisconnect
        return await doing
    finally:
        doing.cancel()
        gone.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
