"""Which events count: the one place that decodes, authenticates and fences, for every reader of a log.

An event counts if it is what its type says, its author signed it, and, where a server decided it, the server's epoch is the
latest one at its place in the log. Of a run that is the epoch of the last `EpochStarted` that counts. Topic `releases` has an
order of its own, and none to `rounds` (docs/decisions/0009): there, a decision of an epoch below one that the model has seen is a
fenced server's. What operators ask for (rounds, a rollback, a revocation) has no epoch.
"""

from __future__ import annotations

from msgspec import Struct, field

from fedloop_events import envelope, topics
from fedloop_events.envelope import Record
from fedloop_events.folds.identities import Identities
from fedloop_events.parts import Parts
from fedloop_events.types import ClientEvent, EpochStarted, Payload, ReleaseDecision, ServerEvent


class Standing(Struct):
    """What the events read so far say about whether later ones count; kept in a snapshot together with the fold's state."""

    epochs: dict[str, int] = {}
    """The latest epoch by run."""
    models: dict[str, int] = {}
    """The latest epoch that decided about a model's releases."""
    stale: dict[str, int] = {}
    """By run: how many decisions were not of its latest epoch, and so count for nothing."""
    parts: Parts = field(default_factory=Parts)

    def counts(self, payload: Payload) -> bool:
        """Whether an authentic event counts. It is taken in, so ask once for each, in the order of the log."""
        match payload:
            case ClientEvent():
                return True
            case EpochStarted():
                if payload.epoch <= self.epochs.get(payload.run_id, 0):
                    return False
                self.epochs[payload.run_id] = payload.epoch
            case ServerEvent():
                if payload.epoch != self.epochs.get(payload.run_id):
                    self.stale[payload.run_id] = self.stale.get(payload.run_id, 0) + 1
                    return False
            case ReleaseDecision():
                if payload.epoch < self.models.get(payload.model, 0):
                    return False
                self.models[payload.model] = payload.epoch
            case _:
                pass
        return True


class Admit:
    """Says of each record of a log, in its order, what counts of it. Without `identities` everybody is believed.

    A decision in several events counts as one, when all of them were read; `partly` is for a device, which a gateway shows no
    more than those that name it: there it counts with what was read.
    """

    def __init__(self, identities: Identities | None = None, *, partly: bool = False) -> None:
        self.identities, self._partly = identities, partly
        self.standing = Standing()
        self.unknown = 0
        """Events of types that only a newer program knows."""

    def __call__(self, record: Record) -> Payload | None:
        """The payload, whole; or None if it counts for nothing: of an unknown type, decided by a fenced server, or not whole yet.

        Raises `InvalidEventError` (`SignatureError`) for an event that is malformed, or that its author did not sign.
        """
        payload = envelope.decode(record)
        if payload is None:
            self.unknown += 1
            return None
        self.authenticate(record, payload)
        return self.standing.parts.join(record, payload, partly=self._partly) if self.standing.counts(payload) else None

    def authenticate(self, record: Record, payload: Payload) -> None:
        """Raise unless its author signed it. What `identities` have not taken in yet of topic `clients` they take in."""
        if self.identities is None:
            return
        if record.topic == topics.CLIENTS and not self.identities.position.covers(record.stream, record.offset):
            self.identities.apply(record, payload)
        else:
            self.identities.authenticate(record, payload)
