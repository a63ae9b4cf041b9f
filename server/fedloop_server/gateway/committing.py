"""Group commit: appends that are waiting at the same time become one append to the log, and each caller is answered when it is
durable."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence

from fedloop_events.envelope import Event
from fedloop_events.errors import FedloopError, InvalidEventError, NotAllowedError
from fedloop_events.log import EventLog

from fedloop_server.gateway.problems import Problem

_logger = logging.getLogger(__name__)

_Waiting = tuple[Sequence[Event], "asyncio.Future[None]"]


class Committer:
    """Appends to `log`, up to `group_events` at a time; at most `queued_events` wait."""

    def __init__(self, log: EventLog, *, queued_events: int, group_events: int) -> None:
        self._log, self._most, self._group = log, queued_events, group_events
        self._waiting: list[_Waiting] = []
        self._queued = 0
        self._running: asyncio.Task[None] | None = None

    async def append(self, events: Sequence[Event]) -> None:
        """Return when `events` are durable, all or none. Raises `Problem`, "busy" without having tried."""
        if self._queued + len(events) > self._most and self._queued:
            raise Problem("busy", "more appends are waiting for the log than can be held", retry_after_s=1)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((events, done))
        self._queued += len(events)
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())
        # An append that has begun is not taken back when its caller goes away.
        await asyncio.shield(done)

    async def drain(self) -> None:
        """Wait for what is under way."""
        if self._running is not None:
            await self._running

    async def _run(self) -> None:
        try:
            while self._waiting:
                await self._commit(self._next_group())
        finally:
            self._running = None

    def _next_group(self) -> list[_Waiting]:
        count = size = 0
        for events, _ in self._waiting:
            size += len(events)
            if count and size > self._group:
                break
            count += 1
        group, self._waiting = self._waiting[:count], self._waiting[count:]
        return group

    async def _commit(self, group: list[_Waiting]) -> None:
        try:
            await asyncio.to_thread(self._log.append, [event for events, _ in group for event in events])
            failure = None
        except FedloopError as error:
            failure = error
        if isinstance(failure, InvalidEventError) and len(group) > 1:
            for one in group:  # so that only the one whose fault it is fails
                await self._commit([one])
            return
        for events, done in group:
            self._queued -= len(events)
            if not done.done():
                if failure is None:
                    done.set_result(None)
                else:
                    done.set_exception(_problem(failure))


def _problem(failure: FedloopError) -> Problem:
    match failure:
        case InvalidEventError():
            return Problem("event", "an event is one that the log cannot hold")
        case NotAllowedError():
            _logger.error("the gateway may not append: %s", failure.message)
            return Problem("forbidden", "the gateway itself may not append this to the log")
        case _:
            _logger.warning("the log takes no appends: %s", failure.message)
            return Problem("log-away", "the log takes no appends now", retry_after_s=2)
