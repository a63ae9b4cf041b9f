"""The sidecar's application: requests in OpenAI's form in, answers of the device's model and feedback about them."""

from __future__ import annotations

import asyncio
from collections.abc import Collection
from typing import Any

import msgspec
from fedloop_events.errors import FedloopError
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from fedloop_clients import feedback_links
from fedloop_clients.agent import Agent
from fedloop_clients.sidecar import asked as asking
from fedloop_clients.sidecar import bodies, errors
from fedloop_clients.sidecar.access import HostCheck, KeyCheck
from fedloop_clients.sidecar.answering import Answering, Begun, Parts
from fedloop_clients.sidecar.asked import Asked, Embedded, Judged
from fedloop_clients.sidecar.errors import JSON, NO_STORE, ApiError
from fedloop_clients.sidecar.linked import Linked
from fedloop_clients.sidecar.written import EventStream, completion, events, vectors


def create_app(agent: Agent, answering: Answering, key: str, *, origins: Collection[str] = ()) -> Starlette:
    """The sidecar of `agent`, which stays the caller's to close; pages of the `origins` may use it, if they have the key."""
    sidecar, linked = Sidecar(agent, answering), Linked(agent)
    routes = (
        ("/v1/chat/completions", "POST", sidecar.chat),
        ("/v1/completions", "POST", sidecar.text),
        ("/v1/embeddings", "POST", sidecar.embeddings),
        ("/v1/models", "GET", sidecar.models),
        ("/v1/models/{model:path}", "GET", sidecar.model),
        ("/v1/feedback", "POST", sidecar.feedback),
        ("/v1/feedback/links", "POST", sidecar.link),
        (f"{feedback_links.PATH}{{token}}", "GET", linked.show),
        (f"{feedback_links.PATH}{{token}}", "POST", linked.take),
        ("/healthz", "GET", sidecar.health),
    )
    browsers = Middleware(
        CORSMiddleware,
        allow_origins=tuple(origins),
        allow_methods=("GET", "POST"),
        allow_headers=("*",),
        allow_private_network=True,
    )
    return Starlette(
        routes=[Route(path, endpoint, methods=[method]) for path, method, endpoint in routes],
        middleware=[Middleware(HostCheck), browsers, Middleware(KeyCheck, key=key)],
        exception_handlers={
            ApiError: errors.on_api_error,
            FedloopError: errors.on_fedloop_error,
            ClientDisconnect: _on_gone,
            404: errors.on_missing,
            405: errors.on_method,
            Exception: errors.on_defect,
        },
    )


class Sidecar:
    """The routes, and what they share."""

    def __init__(self, agent: Agent, answering: Answering) -> None:
        self._agent, self._answering = agent, answering

    async def chat(self, request: Request) -> Response:
        return await self._complete(request, asking.chat(await bodies.read(request)))

    async def text(self, request: Request) -> Response:
        return await self._complete(request, asking.text(await bodies.read(request)))

    async def embeddings(self, request: Request) -> Response:
        wanted = asking.decode(await bodies.read(request), Embedded)
        model, texts = self._answering.named(wanted.model), wanted.texts
        found = await bodies.unless_gone(request, self._answering.embed(wanted.model, texts))
        return _json(vectors(model, found, packed=wanted.encoding_format == "base64"))

    async def models(self, request: Request) -> Response:
        return _json({"object": "list", "data": [_model(each) for each in await self._answering.models()]})

    async def model(self, request: Request) -> Response:
        return _json(_model(self._answering.named(request.path_params["model"])))

    async def feedback(self, request: Request) -> Response:
        given = asking.decode(await bodies.read(request), Judged)
        about = given.response_id if given.id is None else given.id
        if about is None or (given.response_id or about) != about:
            raise ApiError("invalid_request", "id (or response_id) names the one response that the feedback is about", param="id")
        found = await asyncio.to_thread(
            self._agent.feedback,
            about,
            thumb=given.thumb,
            rating=given.rating,
            label=given.label,
            correction=given.correction,
            comment=given.comment,
            preferred_over=given.preferred_over,
            signal=given.signal,
            feedback_id=given.feedback_id,
        )
        return _json(
            {"object": "feedback", "id": found.feedback_id, "response_id": about, "teaches": found.teaches, "note": found.note}
        )

    async def link(self, request: Request) -> Response:
        given = asking.decode(await bodies.read(request), asking.LinkWanted)
        ttl_s = feedback_links.DEFAULT_TTL_S if given.ttl_s is None else given.ttl_s
        url = await asyncio.to_thread(self._agent.feedback_url, given.id, ttl=ttl_s)
        return _json({"object": "feedback.link", "id": given.id, "url": url})

    async def health(self, request: Request) -> Response:
        return _json({"status": "ok"})

    async def _complete(self, request: Request, asked: Asked) -> Response:
        model = self._answering.named(asked.model)
        parts = self._answering.answer(asked)
        if not asked.stream:
            return _json(await bodies.unless_gone(request, completion(asked, model, parts)))
        begun = await bodies.unless_gone(request, _begun(parts))
        return EventStream(events(asked, model, begun, parts))


async def _begun(parts: Parts) -> Begun:
    begun = await anext(parts)
    assert isinstance(begun, Begun)
    return begun


async def _on_gone(request: Request, error: Exception) -> Response:
    return Response(status_code=499)


def _json(document: dict[str, Any]) -> Response:
    return Response(msgspec.json.encode(document), 200, NO_STORE, JSON)


def _model(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": "fedloop"}
