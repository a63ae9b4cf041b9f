"""What the sidecar answers: OpenAI's documents, whole or in chunks. What it has no field for is under `fedloop`."""

from __future__ import annotations

import base64
import struct
from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from typing import Any, Final

import msgspec
from fedloop_events.errors import FedloopError
from starlette.responses import StreamingResponse
from starlette.types import Send

from fedloop_clients.sidecar.answering import Answered, Begun, Parts
from fedloop_clients.sidecar.asked import Asked
from fedloop_clients.sidecar.errors import NO_STORE, ApiError, as_api_error

DONE: Final = b"data: [DONE]\n\n"


async def completion(asked: Asked, model: str, parts: Parts) -> dict[str, Any]:
    """The whole answer. Raises what `parts` raises."""
    begun, text = Begun(""), ""
    async with aclosing(parts):
        async for part in parts:
            if isinstance(part, Answered):
                return _whole(asked, model, begun, text, part)
            if isinstance(part, Begun):
                begun = part
            else:
                text += part
    raise AssertionError("an answer ends with how it ended")


async def events(asked: Asked, model: str, begun: Begun, parts: Parts) -> AsyncIterator[bytes]:
    """The answer, which has begun, as server-sent events. An error is the last of them."""
    head = _head(asked, model, begun, chunk=True)
    yield _event(head | _choice(asked, "", role=True))
    async with aclosing(parts):
        try:
            while not isinstance(part := await anext(parts), Answered):
                if isinstance(part, str):
                    yield _event(head | _choice(asked, part))
        except ApiError as error:
            yield _event(error.document)
            return
        except FedloopError as error:
            yield _event(as_api_error(error).document)
            return
        yield _event(head | _choice(asked, None, _reason(part)) | _own(part))
        if asked.include_usage:
            yield _event(head | {"choices": [], "usage": _usage(part)})
        yield DONE


def vectors(model: str, found: Sequence[Sequence[float]], *, packed: bool) -> dict[str, Any]:
    """Embeddings, `packed` as the base64 of little-endian float32."""
    data = [
        {
            "object": "embedding",
            "index": index,
            "embedding": base64.b64encode(struct.pack(f"<{len(each)}f", *each)).decode() if packed else each,
        }
        for index, each in enumerate(found)
    ]
    return {"object": "list", "model": model, "data": data, "usage": {"prompt_tokens": 0, "total_tokens": 0}}


class EventStream(StreamingResponse):
    """Server-sent events; whoever goes away ends what writes them, at once."""

    def __init__(self, source: AsyncIterator[bytes]) -> None:
        super().__init__(source, headers=NO_STORE, media_type="text/event-stream")

    async def stream_response(self, send: Send) -> None:
        async with aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().stream_response(send)


def _head(asked: Asked, model: str, begun: Begun, *, chunk: bool = False) -> dict[str, Any]:
    kind = "text_completion" if asked.kind == "text" else "chat.completion.chunk" if chunk else "chat.completion"
    return {"id": begun.response_id, "object": kind, "created": asked.created_s, "model": model}


def _whole(asked: Asked, model: str, begun: Begun, text: str, ended: Answered) -> dict[str, Any]:
    choice: dict[str, Any] = {"index": 0, "finish_reason": _reason(ended), "logprobs": None}
    choice |= {"message": {"role": "assistant", "content": text}} if asked.kind == "chat" else {"text": text}
    return _head(asked, model, begun) | {"choices": [choice], "usage": _usage(ended)} | _own(ended)


def _choice(asked: Asked, text: str | None, reason: str | None = None, *, role: bool = False) -> dict[str, Any]:
    """The choice of a chunk; with a `reason` the last one."""
    choice: dict[str, Any] = {"index": 0, "finish_reason": reason, "logprobs": None}
    if asked.kind == "chat":
        choice["delta"] = ({"role": "assistant"} if role else {}) | ({} if text is None else {"content": text})
    else:
        choice["text"] = text or ""
    return {"choices": [choice]}


def _event(document: dict[str, Any]) -> bytes:
    return b"data: " + msgspec.json.encode(document) + b"\n\n"


def _reason(ended: Answered) -> str:
    return "stop" if ended.finished else "length"


def _usage(ended: Answered) -> dict[str, int]:
    prompt, written = ended.prompt_tokens, ended.tokens
    return {"prompt_tokens": prompt, "completion_tokens": written, "total_tokens": prompt + written}


def _own(ended: Answered) -> dict[str, Any]:
    own = {
        "release": ended.release,
        "confidence": ended.confidence,
        "note": ended.note or None,
        "remembered": ended.remembered or None,
    }
    return {"system_fingerprint": ended.release, "fedloop": {name: each for name, each in own.items() if each is not None}}
