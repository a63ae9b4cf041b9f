"""Group commit: appends that wait at the same time are checked and become one append to the log, in a thread of their own; each
caller is answered when its events are durable.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

from fedloop_events.envelope import Event
from fedloop_events.errors import FedloopError, InvalidEventError, NotAllowedError
from fedloop_events.logs.port import EventLog

from fedloop_server.gateway.problems import Problem

_logger = logging.getLogger(__name__)


class _Waiting:
    """One caller's append, and what became of it."""

    __slots__ = ("by", "check", "done", "events", "failure", "learn")

    def __init__(
        self, events: Sequence[Event], check: Callable[[], None], learn: Callable[[], None], by: str, done: asyncio.Future[None]
    ) -> None:
        self.events, self.check, self.learn, self.by, self.done = events, check, learn, by, done
        self.failure: Problem | None = None


class Committer:
    """Appends to `log`, up to `group_events` at a time; at most `queued_events` wait."""

    def __init__(self, log: EventLog, *, queued_events: int, group_events: int) -> None:
        self._log, self._most, self._group = log, queued_events, group_events
        self._waiting: list[_Waiting] = []
        self._queued = 0
        self._running: asyncio.Task[None] | None = None

    async def append(
        self, events: Sequence[Event], check: Callable[[], None], *, learn: Callable[[], None] = lambda: None, by: str = ""
    ) -> None:
        """Return when `events` are durable, all or none. Raises `Problem`: what `check` raises, or "busy" without having tried.

        `check` runs in the committing thread, where verifying signatures keeps nobody else waiting; so does `learn`, once the
        events are durable. Of those with the same `by`, unless it is "", each is checked when the one before has been learned.
        """
        if self._queued + len(events) > self._most and self._queued:
            raise Problem("busy", "more appends are waiting for the log than can be held", retry_after_s=1)
        done: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(_Waiting(events, check, learn, by, done))
        self._queued += len(events)
        if self._running is None:
            self._running = asyncio.get_running_loop().create_task(self._run())
        await done  # when the caller goes away, what has begun goes on

    async def drain(self) -> None:
        """Wait for what is under way."""
        if self._running is not None:
            await self._running

    async def _run(self) -> None:
        try:
            while self._waiting:
                group = self._next_group()
                await asyncio.to_thread(self._commit, group)
                for each in group:
                    self._queued -= len(each.events)
                    if each.done.done():
                        continue  # its caller has gone away
                    if each.failure is None:
                        each.done.set_result(None)
                    else:
                        each.done.set_exception(each.failure)
        finally:
            self._running = None

    def _next_group(self) -> list[_Waiting]:
        count = size = 0
        names: set[str] = set()
        for each in self._waiting:
            size += len(each.events)
            if (count and size > self._group) or each.by in names:
                break
            count += 1
            if each.by:
                names.add(each.by)
        group, self._waiting = self._waiting[:count], self._waiting[count:]
        return group

    def _commit(self, group: Sequence[_Waiting]) -> None:
        """Check and append, in the thread; `failure` of each says what became of it."""
        for each in group:
            try:
                each.check()
            except Problem as problem:
                each.failure = problem
        self._append([each for each in group if each.failure is None])

    def _append(self, group: Sequence[_Waiting]) -> None:
        if not group:
            return
        try:
            self._log.append([event for each in group for event in each.events])
        except FedloopError as error:
            if isinstance(error, InvalidEventError) and len(group) > 1:
                for each in group:  # so that only the one whose fault it is fails
                    self._append([each])
                return
            for each in group:
                each.failure = _problem(error)
        else:
            for each in group:
                each.learn()


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
