"""Feedback by a link: its page, and what is sent from it. The link itself is the right to do so."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from urllib.parse import parse_qsl

from fedloop_events.errors import FedloopError, UsageError
from starlette.requests import Request
from starlette.responses import Response

from fedloop_clients.agent import Agent
from fedloop_clients.feedback import ConflictingFeedbackError, Feedback, UnknownResponseError
from fedloop_clients.feedback_links import ExpiredLinkError, ForgedLinkError, feedback_id_of
from fedloop_clients.sidecar import bodies, page

_FIELDS = ("thumb", "rating", "correction", "comment")


class Linked:
    """The routes of feedback links."""

    def __init__(self, agent: Agent) -> None:
        self._agent = agent

    async def show(self, request: Request) -> Response:
        try:
            self._agent.links.link(request.path_params["token"])
        except FedloopError as error:
            return _refused(error)
        return page.form()

    async def take(self, request: Request) -> Response:
        given = _given(await bodies.read(request))
        try:
            taken = await asyncio.to_thread(self._take, request.path_params["token"], given)
        except (ConflictingFeedbackError, UnknownResponseError) as error:
            return _refused(error)
        except UsageError as error:
            return page.form(given, error.message[:1].upper() + error.message[1:] + ".")
        except FedloopError as error:
            return _refused(error)
        return page.thanks(taken.note)

    def _take(self, token: str, given: Mapping[str, str]) -> Feedback:
        link, rating = self._agent.links.link(token), given.get("rating")
        if rating is not None and not (rating.isdecimal() and len(rating) == 1):
            raise UsageError("rating must be a whole number from 1 to 5")
        return self._agent.feedback(
            link.response_id,
            thumb=given.get("thumb"),  # type: ignore[arg-type]  # which `feedback` checks
            rating=None if rating is None else int(rating),
            correction=given.get("correction"),
            comment=given.get("comment"),
            feedback_id=feedback_id_of(token),
        )


def _given(body: bytes) -> dict[str, str]:
    """What the form's fields hold; a text that shows nothing was not given."""
    try:
        pairs = parse_qsl(body.decode("ascii"), encoding="utf-8", errors="replace", max_num_fields=16)
    except ValueError:
        return {}
    return {name: value.replace("\r\n", "\n") for name, value in pairs if name in _FIELDS and value.strip()}


def _refused(error: FedloopError) -> Response:
    if isinstance(error, ForgedLinkError):
        return page.refused("This link is not valid", "It was not made by this device, or was not copied whole.", 403)
    if isinstance(error, ExpiredLinkError):
        return page.refused("This link has expired", "Ask for a new one where you found it.", 410)
    if isinstance(error, ConflictingFeedbackError):
        return page.refused("This link was used already", "It takes feedback once, and that is kept.", 409)
    if isinstance(error, UnknownResponseError):
        return page.refused("This answer is gone", "The device does not keep it any more.", 410)
    return page.refused("That did not work", f"Nothing was kept: {error.message}. Try again later.", 503)
