"""What the sidecar refuses, in OpenAI's shape, so that its clients raise their typed exceptions: one sentence, a stable code."""

from __future__ import annotations

import math
from typing import Final

import msgspec
from fedloop_events.errors import FedloopError, UsageError
from starlette.requests import Request
from starlette.responses import Response

from fedloop_clients.chatting import ConversationTooLongError
from fedloop_clients.feedback import ConflictingFeedbackError, UnknownResponseError
from fedloop_clients.releases import NoReleaseError

JSON: Final = "application/json"
NO_STORE: Final = {"cache-control": "no-store"}
CODES: Final = {
    "invalid_request": 400,
    "unsupported": 400,
    "context_length_exceeded": 400,
    "invalid_api_key": 401,
    "host_not_allowed": 403,
    "not_found": 404,
    "model_not_found": 404,
    "response_not_found": 404,
    "method_not_allowed": 405,
    "too_slow": 408,
    "conflicting_feedback": 409,
    "too_large": 413,
    "too_many_waiting": 429,
    "internal_error": 500,
    "upstream_error": 502,
    "no_model": 503,
    "unavailable": 503,
    "upstream_timeout": 504,
}
"""Every code, and its status."""
_KINDS: Final = {401: "authentication_error", 429: "rate_limit_error"}


class ApiError(Exception):
    """An answer that refuses. `retry_after_s` says when the same may be asked again; `param` names the field that is wrong."""

    def __init__(self, code: str, message: str, *, param: str | None = None, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.code, self.message, self.param, self.retry_after_s = code, message, param, retry_after_s
        self.status = CODES[code]

    @property
    def document(self) -> dict[str, object]:
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        headers = dict(NO_STORE)
        if self.retry_after_s is not None:
            headers["retry-after"] = str(max(1, math.ceil(self.retry_after_s)))
        if self.status == 401:
            headers["www-authenticate"] = "Bearer"
        return Response(msgspec.json.encode(self.document), self.status, headers, JSON)


def as_api_error(error: FedloopError) -> ApiError:
    """An error of the agent's as its clients get it."""
    message = error.message + (f" ({error.cause})" if error.cause else "") + (f"; {error.hint}" if error.hint else "")
    if isinstance(error, NoReleaseError):
        return ApiError("no_model", message, retry_after_s=5)
    if isinstance(error, ConversationTooLongError):
        return ApiError("context_length_exceeded", message, param="messages")
    if isinstance(error, UnknownResponseError):
        return ApiError("response_not_found", message)
    if isinstance(error, ConflictingFeedbackError):
        return ApiError("conflicting_feedback", message)
    return ApiError("invalid_request" if isinstance(error, UsageError) else "unavailable", message)


def internal_error(error: Exception) -> ApiError:
    """What is nobody's fault but the program's; its text may hold what somebody has written, so its kind alone is told."""
    return ApiError("internal_error", f"an internal error ({type(error).__name__}): please report this defect")


async def on_api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return error.response()


async def on_fedloop_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, FedloopError)
    return as_api_error(error).response()


async def on_missing(request: Request, error: Exception) -> Response:
    return ApiError("not_found", "there is nothing at this address").response()


async def on_method(request: Request, error: Exception) -> Response:
    return ApiError("method_not_allowed", "this address does not take that method").response()


async def on_defect(request: Request, error: Exception) -> Response:
    return internal_error(error).response()
