"""What a client asks for: requests in OpenAI's form, of which the device's model does a part. Unknown fields are ignored."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import Meta, Struct

from fedloop_clients.sidecar.errors import ApiError

T = TypeVar("T")
_Count = Annotated[int, Meta(ge=1)]
ROLES: Final = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}
MOST_STOPS: Final = 4
MOST_INPUTS: Final = 256


class Asked(Struct, frozen=True, kw_only=True):
    """One answer that is wanted."""

    kind: Literal["chat", "text"]
    created_s: int
    model: str | None
    messages: Sequence[dict[str, str]]
    """Of which the last one is the user's."""
    stream: bool
    include_usage: bool
    max_tokens: int | None
    temperature: float
    seed: int | None
    stop: tuple[str, ...]
    body: dict[str, Any]
    """All that the client has sent."""

    @property
    def path(self) -> str:
        """Where it was asked for, below `/v1`."""
        return "chat/completions" if self.kind == "chat" else "completions"


class _Part(Struct):
    type: str
    text: str | None = None


class _Message(Struct):
    role: str
    content: str | list[_Part] | None = None


class _StreamOptions(Struct):
    include_usage: bool | None = None


class _Sampled(Struct, kw_only=True):
    """What chat and text completions have in common."""

    model: str | None = None
    n: _Count | None = None
    stream: bool | None = None
    stream_options: _StreamOptions | None = None
    max_tokens: _Count | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None


class _Chat(_Sampled, kw_only=True):
    messages: list[_Message]
    max_completion_tokens: _Count | None = None
    tools: list[Any] | None = None
    functions: list[Any] | None = None
    logprobs: bool | None = None
    response_format: dict[str, Any] | None = None


class _Text(_Sampled, kw_only=True):
    prompt: Any
    best_of: int | None = None
    suffix: str | None = None
    echo: bool | None = None
    logprobs: int | None = None


class Embedded(Struct, kw_only=True):
    """Texts whose embeddings are wanted."""

    input: Any
    model: str | None = None
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None

    @property
    def texts(self) -> list[str]:
        """Raises `ApiError`."""
        _refuse("dimensions", self.dimensions, "embeddings have the model's own number of them")
        texts = [self.input] if isinstance(self.input, str) else self.input
        if not isinstance(texts, list) or not 1 <= len(texts) <= MOST_INPUTS or any(not isinstance(each, str) for each in texts):
            raise ApiError("invalid_request", f"input must be a text, or a list of 1 to {MOST_INPUTS} texts", param="input")
        return texts


class Judged(Struct, kw_only=True, forbid_unknown_fields=True):
    """Feedback about a response: here a field with a wrong name is refused, for nothing else would tell that it was lost."""

    response_id: str | None = None
    id: str | None = None
    """The same by the name that a completion has for it."""
    thumb: Literal["up", "down"] | None = None
    rating: int | None = None
    label: str | None = None
    correction: str | None = None
    comment: str | None = None
    preferred_over: str | None = None
    signal: str | None = None
    feedback_id: str | None = None


class LinkWanted(Struct, kw_only=True, forbid_unknown_fields=True):
    """A response for which a feedback link is wanted, and for how long."""

    id: str
    ttl_s: float | None = None


def decode(body: bytes, type_: type[T]) -> T:
    """Raises `ApiError` that names the field which is wrong."""
    try:
        return msgspec.json.decode(body, type=type_)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        name = where.removesuffix("`").removeprefix(".")
        raise ApiError("invalid_request", f"{name or 'the body'}: {what[:1].lower()}{what[1:]}", param=name or None) from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise ApiError("invalid_request", "the body is not JSON") from None


def chat(body: bytes) -> Asked:
    """What `POST /v1/chat/completions` asks for. Raises `ApiError`."""
    given = decode(body, _Chat)
    _refuse("tools", given.tools or given.functions, "this model calls no tools")
    _refuse("logprobs", given.logprobs, "this server gives no log-probabilities")
    _refuse("response_format", (given.response_format or {}).get("type", "text") != "text", "this model writes plain text alone")
    if not given.messages:
        raise ApiError("invalid_request", "messages is empty", param="messages")
    messages = [{"role": _role(i, each), "content": _content(i, each)} for i, each in enumerate(given.messages)]
    if messages[-1]["role"] != "user":
        raise ApiError("invalid_request", "the last message must be the user's", param="messages")
    most = given.max_tokens if given.max_completion_tokens is None else given.max_completion_tokens
    return _asked("chat", given, messages, most, body)


def text(body: bytes) -> Asked:
    """What `POST /v1/completions` asks for: its prompt is a user's only message. Raises `ApiError`."""
    given = decode(body, _Text)
    _refuse("best_of", given.best_of not in (None, 1), "one answer is made at a time")
    _refuse("suffix", given.suffix, "this model does not write up to a suffix")
    _refuse("echo", given.echo, "the prompt is not repeated")
    _refuse("logprobs", given.logprobs, "this server gives no log-probabilities")
    prompt = given.prompt[0] if isinstance(given.prompt, list) and len(given.prompt) == 1 else given.prompt
    if not isinstance(prompt, str):
        raise ApiError("unsupported", "prompt must be one text: this server takes neither several nor tokens", param="prompt")
    return _asked("text", given, [{"role": "user", "content": prompt}], given.max_tokens, body)


def _asked(
    kind: Literal["chat", "text"],
    given: _Sampled,
    messages: Sequence[dict[str, str]],
    max_tokens: int | None,
    body: bytes,
) -> Asked:
    _refuse("n", given.n not in (None, 1), "n must be 1: one answer is made at a time")
    stop = (given.stop,) if isinstance(given.stop, str) else tuple(given.stop or ())
    if len(stop) > MOST_STOPS or "" in stop:
        raise ApiError("invalid_request", f"stop is up to {MOST_STOPS} texts, none of them empty", param="stop")
    return Asked(
        kind=kind,
        created_s=int(time.time()),
        model=given.model,
        messages=messages,
        stream=bool(given.stream),
        include_usage=bool(given.stream_options and given.stream_options.include_usage),
        max_tokens=max_tokens,
        temperature=given.temperature or 0.0,
        seed=given.seed,
        stop=stop,
        body=msgspec.json.decode(body),
    )


def _refuse(param: str, is_asked: object, why: str) -> None:
    if is_asked:
        raise ApiError("unsupported", why if why.startswith(param) else f"{param}: {why}", param=param)


def _role(number: int, message: _Message) -> str:
    if message.role not in ROLES:
        raise ApiError(
            "invalid_request",
            f"messages[{number}].role must be one of {', '.join(sorted(ROLES))}",
            param=f"messages[{number}].role",
        )
    return ROLES[message.role]


def _content(number: int, message: _Message) -> str:
    parts = message.content
    if isinstance(parts, str):
        return parts
    if not parts or any(each.type != "text" or each.text is None for each in parts):
        raise ApiError("unsupported", f"messages[{number}].content must be text: this model sees nothing else", param="messages")
    return "".join(each.text or "" for each in parts)
