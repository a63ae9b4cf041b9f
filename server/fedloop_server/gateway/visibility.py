"""Who may see what: every event and every blob, by whom it concerns. What is not listed here nobody sees but the server.

A device sees what it needs to follow the deployment: its own events, how a round that it was chosen for opened and ended, its own
instructions, and the releases. Of other devices it sees what a signed event that concerns it too says of them, and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from fedloop_events import envelope, topics, types
from fedloop_events.envelope import Event
from fedloop_events.errors import InvalidEventError

EVERYONE: Final = frozenset({"*"})
NOBODY: Final[frozenset[str]] = frozenset()
Audience = frozenset[str]
"""The clients that may see an event, or `EVERYONE` who is enrolled. The server sees all."""

_OWN: Final = frozenset({topics.CLIENTS, topics.FEEDBACK, topics.UPDATES, topics.AUDIT})
"""Topics whose key is the client that an event is by, or about."""
_FOR_EVERYONE: Final = (types.DeploymentCreated, types.EpochStarted, types.RoundRequested, types.ReleaseSaid)
_MAX_ROUNDS: Final = 10_000
_MAX_BLOBS: Final = 200_000


class Visibility:
    """What the server's events say about who sees what. `learn` takes them in order, once each or again."""

    def __init__(self) -> None:
        self._cohorts: OrderedDict[tuple[str, str], Audience] = OrderedDict()
        self._released: dict[str, None] = {}
        self._personal: OrderedDict[tuple[str, str], None] = OrderedDict()

    def audience(self, event: Event) -> Audience:
        """Who may see `event`, which may be anything that stands in the log."""
        if event.topic in _OWN and event.type != types.DeploymentCreated.type_name:
            return frozenset({event.key})
        if event.topic not in {topics.CLIENTS, topics.ROUNDS, topics.RELEASES}:
            return NOBODY
        try:
            payload = envelope.decode(event)
        except InvalidEventError:
            return NOBODY
        if payload is None or payload.topic != event.topic:
            return NOBODY
        return self._of(payload)

    def _of(self, payload: types.Payload) -> Audience:
        match payload:
            case types.InstructionSent():
                return frozenset({payload.client_id})
            case types.RoundOpened():
                return frozenset(payload.cohort)
            case types.RoundClosed():
                named = {each.client_id for each in payload.excluded} | {each.client_id for each in payload.accepted}
                return self._cohorts.get((payload.run_id, payload.round_id or ""), NOBODY) | named
            case types.RoundAborted():
                named = {each.client_id for each in payload.excluded}
                return self._cohorts.get((payload.run_id, payload.round_id), frozenset(named))
            case _:
                return EVERYONE if isinstance(payload, _FOR_EVERYONE) else NOBODY

    def learn(self, payload: types.Payload) -> None:
        """Take in what the server has said; whether it was the server is for the caller to know."""
        match payload:
            case types.RoundOpened():
                self._cohorts[payload.run_id, payload.round_id] = frozenset(payload.cohort)
                if len(self._cohorts) > _MAX_ROUNDS:
                    self._cohorts.popitem(last=False)
            case types.InstructionSent():
                for ref in payload.content.arrays.values():
                    self.grant(payload.client_id, ref.sha256)
            case types.ReleaseProposed() | types.ReleasePublished():
                self._released[payload.blob.sha256] = None
            case _:
                pass

    def grant(self, client_id: str, sha256: str) -> None:
        """Let a client read a blob: it is told to, or it has just sent it. Naming a hash alone is no right to its bytes."""
        self._personal.pop((client_id, sha256), None)
        self._personal[client_id, sha256] = None
        if len(self._personal) > _MAX_BLOBS:
            self._personal.popitem(last=False)

    def may_read_blob(self, client_id: str, sha256: str) -> bool:
        return sha256 in self._released or (client_id, sha256) in self._personal


def visible(audience: Audience, client_id: str) -> bool:
    return audience is EVERYONE or client_id in audience
