"""Who may append what: a device what it has signed, somebody new its own enrolment, the server whatever its author has signed."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence

from fedloop_events import envelope, signatures, types
from fedloop_events.blobs.naming import named_blobs
from fedloop_events.blobs.store import BlobStore
from fedloop_events.envelope import Event
from fedloop_events.errors import BlobError, FedloopError, InvalidEventError, SignatureError
from fedloop_events.logs.http import cloudevents

from fedloop_server.gateway.bodies import is_deeper
from fedloop_server.gateway.callers import Caller
from fedloop_server.gateway.feed import Feed
from fedloop_server.gateway.limits import EventRates, Limits
from fedloop_server.gateway.problems import Problem
from fedloop_server.gateway.standing import Pairs


class Appending:
    """Decides about batches before they reach the log."""

    def __init__(self, feed: Feed, limits: Limits, clock: Callable[[], float]) -> None:
        self._feed, self._limits, self._clock = feed, limits, clock
        self._rates = EventRates(limits)

    def decode(self, body: bytes) -> list[Event]:
        """The events of a batch. Raises `Problem`."""
        try:
            events = cloudevents.decode_batch(body)
        except InvalidEventError as error:
            raise Problem("malformed", f"the body is no batch of events: {error.message}") from None
        if not 0 < len(events) <= self._limits.batch_events:
            raise Problem("too-large", f"a batch holds 1 to {self._limits.batch_events:,} events")
        for number, event in enumerate(events):
            if len(event.data) > envelope.MAX_EVENT_BYTES:
                raise Problem(
                    "too-large", f"event {number} of the batch has more than {envelope.MAX_EVENT_BYTES:,} bytes of data"
                )
            if is_deeper(event.data, self._limits.depth):
                raise Problem("too-large", f"event {number} of the batch is nested deeper than {self._limits.depth}")
        return events

    async def ready(self, events: Sequence[Event], caller: Caller, blobs: BlobStore) -> None:
        """What must be known, or there, before `check` of a device's events. Raises `Problem`."""
        pairs = _by_client(events, caller)
        try:
            self._feed.standing.check(pairs)
        except Problem:
            await self._feed.sync()  # another gateway may have taken what lies between
        new = [each for event, each in pairs if not self._feed.standing.has(each.client_id, each.seq, event.id)]
        kinds = Counter(payload.type_name for payload in new)
        if wait_s := self._rates.take(caller.name, kinds, self._clock()):
            raise Problem("rate", "more events of one kind than a device may append at this time", retry_after_s=wait_s)
        refs = {ref for payload in new for ref in named_blobs(payload)}
        if len(refs) > self._limits.batch_blobs:
            raise Problem("too-large", f"the events of a batch name {self._limits.batch_blobs:,} blobs at most")
        try:
            there = await asyncio.to_thread(lambda: all(blobs.refresh(ref) for ref in refs))
        except BlobError:
            there = False
        except FedloopError:
            raise Problem("log-away", "the blob store does not answer", retry_after_s=2) from None
        if not there:
            raise Problem("blob-absent", "an event names a blob that is not in the store: send the blob first")

    def learn(self, events: Sequence[Event]) -> None:
        """A device's events are in the log."""
        for event in events:
            payload = _decode(event, 0)
            if isinstance(payload, types.ClientEnrolled):
                self._feed.enrolled(event, payload)
            elif isinstance(payload, types.ClientEvent):
                self._feed.standing.learn(payload.client_id, payload.seq, event.id)
                if isinstance(payload, types.BudgetSpent):
                    self._feed.standing.spent(payload)
                elif isinstance(payload, types.UpdateSubmitted | types.RoundDeclined):
                    self._feed.uploads.answered(payload.client_id, payload.instruction_id)

    def check(self, events: Sequence[Event], caller: Caller) -> None:
        """Raises `Problem` unless `caller` may append each of `events`."""
        for number, event in enumerate(events):
            payload = _decode(event, number)
            if not caller.is_server and payload.author != caller.name:
                raise Problem("forbidden", f"event {number} of the batch is not by the client that sends it")
            try:
                self._authenticate(event, payload)
            except SignatureError:
                raise Problem("event", f"event {number} of the batch is not validly signed by its author") from None
            except InvalidEventError:
                raise Problem(
                    "event",
                    f"event {number} of the batch is of another deployment, topic, key or source than it must be, "
                    "or its author is not enrolled",
                ) from None
        if not caller.is_server:
            self._feed.standing.check(_by_client(events, caller))

    def enrolment(self, events: Sequence[Event], keyid: str) -> str:
        """The public key of who enrols itself as `keyid`, with which it must have signed the request too. Raises `Problem`."""
        payload = _decode(events[0], 0)
        if len(events) != 1 or not isinstance(payload, types.ClientEnrolled) or payload.client_id != keyid:
            raise Problem("unknown-client", "who is not enrolled can append its own enrolment, and nothing else")
        return payload.public_key

    def check_enrolment(self, events: Sequence[Event]) -> None:
        """`check`, for what `enrolment` has let pass."""
        payload = _decode(events[0], 0)
        assert isinstance(payload, types.ClientEnrolled)
        self._check_enrolment(events[0], payload)

    def _authenticate(self, event: Event, payload: types.Payload) -> None:
        if isinstance(payload, types.ClientEnrolled):
            if payload.client_id not in self._feed.identities.clients:
                self._check_enrolment(event, payload)
            elif not self._feed.standing.has(payload.client_id, payload.seq, event.id):
                raise Problem("name-taken", "the client is enrolled, and cannot be a second time")
            else:
                self._feed.identities.authenticate(event, payload)
        else:
            self._feed.identities.authenticate(event, payload)

    def _check_enrolment(self, event: Event, payload: types.ClientEnrolled) -> None:
        """Before the log holds it for good; of two at the same time, the fold over the log decides."""
        if payload.origin != self._feed.identities.origin:
            raise Problem("event", "the enrolment is of another deployment")
        if payload.client_id in self._feed.standing:
            if self._feed.standing.has(payload.client_id, payload.seq, event.id):
                return  # it is sent again
            raise Problem("name-taken", "the name of the enrolment is taken")
        if payload.seq != 0:
            raise Problem("sequence", "an enrolment is a client's first event: 0 is next")
        if payload.client_id == "server" or {payload.public_key, payload.node_id} & self._feed.taken:
            raise Problem("name-taken", "the name, the key or the node id of the enrolment is taken")
        if not 0 < int(payload.node_id) < 1 << 64 or str(int(payload.node_id)) != payload.node_id:
            raise Problem("event", "the node id of the enrolment is not one")
        if (event.topic, event.key, event.source) != (payload.topic, payload.key, envelope.source_of(payload)):
            raise Problem("event", "the enrolment stands under another topic, key or source than it must")
        try:
            signatures.verify(event, payload.public_key)
        except SignatureError:
            raise Problem("event", "the enrolment is not validly signed by the key in it") from None


def _by_client(events: Sequence[Event], caller: Caller) -> Pairs:
    """Raises `Problem` for an event that `caller` is not the author of."""
    pairs = []
    for number, event in enumerate(events):
        payload = _decode(event, number)
        if not isinstance(payload, types.ClientEvent) or payload.client_id != caller.name:
            raise Problem("forbidden", f"event {number} of the batch is not by the client that sends it")
        pairs.append((event, payload))
    return pairs


def _decode(event: Event, number: int) -> types.Payload:
    try:
        envelope.check(event)
        payload = envelope.decode(event)
    except InvalidEventError:
        raise Problem("event", f"event {number} of the batch is not exactly what its type says") from None
    if payload is None:
        raise Problem("event", f"event {number} of the batch is of a type that this gateway does not know")
    return payload
