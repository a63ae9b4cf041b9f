"""The gateway's application: signed requests in, events and blobs out."""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from functools import partial
from typing import Final
from urllib.parse import parse_qsl

from fastapi import FastAPI
from fedloop_events import topics
from fedloop_events.blobs.store import BlobStore
from fedloop_events.errors import BlobError, FedloopError
from fedloop_events.logs.http import cloudevents
from fedloop_events.logs.port import EventLog, Position
from fedloop_events.types import BlobRef
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from fedloop_server.gateway import describing, problems
from fedloop_server.gateway.appending import Appending
from fedloop_server.gateway.bodies import Bodies
from fedloop_server.gateway.callers import Caller, Callers
from fedloop_server.gateway.committing import Committer
from fedloop_server.gateway.feed import Feed
from fedloop_server.gateway.limits import Limits, Quota
from fedloop_server.gateway.problems import Problem

_KEEP_ALIVE_S: Final = 15.0
_TURN_S: Final = 0.0005
_BLOCK_BYTES: Final = 1 << 20
_ENROLMENTS: Final = "server"
"""One after the other, whoever they are by: no client has this name."""
_JSON: Final = "application/json"
_NO_STORE: Final = {"cache-control": "no-store"}

_logger = logging.getLogger(__name__)


def create_app(
    log: EventLog, blobs: BlobStore, *, limits: Limits | None = None, clock: Callable[[], float] = time.time
) -> FastAPI:
    """The gateway to a deployment's `log` and `blobs`, which stay the caller's to close.

    Its start reads who is enrolled, and raises `UsageError` for a log without a deployment. One process serves one log; several
    may, each with its own memory of nonces and rates.
    """
    gateway = Gateway(log, blobs, limits or Limits(), clock)
    app = FastAPI(
        title="Fedloop gateway", version="1", docs_url=None, redoc_url=None, lifespan=gateway.lifespan, redirect_slashes=False
    )
    app.state.gateway = gateway
    for path, method, endpoint in (
        ("/v1/events", "POST", gateway.append),
        ("/v1/events", "GET", gateway.events),
        ("/v1/end", "GET", gateway.end),
        ("/v1/blobs/{sha256}", "PUT", gateway.put_blob),
        ("/v1/blobs/{sha256}", "GET", gateway.get_blob),
        ("/v1/blobs/{sha256}", "HEAD", gateway.head_blob),
        ("/v1/deployment", "GET", gateway.deployment),
        ("/healthz", "GET", gateway.health),
    ):
        # Not an API route: what FastAPI would find out of a signature of Python's is described in `describing`.
        route = Route(path, endpoint, methods=[method])
        route.methods = {method}  # Starlette adds HEAD to every GET
        app.router.routes.append(route)
    app.add_exception_handler(Problem, problems.on_problem)
    app.add_exception_handler(404, problems.on_missing)
    app.add_exception_handler(405, problems.on_method)
    app.openapi = partial(describing.document, gateway.limits)  # type: ignore[method-assign]
    return app


class _Asked(Struct, frozen=True):
    """What a request for events asks for."""

    topics: tuple[str, ...]
    after: Position
    limit: int
    wait_s: float


