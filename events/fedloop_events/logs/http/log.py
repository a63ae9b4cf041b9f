"""`GatewayLog`: the `EventLog` of a deployment, as a gateway lets one client see and extend it."""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from typing import Final

from fedloop_events import envelope, topics
from fedloop_events.envelope import Event, Record
from fedloop_events.errors import InvalidEventError, UnreachableError
from fedloop_events.logs.http import cloudevents
from fedloop_events.logs.http.transport import Transport
from fedloop_events.logs.port import START, Batch, Position
from fedloop_events.signatures import SigningKey

LONGEST_WAIT_S: Final = 20.0
"""One waiting request lasts no longer: what stands between a device and its gateway cuts silent connections."""
PAGE: Final = 500


class GatewayLog:
    """An `EventLog` over HTTPS: `https://HOST[:PORT][?ca=FILE]`, or `http://` to this machine alone.

    As the client that it is identified as, it reads what that client may see, and appends what that client has signed; before
    it is identified it reads the event that created the deployment, and nothing else. Safe to share between threads; a forked
    child connects anew. Raises `NotAllowedError` where the gateway refuses this client something.
    """

    def __init__(self, url: str, *, identity: tuple[str, SigningKey] | None = None, timeout_s: float = 30.0) -> None:
        self._transport = Transport(url, identity=identity, timeout_s=timeout_s)

    def identify(self, client_id: str, key: SigningKey) -> None:
        """From here on, ask as `client_id` ("server" for the deployment's own key), and sign with `key`."""
        self._transport.identify(client_id, key)

    def append(self, events: Sequence[Event]) -> None:
        """See `EventLog.append`. Raises `UsageError` for more events at once than the gateway takes from this client."""
        for event in events:
            envelope.check(event)
        if events:
            self._transport.call(
                "POST",
                "/v1/events",
                content=cloudevents.encode_batch(events),
                headers={"content-type": cloudevents.BATCH_TYPE},
                doing=(events[0].topic, "append to"),
            )

    def read(
        self, topics: Collection[str] = topics.ALL, after: Position = START, *, limit: int = 1000, wait_s: float = 0.0
    ) -> Batch:
        """See `EventLog.read`."""
        wanted = sorted(set(topics))
        if not self._transport.identified:
            return self._deployment(wanted, after)
        records: list[Record] = []
        deadline = time.monotonic() + wait_s
        while wanted:
            page = self._page(wanted, after, min(limit - len(records), PAGE), 0.0 if records else deadline - time.monotonic())
            records += page.records
            after = page.position
            if len(records) >= limit or (not page.more and (records or time.monotonic() >= deadline)):
                break
        return Batch(records, after)

    def end(self) -> Position:
        answer = self._transport.call("GET", "/v1/end" if self._transport.identified else "/v1/deployment")
        try:
            return cloudevents.decode_end(answer.content) if self._transport.identified else _first(answer.content).position
        except InvalidEventError as error:
            raise self._strange(error) from None

    def close(self) -> None:
        self._transport.close()

    def _page(self, wanted: Sequence[str], after: Position, limit: int, wait_s: float) -> cloudevents.Page:
        wait_s = min(max(wait_s, 0.0), LONGEST_WAIT_S)
        query = {"topics": ",".join(wanted), "limit": str(limit)}
        if after.offsets:
            query["after"] = cloudevents.encode_position(after)
        if wait_s:
            query["wait_s"] = f"{wait_s:.3f}"
        answer = self._transport.call("GET", "/v1/events", query, wait_s=wait_s, doing=(wanted[0], "read"))
        try:
            return cloudevents.decode_page(answer.content)
        except InvalidEventError as error:
            raise self._strange(error) from None

    def _deployment(self, wanted: Sequence[str], after: Position) -> Batch:
        """What everybody may know."""
        try:
            page = _first(self._transport.call("GET", "/v1/deployment").content)
        except InvalidEventError as error:
            raise self._strange(error) from None
        fresh = [each for each in page.records if each.topic in wanted and not after.covers(each.stream, each.offset)]
        return Batch(fresh, Position(dict(after.offsets) | dict(page.position.offsets)) if fresh else after)

    def _strange(self, error: InvalidEventError) -> UnreachableError:
        return UnreachableError(
            f"{self._transport.base} answers, but not as a gateway does", cause=error.message, hint="check the address"
        )


def _first(data: bytes) -> cloudevents.Page:
    return cloudevents.decode_page(data)
