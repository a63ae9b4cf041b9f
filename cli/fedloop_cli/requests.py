"""Asking the server for something, in the server's name: whoever holds its key may."""

from __future__ import annotations

from fedloop_events import ids, types
from fedloop_events.errors import UsageError
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.writer import EventWriter


def request_rounds(writer: EventWriter, rounds: int, reason: str) -> str:
    """Ask for `rounds` rounds; the request's id."""
    request = types.RoundRequested(
        origin=_known(writer).origin,
        run_id=types.DEFAULT_RUN,
        request_id=f"q-{ids.new_id()}",
        rounds=rounds,
        reason=_line(reason),
    )
    writer.append(request)
    return request.request_id


def revoke(writer: EventWriter, client_id: str, reason: str) -> None:
    """From here on nothing the client says counts. Raises `UsageError` if it is not enrolled, or revoked already."""
    known = _known(writer)
    client = known.clients.get(client_id)
    if client is None:
        raise UsageError(f"there is no client {client_id!r}", hint="`fedloop audit budget` lists them")
    if client.revoked:
        raise UsageError(f"client {client_id} has been revoked already")
    writer.append(types.ClientRevoked(origin=known.origin, client_id=client_id, reason=_line(reason)))


def _known(writer: EventWriter) -> Identities:
    identities = Identities()
    Reader(writer.log, identities).catch_up()
    return identities


def _line(text: str) -> str:
    if len(text) > 200 or not text.isprintable():
        raise UsageError("a reason is one line of at most 200 characters")
    return text