class Gateway:
    """The routes, and what they share."""

    def __init__(self, log: EventLog, blobs: BlobStore, limits: Limits, clock: Callable[[], float]) -> None:
        self.limits = limits
        self.feed = Feed(log, limits)
        self._blobs, self._clock = blobs, clock
        self._callers = Callers(self.feed, limits, clock=clock)
        self._bodies, self._appending = Bodies(limits), Appending(self.feed, limits, clock)
        self._committer = Committer(log, queued_events=limits.queued_events, group_events=limits.group_events)
        self._quota = Quota(limits.upload_bytes, limits.window_s)
        self._polls: defaultdict[str, int] = defaultdict(int)

    @asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        # The loop, the committing and the following thread take turns at the interpreter: at Python's 5 ms a turn, each hand-over
        # would cost as much as many requests.
        sys.setswitchinterval(_TURN_S)
        await asyncio.to_thread(self.feed.prepare)
        self.feed.start(asyncio.get_running_loop())
        try:
            yield
        finally:
            await self._committer.drain()
            await self.feed.stop()

    # --- events ---

    async def append(self, request: Request) -> Response:
        headers = self._callers.headers(request)
        if headers.get("content-type", "").partition(";")[0].strip().lower() != cloudevents.BATCH_TYPE:
            raise Problem("media-type", f"events come as {cloudevents.BATCH_TYPE}")
        claim = self._callers.claim(request, headers)
        if not self._callers.is_known(claim.keyid):
            await self.feed.sync()
        if self._callers.is_known(claim.keyid):
            caller = await self._callers.known(request, claim)
            body = await self._bodies.read(request, headers, self.limits.body_bytes, claim.content_sha256)
            events = self._appending.decode(body)
            check = partial(self._appending.check, events, caller)
            if caller.is_server:
                await self._committer.append(events, check)
            else:
                await self._appending.ready(events, caller, self._blobs)
                await self._committer.append(events, check, learn=partial(self._appending.learn, events), by=caller.name)
        else:
            self._callers.stranger(request)
            body = await self._bodies.read(request, headers, self.limits.enrolment_bytes, claim.content_sha256)
            events = self._appending.decode(body)
            self._callers.verify(claim, self._appending.enrolment(events, claim.keyid))
            check = partial(self._appending.check_enrolment, events)
            await self._committer.append(events, check, learn=partial(self._appending.learn, events), by=_ENROLMENTS)
        return Response(status_code=204)

    async def events(self, request: Request) -> Response:
        caller = await self._signed(request)
        asked = self._asked(request)
        streamed = "text/event-stream" in request.headers.get("accept", "")
        if streamed or asked.wait_s:
            self._check_waiting(caller)
        if streamed:
            return StreamingResponse(self._stream(caller, asked), media_type="text/event-stream", headers=_NO_STORE)
        with self._waiting(caller):
            page = await self.feed.read(caller.sees_as, asked.topics, asked.after, asked.limit, asked.wait_s)
        return Response(cloudevents.encode_page(page.events, page.position, more=page.more), 200, _NO_STORE, _JSON)

    async def end(self, request: Request) -> Response:
        await self._signed(request)
        return Response(cloudevents.as_document((await self.feed.end()).offsets), 200, _NO_STORE, _JSON)

    async def deployment(self, request: Request) -> Response:
        self._callers.headers(request)
        self._callers.stranger(request)
        created = self.feed.created
        assert created is not None
        page = cloudevents.encode_page([cloudevents.encode(created)], Position({created.stream: created.offset}), more=False)
        return Response(page, 200, _NO_STORE, _JSON)

    async def health(self, request: Request) -> Response:
        if self.feed.away:
            raise Problem("log-away", "the log cannot be followed now", retry_after_s=2)
        return Response(b'{"status":"ok"}', 200, _NO_STORE, _JSON)

    # --- blobs ---

    async def put_blob(self, request: Request) -> Response:
        sha256 = request.path_params["sha256"]
        headers = self._callers.headers(request)
        caller = await self._callers.known(request, self._callers.claim(request, headers))
        if caller.content_sha256.hex() != sha256:
            raise Problem("digest", "the blob's name is not the SHA-256 of its Content-Digest")
        size = self._bodies.length(headers, self.limits.blob_bytes, required=True)
        if not caller.is_server:
            await self._check_upload(caller.name, sha256, size)
        with tempfile.TemporaryFile() as file:
            async for part in self._bodies.parts(request, size, caller.content_sha256):
                await asyncio.to_thread(file.write, part) if len(part) > _BLOCK_BYTES else file.write(part)
            file.seek(0)
            with _store():
                await asyncio.to_thread(self._blobs.put, iter(partial(file.read, _BLOCK_BYTES), b""))
        self.feed.visibility.grant(caller.name, sha256)
        return Response(status_code=204)

    async def _check_upload(self, client_id: str, sha256: str, size: int) -> None:
        """Raises `Problem` for a blob that nobody asked a device for."""
        try:
            self.feed.uploads.take(client_id, sha256, size)
        except Problem:
            await self.feed.sync()  # the instruction may have been read through another gateway
            self.feed.uploads.take(client_id, sha256, size)
        if wait_s := self._quota.take(client_id, size, self._clock()):
            raise Problem("quota", "more has been sent than a device may send at this time", retry_after_s=wait_s)

    async def get_blob(self, request: Request) -> Response:
        sha256 = request.path_params["sha256"]
        size = await self._readable(request, sha256)
        headers = {**_NO_STORE, "content-length": str(size), "accept-ranges": "none"}
        return StreamingResponse(self._blocks(BlobRef(sha256, size)), headers=headers, media_type="application/octet-stream")

    async def head_blob(self, request: Request) -> Response:
        sha256 = request.path_params["sha256"]
        size = await self._readable(request, sha256)
        headers = {**_NO_STORE, "content-length": str(size), "accept-ranges": "none"}
        return Response(headers=headers, media_type="application/octet-stream")

    async def _readable(self, request: Request, sha256: str) -> int:
        """The size of a blob that the caller may read. What is not there and what is not allowed are the same to it."""
        caller = await self._signed(request)
        allowed = caller.is_server or self.feed.visibility.may_read_blob(caller.name, sha256)
        if not allowed:
            await self.feed.sync()  # the instruction that names it may have been read through another gateway
            allowed = self.feed.visibility.may_read_blob(caller.name, sha256)
        size: int | None = None
        if allowed:
            with _store():
                size = await asyncio.to_thread(self._blobs.size_bytes, sha256)
        if size is None:
            raise Problem("not-found", "there is no such blob for this client")
        return size

    def _blocks(self, ref: BlobRef) -> Iterator[bytes]:
        try:
            for block in self._blobs.blocks(ref):
                yield bytes(block)
        except FedloopError as error:
            # The status is sent already: what is missing at the end tells the reader.
            _logger.warning("a blob could not be sent: %s", error.message)

    # --- what the routes share ---

    async def _signed(self, request: Request) -> Caller:
        """Who signed a request that brings no body. Raises `Problem`."""
        headers = self._callers.headers(request)
        if headers.get("content-length", "0") != "0":
            raise Problem("too-large", "this request takes no body")
        caller = await self._callers.known(request, self._callers.claim(request, headers))
        await self._bodies.read(request, headers, 0, caller.content_sha256)
        return caller

    def _asked(self, request: Request) -> _Asked:
        """Raises `Problem` for a parameter that is unknown, comes twice or makes no sense."""
        try:
            pairs = parse_qsl(request.scope["query_string"].decode("ascii"), keep_blank_values=True, strict_parsing=True)
        except ValueError:
            pairs = [] if not request.scope["query_string"] else [("", "")]
        given = dict(pairs)
        if len(given) != len(pairs) or set(given) - {"topics", "after", "limit", "wait_s"}:
            raise Problem("malformed", "the parameters are topics, after, limit and wait_s, each once at most")
        wanted = tuple(given.get("topics", ",".join(topics.ALL)).split(","))
        if not set(wanted) <= set(topics.ALL):
            raise Problem("malformed", "topics is a list of topics of the log, with commas between")
        try:
            after = cloudevents.decode_position(given.get("after", ""))
            limit, wait_s = int(given.get("limit", self.limits.page_events)), float(given.get("wait_s", "0"))
        except ValueError:
            raise Problem("malformed", "after, limit or wait_s is not a position or a number") from None
        if limit < 1 or not 0 <= wait_s <= self.limits.longest_wait_s:
            raise Problem("malformed", f"limit is at least 1, and wait_s at most {self.limits.longest_wait_s:g}")
        return _Asked(wanted, after, min(limit, self.limits.page_events), wait_s)

    async def _stream(self, caller: Caller, asked: _Asked) -> AsyncIterator[bytes]:
        """Server-sent events: each CloudEvent, and with the last one of each page the position as `id`."""
        loop = asyncio.get_running_loop()
        ends = loop.time() + self.limits.longest_stream_s
        with self._waiting(caller):
            after = asked.after
            while loop.time() < ends and not self.feed.stopping and not self._callers.is_revoked(caller.name):
                try:
                    page = await self.feed.read(caller.sees_as, asked.topics, after, asked.limit, _KEEP_ALIVE_S)
                except Problem:
                    return  # the status is sent already: who follows asks again from where it was
                after = page.position
                place = cloudevents.encode_position(after).encode()
                if not page.events:
                    yield b": nothing new\n\n"
                for number, event in enumerate(page.events, 1):
                    yield (b"id: %b\n" % place if number == len(page.events) else b"") + b"data: %b\n\n" % event

    def _check_waiting(self, caller: Caller) -> None:
        """Raises `Problem` if a device lets too many requests wait at once."""
        if not caller.is_server and self._polls.get(caller.name, 0) >= self.limits.polls:
            raise Problem("polls", f"{self.limits.polls} requests of this device are waiting already", retry_after_s=1)

    @contextmanager
    def _waiting(self, caller: Caller) -> Iterator[None]:
        self._polls[caller.name] += 1
        try:
            yield
        finally:
            self._polls[caller.name] -= 1
            if not self._polls[caller.name]:
                del self._polls[caller.name]


@contextmanager
def _store() -> Iterator[None]:
    """Errors of the blob store, as problems."""
    try:
        yield
    except BlobError:
        raise Problem("not-found", "there is no such blob for this client") from None
    except FedloopError as error:
        _logger.warning("the blob store does not answer: %s", error.message)
        raise Problem("log-away", "the blob store does not answer", retry_after_s=2) from None
