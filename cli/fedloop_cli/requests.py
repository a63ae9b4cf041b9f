"""Asking the server for something, in the server's name: whoever holds its key may."""

from __future__ import annotations

from fedloop_events import ids, types
from fedloop_events.author import Author
from fedloop_events.errors import UsageError
from fedloop_events.identities import Identities
from fedloop_events.projections import Reader

RUN_ID = "main"


def request_rounds(author: Author, rounds: int, reason: str) -> str:
    """Ask for `rounds` rounds; the request's id."""
    request = types.RoundRequested(
        origin=_known(author).origin, run_id=RUN_ID, request_id=f"q-{ids.new_id()}", rounds=rounds, reason=_line(reason)
    )
    author.say(request)
    return request.request_id


def revoke(author: Author, client_id: str, reason: str) -> None:
    """From here on nothing the client says counts. Raises `UsageError` if it is not enrolled, or revoked already."""
    known = _known(author)
    client = known.clients.get(client_id)
    if client is None:
        raise UsageError(f"there is no client {client_id!r}", hint="`fedloop audit budget` lists them")
    if client.revoked:
        raise UsageError(f"client {client_id} has been revoked already")
    author.say(types.ClientRevoked(origin=known.origin, client_id=client_id, reason=_line(reason)))


def _known(author: Author) -> Identities:
    identities = Identities()
    Reader(author.log, identities).catch_up()
    return identities


def _line(text: str) -> str:
    if len(text) > 200 or not text.isprintable():
        raise UsageError("a reason is one line of at most 200 characters")
    return text
