"""Signed requests to one gateway, tried again until a deadline, and its answers as this project's errors."""

from __future__ import annotations

import email.utils
import hashlib
import ipaddress
import logging
import os
import ssl
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import parse_qsl, urlencode, urlsplit

import httpx
import msgspec
from msgspec import Meta, Struct

from fedloop_events.errors import (
    BlobError,
    FedloopError,
    InvalidEventError,
    LogError,
    NotAllowedError,
    UnreachableError,
    UsageError,
)
from fedloop_events.logs.http import signing
from fedloop_events.signatures import SigningKey

CONNECT_TIMEOUT_S: Final = 10.0
_FIRST_PAUSE_S: Final = 0.05
_LONGEST_PAUSE_S: Final = 2.0
_AGAIN: Final = frozenset({408, 425, 429, 500, 502, 503, 504})
_AGAIN_CODES: Final = frozenset({"clock", "replayed"})
_MAX_ANSWER_BYTES: Final = 64 << 20

RequestBody = bytes | Callable[[], Iterator[bytes]]

# It says the address of every request.
logging.getLogger("httpx").setLevel(logging.WARNING)


class Answer(Struct, frozen=True):
    """What a gateway answered; `blocks` is the body where it is still to be read, and `content` nothing then."""

    status: int
    headers: httpx.Headers
    content: bytes
    blocks: Iterator[bytes]


class _Problem(Struct, frozen=True):
    """RFC 9457, as far as it is read."""

    type: Annotated[str, Meta(max_length=200)] = ""
    detail: Annotated[str, Meta(max_length=500)] = ""


class _Handle:
    """One process's connections, closed with it. A forked child must not touch its parent's, not even to close them."""

    def __init__(self, client: httpx.Client) -> None:
        self.pid, self.client = os.getpid(), client
        weakref.finalize(self, _close, client, self.pid)


_inherited: list[_Handle] = []


def _close(client: httpx.Client, pid: int) -> None:
    if pid == os.getpid():
        client.close()


class Transport:
    """Requests to the gateway at `url`: `https://HOST[:PORT][?ca=FILE]`, or `http://` to this machine alone.

    Safe to share between threads; a forked child connects anew. The gateway's certificate is always verified, against the
    system's authorities or those in FILE; proxies and credentials of the environment are not used.
    """

    def __init__(self, url: str, *, identity: tuple[str, SigningKey] | None = None, timeout_s: float = 30.0) -> None:
        self.base, self._ca = _split(url)
        self.timeout_s = timeout_s
        self._identity = identity
        self._verify = _tls(self._ca) if self.base.startswith("https") else False
        self._skew_s = 0.0
        self._closed = False
        self._handle = _Handle(self._connect())

    @property
    def identified(self) -> bool:
        return self._identity is not None

    def identify(self, client_id: str, key: SigningKey) -> None:
        """From here on, ask as `client_id`, and sign with `key`."""
        self._identity = (client_id, key)

    def call(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        content: RequestBody = b"",
        *,
        sha256: bytes | None = None,
        headers: dict[str, str] | None = None,
        wait_s: float = 0.0,
        doing: tuple[str, str] = ("clients", "read"),
    ) -> Answer:
        """The answer to one request, read wholly. `content` that is a function gives its blocks anew for each attempt, and
        `sha256` names them.

        Raises `UnreachableError` when the gateway did not answer within `timeout_s` (and `wait_s` longer, where it is to wait),
        and what its refusal means. `doing` is topic and operation, for `NotAllowedError`.
        """
        with self.opened(method, path, query, content, sha256=sha256, headers=headers, wait_s=wait_s, doing=doing) as response:
            return response

    @contextmanager
    def opened(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None = None,
        content: RequestBody = b"",
        *,
        sha256: bytes | None = None,
        headers: dict[str, str] | None = None,
        wait_s: float = 0.0,
        doing: tuple[str, str] = ("clients", "read"),
        stream: bool = False,
    ) -> Iterator[Answer]:
        """`call`, with the answer's body still to be read if `stream`."""
        deadline, pause_s = time.monotonic() + self.timeout_s + wait_s, _FIRST_PAUSE_S
        while True:
            with self._attempt(method, path, query, content, sha256, headers, wait_s, stream=stream) as answer:
                if isinstance(answer, Answer):
                    if answer.status < 400:
                        yield answer
                        return
                    code, failure = _refusal(answer, doing)
                    if answer.status not in _AGAIN and code not in _AGAIN_CODES:
                        raise failure
                    least_s = self._learn(answer, code)
                else:
                    failure, least_s = answer, 0.0
            rest_s = max(pause_s, least_s)
            if time.monotonic() + rest_s > deadline:
                raise failure
            time.sleep(rest_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)

    def close(self) -> None:
        self._closed = True
        _close(self._handle.client, self._handle.pid)

    @contextmanager
    def _attempt(
        self,
        method: str,
        path: str,
        query: dict[str, str] | None,
        content: RequestBody,
        sha256: bytes | None,
        headers: dict[str, str] | None,
        wait_s: float,
        *,
        stream: bool,
    ) -> Iterator[Answer | UnreachableError]:
        """One attempt: the answer, or why there is none."""
        client = self._client()
        body = content if isinstance(content, bytes) else content()
        request = client.build_request(
            method,
            self.base + path + (f"?{urlencode(query)}" if query else ""),
            content=body if body else None,
            headers=headers,
            timeout=httpx.Timeout(self.timeout_s, connect=CONNECT_TIMEOUT_S, read=self.timeout_s + wait_s),
        )
        if self._identity is not None:
            digest = hashlib.sha256(content).digest() if isinstance(content, bytes) else sha256
            request.headers.update(self._signature(request, digest or signing.EMPTY_DIGEST))
        try:
            response = client.send(request, stream=True)
        except RuntimeError:
            if self._closed:  # by another thread, meanwhile
                raise LogError(f"the connection to the gateway {self.base} is closed") from None
            raise
        except httpx.TransportError as error:
            yield self._unreachable(error)
            return
        try:
            blocks = response.iter_raw()
            try:
                content = b"" if stream and response.status_code < 400 else _read(response, blocks)
            except httpx.TransportError as error:
                yield self._unreachable(error)
                return
            yield Answer(response.status_code, response.headers, content, blocks)
        finally:
            response.close()

    def _signature(self, request: httpx.Request, digest: bytes) -> dict[str, str]:
        assert self._identity is not None
        client_id, key = self._identity
        path, _, query = request.url.raw_path.decode("ascii").partition("?")
        return signing.sign(
            request.method,
            request.headers["host"],
            path,
            query,
            content_sha256=digest,
            client_id=client_id,
            key=key,
            now_s=int(time.time() + self._skew_s),
        )

    def _learn(self, answer: Answer, code: str) -> float:
        """How long the gateway wants to be left alone. A clock that is wrong is set right, for what is signed here."""
        if code == "clock":
            with_date = email.utils.parsedate_to_datetime(answer.headers.get("date", "Thu, 01 Jan 1970 00:00:00 GMT"))
            self._skew_s = with_date.timestamp() - time.time()
        after = answer.headers.get("retry-after", "")
        return float(after) if after.isascii() and after.isdigit() and len(after) < 7 else 0.0

    def _unreachable(self, error: httpx.TransportError) -> UnreachableError:
        """Raises it at once where trying again is of no use: this is not the gateway that its address names."""
        failure = UnreachableError(f"the gateway {self.base} does not answer", cause=_reason(error))
        if isinstance(error.__cause__, ssl.SSLCertVerificationError) or "CERTIFICATE_VERIFY_FAILED" in str(error):
            raise UnreachableError(
                f"the gateway {self.base} has no certificate that can be trusted",
                cause=_reason(error),
                hint="name the authority that issued it: https://HOST?ca=FILE",
            ) from None
        return failure

    def _client(self) -> httpx.Client:
        if self._closed:
            raise LogError(f"the connection to the gateway {self.base} is closed")
        if self._handle.pid != os.getpid():
            _inherited.append(self._handle)
            self._handle = _Handle(self._connect())
        return self._handle.client

    def _connect(self) -> httpx.Client:
        return httpx.Client(
            verify=self._verify,
            trust_env=False,
            headers={"accept-encoding": "identity"},
            follow_redirects=False,
            limits=httpx.Limits(max_connections=64, max_keepalive_connections=16, keepalive_expiry=20.0),
        )


