"""Who may see what: every event by the audience that its type states, every blob by whom it concerns.

A device sees what it needs to follow the deployment: its own events, how a round that it was chosen for opened and ended, its own
instructions, and the releases. Of other devices it sees what a signed event that concerns it too holds of them, and nothing else.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Final

from fedloop_events import envelope, types
from fedloop_events.envelope import Event
from fedloop_events.errors import InvalidEventError
from fedloop_events.topics import DECLARED
from fedloop_events.types import Audience

EVERYONE: Final = frozenset({"*"})
NOBODY: Final[frozenset[str]] = frozenset()
Clients = frozenset[str]
"""The clients that may see an event, or `EVERYONE` who is enrolled. The server sees all."""

_MAX_NAMES: Final = 1_000_000
"""Of clients in the cohorts that are remembered."""
_MAX_BLOBS: Final = 200_000


class Visibility:
    """What the server's events decide about who sees what. `learn` takes them in order, once each or again."""

    def __init__(self) -> None:
        self._cohorts: OrderedDict[tuple[str, str], Clients] = OrderedDict()
        self._names = 0
        self._released: dict[str, None] = {}
        self._personal: OrderedDict[tuple[str, str], None] = OrderedDict()

    def audience(self, event: Event) -> Clients:
        """Who may see `event`, which may be anything that stands in the log."""
        stated = types.newest(event.type)
        if stated is None:
            # What only a newer program knows is its own client's at least, where the key names one.
            return frozenset({event.key}) if event.topic in DECLARED and DECLARED[event.topic].by_client else NOBODY
        if stated.topic != event.topic:
            return NOBODY
        match stated.audience:
            case Audience.NOBODY:
                return NOBODY
            case Audience.SUBJECT:
                return frozenset({event.key})
            case _:
                return self._of(event)

    def _of(self, event: Event) -> Clients:
        try:
            payload = envelope.decode(event)
        except InvalidEventError:
            return NOBODY
        if payload is None:
            return NOBODY
        if payload.audience is Audience.EVERYONE:
            return EVERYONE
        cohort = NOBODY
        if payload.audience is Audience.COHORT and isinstance(payload, types.ServerEvent):
            cohort = self._cohorts.get((payload.run_id, getattr(payload, "round_id", None) or ""), NOBODY)
        return cohort.union(payload.named)

    def learn(self, payload: types.Payload) -> None:
        """Take in an event of the server; whether it is authentic is for the caller to know."""
        match payload:
            case types.RoundOpened():
                self._remember((payload.run_id, payload.round_id), frozenset(payload.cohort))
            case types.InstructionSent():
                for ref in payload.content.arrays.values():
                    self.grant(payload.client_id, ref.sha256)
            case types.ReleaseProposed() | types.ReleasePublished():
                self._released[payload.blob.sha256] = None
            case _:
                pass

    def _remember(self, name: tuple[str, str], cohort: Clients) -> None:
        """The oldest rounds give way: of those, who was in the cohort sees no more than what names it."""
        self._names += len(cohort) - len(self._cohorts.pop(name, NOBODY))
        self._cohorts[name] = cohort
        while self._names > _MAX_NAMES and len(self._cohorts) > 1:
            self._names -= len(self._cohorts.popitem(last=False)[1])

    def grant(self, client_id: str, sha256: str) -> None:
        """Let a client read a blob: an instruction to it names it, or it has just sent it. A hash alone is no right to bytes."""
        self._personal.pop((client_id, sha256), None)
        self._personal[client_id, sha256] = None
        if len(self._personal) > _MAX_BLOBS:
            self._personal.popitem(last=False)

    def may_read_blob(self, client_id: str, sha256: str) -> bool:
        return sha256 in self._released or (client_id, sha256) in self._personal


def visible(audience: Clients, client_id: str) -> bool:
    return audience is EVERYONE or client_id in audience
