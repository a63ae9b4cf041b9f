"""Answers of another OpenAI-compatible server (Ollama, llama.cpp, vLLM), recorded here: feedback and learning stay on the device.

What goes wrong there is one error here, and nothing that was recorded before is touched.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import aclosing, asynccontextmanager, suppress
from pathlib import Path
from typing import Any, Final

import httpx
import msgspec
from fedloop_events.errors import FedloopError, UsageError
from msgspec import Struct

from fedloop_clients.agent import Agent
from fedloop_clients.releases import NoReleaseError
from fedloop_clients.sidecar.answering import ALIAS, BUSY_S, MOST_WAITING, Answered, Begun, Part, Parts
from fedloop_clients.sidecar.asked import Asked
from fedloop_clients.sidecar.chunks import Usage, chunks, one_line
from fedloop_clients.sidecar.errors import ApiError
from fedloop_clients.usage import Timed

CONNECT_TIMEOUT_S: Final = 10.0
SILENCE_S: Final = 120.0
"""How long a server may send nothing: it may have to load its model first."""
_MOST_DOCUMENT_BYTES: Final = 32 << 20
_SAME: Final = {400: "invalid_request", 404: "model_not_found", 413: "too_large", 422: "invalid_request", 429: "too_many_waiting"}
"""Refusals that are about what the client asked, and so are passed on as such."""


class _Named(Struct):
    id: str


class _Models(Struct):
    data: list[_Named]


class _Vector(Struct):
    index: int
    embedding: list[float]


class _Vectors(Struct):
    data: list[_Vector]


class Upstream:
    """The server at `base_url` (with its `/v1`), which wants `key`, if it wants one."""

    def __init__(self, agent: Agent, base_url: str, key: str = "", *, silence_s: float = SILENCE_S) -> None:
        with suppress(NoReleaseError):
            if agent.task.words:
                raise UsageError(
                    "this device's model answers with one of a closed set of words, which no other server does for it",
                    hint="serve it without --upstream",
                )
        self._agent, self._base_url, self._silence_s = agent, check_url(base_url).rstrip("/"), silence_s
        self._headers = {"authorization": f"Bearer {key}"} if key else {}
        self._recording = ThreadPoolExecutor(1, "fedloop-recording")
        self._under_way = 0
        self.adapter = ""
        """What the other server calls the device's release; "" as long as it was handed none."""

    async def models(self) -> Sequence[str]:
        return [*([ALIAS] if self.adapter else []), *await self.known()]

    async def known(self) -> list[str]:
        """The names that the other server has for its models. Raises `ApiError`."""
        async with self._asked("GET", "models") as response:
            try:
                return [each.id for each in msgspec.json.decode(await _whole(response), type=_Models).data]
            except (msgspec.MsgspecError, UnicodeDecodeError):
                raise ApiError("upstream_error", "the upstream server did not answer with a list of models") from None

    async def load_adapter(self, name: str, folder: Path) -> None:
        """Have vLLM load the adapter in a folder of its machine. Raises `ApiError`."""
        try:
            async with self._asked("POST", "load_lora_adapter", {"lora_name": name, "lora_path": str(folder)}):
                pass
        except ApiError as error:
            if error.status == 404:
                error.message += (
                    f"; vLLM takes adapters if it was started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True,"
                    f" and must find this one in {folder}"
                )
            raise

    async def unload_adapter(self, name: str) -> None:
        """Have vLLM forget an adapter. Raises `ApiError`."""
        async with self._asked("POST", "unload_lora_adapter", {"lora_name": name}):
            pass

    async def embed(self, model: str | None, texts: Sequence[str]) -> Sequence[Sequence[float]]:
        body = {"model": self._called(model), "input": list(texts), "encoding_format": "float"}
        async with self._asked("POST", "embeddings", body) as response:
            try:
                found = msgspec.json.decode(await _whole(response), type=_Vectors).data
            except (msgspec.MsgspecError, UnicodeDecodeError):
                found = []
        if len(found) != len(texts):
            raise ApiError("upstream_error", "the upstream server did not answer with an embedding of each text")
        return [each.embedding for each in sorted(found, key=lambda each: each.index)]

    def named(self, model: str | None) -> str:
        """Which models there are the other server knows."""
        return model or ""

    async def answer(self, asked: Asked) -> Parts:
        if self._under_way >= MOST_WAITING:
            raise ApiError("too_many_waiting", f"{self._under_way} answers are under way already", retry_after_s=BUSY_S)
        self._under_way += 1
        try:
            async with aclosing(self._answered(asked)) as parts:
                async for part in parts:
                    yield part
        finally:
            self._under_way -= 1

    def _called(self, model: str | None) -> str | None:
        """What the other server calls a model that is asked for."""
        return self.adapter if self.adapter and model == ALIAS else model

    def close(self) -> None:
        self._recording.shutdown(wait=True)

    async def _answered(self, asked: Asked) -> AsyncGenerator[Part, None]:
        begun, text, usage, reason, kept, timed = Begun(_new_id(asked)), "", Usage(), None, False, Timed()
        try:
            async with self._asked("POST", asked.path, self._streamed(asked)) as response:
                read = chunks(_blocks(response))
                chunk = await anext(read, None)
                yield begun
                while chunk is not None:
                    usage, reason = chunk.usage or usage, chunk.finish_reason or reason
                    if chunk.text:
                        text += chunk.text
                        yield chunk.text
                    chunk = await anext(read, None)
            kept, took_s = True, timed.seconds
            release, note = await asyncio.wrap_future(self._recording.submit(self._record, asked, begun, text, took_s))
        finally:
            if text and not kept:  # what was shown of it can be judged
                self._recording.submit(self._record, asked, begun, text, timed.seconds)
        yield Answered(
            release, finished=reason != "length", prompt_tokens=usage.prompt_tokens, tokens=usage.completion_tokens, note=note
        )

    def _streamed(self, asked: Asked) -> dict[str, Any]:
        named = {} if asked.model is None else {"model": self._called(asked.model)}
        return asked.body | named | {"stream": True, "stream_options": {"include_usage": True}}

    def _record(self, asked: Asked, begun: Begun, text: str, took_s: float) -> tuple[str, str]:
        """The release in force, and why the answer could not be kept, if so: it is its reader's nevertheless."""
        try:
            recorded = self._agent.record_answer(asked.messages, text, response_id=begun.response_id, took_s=took_s)
            return recorded.release, ""
        except FedloopError as error:
            return "", f"{error.message}, so no feedback can name this response"

    @asynccontextmanager
    async def _asked(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> AsyncIterator[httpx.Response]:
        """A response with status 200, of which nothing is read yet. Raises `ApiError`, also for what goes wrong in the block."""
        timeout = httpx.Timeout(self._silence_s, connect=CONNECT_TIMEOUT_S)
        try:
            async with (
                httpx.AsyncClient(headers=self._headers, timeout=timeout, trust_env=False) as client,
                client.stream(method, f"{self._base_url}/{path}", json=body) as response,
            ):
                if response.status_code != 200:
                    raise _refusal(response.status_code, await _whole(response))
                yield response
        except httpx.ConnectTimeout:
            raise ApiError(
                "upstream_timeout", f"no connection to {self._base_url} within {CONNECT_TIMEOUT_S:g} seconds"
            ) from None
        except httpx.TimeoutException:
            raise ApiError("upstream_timeout", f"the upstream server sent nothing for {self._silence_s:g} seconds") from None
        except httpx.ConnectError:
            raise ApiError("upstream_error", f"no server answers at {self._base_url}") from None
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise ApiError("upstream_error", f"the upstream server broke off its answer ({type(error).__name__})") from None


def check_url(given: str) -> str:
    """Raises `UsageError` for what is no base URL of a server."""
    try:
        url = httpx.URL(given)
    except httpx.InvalidURL:
        url = httpx.URL("")
    if url.scheme not in ("http", "https") or not url.host or url.query or url.fragment:
        raise UsageError(f"--upstream {given} is no server's base URL", hint="as in http://127.0.0.1:11434/v1")
    return given


def _new_id(asked: Asked) -> str:
    return f"{'chatcmpl' if asked.kind == 'chat' else 'cmpl'}-{secrets.token_hex(16)}"


def _refusal(status: int, body: bytes) -> ApiError:
    try:
        said = msgspec.json.decode(body)["error"]
        message = one_line(str(said.get("message") if isinstance(said, dict) else said))
    except (msgspec.MsgspecError, UnicodeDecodeError, LookupError, TypeError, RecursionError):
        message = "no reason given"
    return ApiError(_SAME.get(status, "upstream_error"), f"the upstream server refused with status {status}: {message}")


async def _whole(response: httpx.Response) -> bytes:
    body = b""
    async for block in response.aiter_bytes():
        body += block
        if len(body) > _MOST_DOCUMENT_BYTES:
            raise ApiError("upstream_error", f"the upstream server answered with more than {_MOST_DOCUMENT_BYTES:,} bytes")
    return body


async def _blocks(response: httpx.Response) -> AsyncIterator[bytes]:
    kind = response.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "text/event-stream":
        raise ApiError("upstream_error", f"the upstream server did not stream its answer, but sent {one_line(kind)}")
    async for block in response.aiter_bytes():
        yield block