def _read(response: httpx.Response, blocks: Iterator[bytes]) -> bytes:
    """The body as it was sent; nothing in it is unpacked."""
    if "content-encoding" in response.headers:
        raise httpx.RemoteProtocolError("the answer is packed, which nobody asked for")
    parts, size = [], 0
    for block in blocks:
        size += len(block)
        if size > _MAX_ANSWER_BYTES:
            raise httpx.RemoteProtocolError("the answer is too long")
        parts.append(block)
    return b"".join(parts)


def _split(url: str) -> tuple[str, Path | None]:
    """The gateway's address, and the file of the authorities to trust."""
    parts = urlsplit(url)
    query = dict(parse_qsl(parts.query))
    try:
        port = parts.port
    except ValueError:
        port = 0
    if parts.scheme not in {"https", "http"} or not parts.hostname or parts.username is not None or port == 0:
        raise UsageError("a gateway's location is malformed", hint="its form is https://HOST[:PORT][?ca=FILE]")
    if parts.path.strip("/") or parts.fragment or set(query) - {"ca"}:
        raise UsageError("a gateway's location has a part that it cannot have", hint="its form is https://HOST[:PORT][?ca=FILE]")
    if parts.scheme == "http" and not _is_loopback(parts.hostname):
        raise UsageError(
            "http:// is for this machine alone, for everybody on the way could read and change it", hint="use https://"
        )
    return f"{parts.scheme}://{parts.netloc}", Path(query["ca"]) if "ca" in query else None


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _tls(ca: Path | None) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=None if ca is None else str(ca))
    except (OSError, ssl.SSLError) as error:
        raise UsageError(f"the authorities in {ca} cannot be read", cause=str(error), hint="it must be a PEM file") from None


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _refusal(answer: Answer, doing: tuple[str, str]) -> tuple[str, FedloopError]:
    """The problem's code, and the error that it is."""
    try:
        problem = msgspec.json.decode(answer.content, type=_Problem)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        problem = _Problem()
    code = problem.type.rpartition(":")[2]
    detail = "".join(each for each in problem.detail if each.isprintable()) or f"HTTP status {answer.status}"
    error: FedloopError
    match answer.status:
        case 401 | 403:
            error = NotAllowedError(*doing, cause=detail)
        case 404:
            error = BlobError("the gateway has no such blob for this client", hint="it may still be on its way: try again")
        case 422:
            error = InvalidEventError(f"the gateway refuses an event: {detail}")
        case status if status in _AGAIN:
            error = UnreachableError("the gateway cannot do this now", cause=detail)
        case _:
            error = UsageError(f"the gateway refuses the request: {detail}")
    return code, error
