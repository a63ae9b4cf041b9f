"""What the gateway refuses, as RFC 9457 says it: a stable code, a status, one sentence. Nothing of a request is echoed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Final

import msgspec
from starlette.requests import Request
from starlette.responses import Response

MEDIA_TYPE: Final = "application/problem+json"
PREFIX: Final = "urn:fedloop:problem:"

CODES: Final[Mapping[str, tuple[int, str]]] = MappingProxyType(
    {
        "malformed": (400, "Malformed request"),
        "digest": (400, "Content does not match its digest"),
        "unsigned": (401, "Not signed, or not as it must be"),
        "signature": (401, "Signature not valid"),
        "clock": (401, "Signature not valid at this time"),
        "replayed": (401, "Request seen before"),
        "unknown-client": (401, "Client not enrolled"),
        "revoked": (403, "Client revoked"),
        "forbidden": (403, "Not allowed"),
        "not-found": (404, "Not found"),
        "method": (405, "Method not allowed"),
        "slow": (408, "Request too slow"),
        "name-taken": (409, "Name or key taken"),
        "sequence": (409, "Does not continue the client's events"),
        "instruction": (409, "No such instruction to this client"),
        "blob-absent": (409, "Blob not in the store"),
        "not-asked": (409, "Nobody asked for this blob"),
        "no-length": (411, "Length required"),
        "too-large": (413, "Content too large"),
        "uri-too-long": (414, "URI too long"),
        "media-type": (415, "Media type not supported"),
        "event": (422, "Event refused"),
        "rate": (429, "Too many requests"),
        "quota": (429, "Upload quota used up"),
        "polls": (429, "Too many waiting requests"),
        "headers": (431, "Header too large"),
        "busy": (503, "Busy"),
        "log-away": (503, "Log not reachable"),
    }
)
"""Every code: its status and title."""


class Problem(Exception):  # noqa: N818 (RFC 9457's word)
    """An answer that refuses. `retry_after_s` says when the same may be asked again."""

    def __init__(self, code: str, detail: str, *, retry_after_s: float | None = None) -> None:
        super().__init__(detail)
        self.code, self.detail, self.retry_after_s = code, detail, retry_after_s
        self.status, self.title = CODES[code]

    def response(self) -> Response:
        headers = {"cache-control": "no-store"}
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["www-authenticate"] = "Signature"
        return Response(body(self.code, self.detail), self.status, headers, MEDIA_TYPE)


def body(code: str, detail: str) -> bytes:
    """The document of a problem."""
    status, title = CODES[code]
    return msgspec.json.encode({"type": PREFIX + code, "title": title, "status": status, "detail": detail})


async def on_problem(request: Request, error: Exception) -> Response:
    """The handler of `Problem`."""
    assert isinstance(error, Problem)
    return error.response()


async def on_missing(request: Request, error: Exception) -> Response:
    return Problem("not-found", "there is nothing at this address").response()


async def on_method(request: Request, error: Exception) -> Response:
    response = Problem("method", "this address does not take this method").response()
    response.headers.update(getattr(error, "headers", None) or {})
    return response
