"""The log as the gateway's clients read it: followed once, by one thread, and handed to everybody who waits.

What a reader has not seen is mostly in the ring of the newest events; a reader who comes from further back is served from the log
itself, so many events at a time. A read sees everything that the log held when it began.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import AsyncIterator, Collection, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final

import msgspec
from fedloop_events import envelope, topics, types
from fedloop_events.envelope import Event, Record
from fedloop_events.errors import FedloopError, InvalidEventError, UsageError
from fedloop_events.folds.admit import Admit
from fedloop_events.folds.identities import Identities
from fedloop_events.logs.port import START, Batch, EventLog, Position, read_all
from fedloop_events.topics import DECLARED
from msgspec import Struct

from fedloop_server.gateway.limits import Limits
from fedloop_server.gateway.problems import Problem
from fedloop_server.gateway.ring import Entry, Ring
from fedloop_server.gateway.standing import Standing
from fedloop_server.gateway.uploads import Uploads
from fedloop_server.gateway.visibility import EVERYONE, Visibility, visible

SYNC_TIMEOUT_S: Final = 5.0
_TAIL_WAIT_S: Final = 0.5
_TAIL_BATCH: Final = 1_000
_TELLING: Final = (topics.CLIENTS, topics.ROUNDS, topics.RELEASES)
"""What decides whose events are accepted, and who sees what."""


class _Numbered(Struct):
    """Of an event by a client, of any type."""

    client_id: str
    seq: int
    instruction_id: str | None = None


ANSWERS: Final = frozenset({types.UpdateSubmitted.type_name, types.RoundDeclined.type_name})
"""What a client settles an instruction with."""
_numbered: Final = msgspec.json.Decoder(_Numbered)

_logger = logging.getLogger(__name__)


class FeedPage(Struct, frozen=True):
    """Events as they are sent, the position after them, and whether there is more that could be read now."""

    events: Sequence[bytes]
    position: Position
    more: bool


class Feed:
    """`log`, followed. All methods but `start` are for the event loop's thread."""

    def __init__(self, log: EventLog, limits: Limits) -> None:
        self.identities, self.visibility, self.standing = Identities(), Visibility(), Standing()
        self.uploads = Uploads(limits)
        self._admit = Admit(self.identities)
        self.taken: set[str] = set()
        """Public keys and node ids of every client."""
        self.created: Record | None = None
        """The event that created the deployment."""
        self.away: str = "not started"
        """Why the log cannot be followed now; "" if it can."""
        self._log, self._limits, self._prepared = log, limits, False
        self._ring = Ring(START, limits.ring_events, limits.ring_bytes)
        self._waiting: defaultdict[str | None, set[asyncio.Event]] = defaultdict(set)
        self._moved: set[asyncio.Event] = set()
        self._asking = asyncio.Lock()
        self._next_end: asyncio.Task[Position] | None = None
        self._stopping = threading.Event()
        self._thread: threading.Thread | None = None

    def prepare(self) -> None:
        """Read whose events are accepted, who sees what, and where each client stands (there the log is believed as it is).

        Raises `UsageError` if the log belongs to no deployment, and what the log raises.
        """
        if self._prepared:
            return
        end = self._log.end()
        for record in read_all(self._log, topics.ALL):
            self._learn(record, believed=True)
        if self.created is None:
            raise UsageError("the log belongs to no deployment", hint="its operator makes one: `fedloop server init`")
        self._ring = Ring(end, self._limits.ring_events, self._limits.ring_bytes)
        self._prepared = True

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        self.away = ""
        self._thread = threading.Thread(target=self._follow, args=(loop,), name="gateway-feed", daemon=True)
        self._thread.start()

    def begin_stop(self) -> None:
        """Answer everybody who waits, and let nobody wait any more."""
        self._stopping.set()
        self.wake()

    async def stop(self) -> None:
        """`begin_stop`, and end the thread."""
        self.begin_stop()
        if self._thread is not None:
            await asyncio.to_thread(self._thread.join, 2 * _TAIL_WAIT_S)

    @property
    def stopping(self) -> bool:
        return self._stopping.is_set()

    def wake(self) -> None:
        for events in self._waiting.values():
            for event in events:
                event.set()

    # --- reading ---

    async def read(self, client_id: str | None, wanted: Collection[str], after: Position, limit: int, wait_s: float) -> FeedPage:
        """Up to `limit` events that this client (None: the server) may see, after waiting up to `wait_s` for the first one."""
        await self.sync()
        deadline = asyncio.get_running_loop().time() + wait_s
        async with self._notified(client_id) as news:
            while True:
                news.clear()
                page = self._recent(client_id, wanted, after, limit)
                if page is None:
                    page = await self._older(client_id, wanted, after, limit)
                left_s = deadline - asyncio.get_running_loop().time()
                if page.events or page.more or left_s <= 0 or self.stopping:
                    return page
                after = page.position
                with suppress(TimeoutError):
                    await asyncio.wait_for(news.wait(), left_s)

    async def sync(self) -> Position:
        """Wait until everything is in the ring, or has been, that the log holds now; its end. Raises `Problem`."""
        end = await self.end()
        if not self._ring.reaches(end):
            moved = asyncio.Event()
            self._moved.add(moved)
            try:
                async with asyncio.timeout(SYNC_TIMEOUT_S):
                    while not self._ring.reaches(end):
                        moved.clear()
                        await moved.wait()
            except TimeoutError:
                raise Problem("log-away", "the log could not be read to its end in time", retry_after_s=1) from None
            finally:
                self._moved.discard(moved)
        return end

    async def end(self) -> Position:
        """The log's end, asked for once by all who want to know it at the same time. Raises `Problem`."""
        if self._next_end is None:
            self._next_end = asyncio.get_running_loop().create_task(self._ask_end())
        try:
            return await asyncio.shield(self._next_end)
        except FedloopError:
            raise Problem("log-away", "the log does not answer", retry_after_s=1) from None

    async def _ask_end(self) -> Position:
        async with self._asking:
            self._next_end = None  # who comes from here on wants to know it anew
            return await asyncio.to_thread(self._log.end)

    def _recent(self, client_id: str | None, wanted: Collection[str], after: Position, limit: int) -> FeedPage | None:
        """A page from memory; None if there are older events than it holds."""
        if not self._ring.covers(after):
            return None
        found: list[Entry] = []
        for entry in self._ring.after(after, client_id, wanted):
            found.append(entry)
            if len(found) == limit:
                offsets = dict(after.offsets)
                offsets |= {each.record.stream: each.record.offset for each in found}
                return FeedPage(_wires(found), Position(offsets), more=True)
        return FeedPage(_wires(found), _latest(after, self._ring.position), more=False)

    async def _older(self, client_id: str | None, wanted: Collection[str], after: Position, limit: int) -> FeedPage:
        """A page from the log, after looking at some thousand events at most."""
        known = self._ring.position  # up to here it is known who may see what
        found: list[Entry] = []
        offsets, place, scanned = dict(after.offsets), after, 0
        while scanned < self._limits.scan_events:
            batch = await self._read_log(wanted, place, self._limits.scan_events - scanned)
            if not batch.records:
                return FeedPage(_wires(found), _latest(after, known), more=False)
            place, scanned = batch.position, scanned + len(batch.records)
            for record in batch.records:
                if not known.covers(record.stream, record.offset):
                    continue  # the next read finds it in the ring
                offsets[record.stream] = max(record.offset, offsets.get(record.stream, 0))
                audience = EVERYONE if client_id is None else self.visibility.audience(record)
                if client_id is None or visible(audience, client_id):
                    found.append(Entry(record, audience))
                    if len(found) == limit:
                        return FeedPage(_wires(found), Position(offsets), more=True)
        return FeedPage(_wires(found), Position(offsets), more=True)

    async def _read_log(self, wanted: Collection[str], after: Position, limit: int) -> Batch:
        try:
            return await asyncio.to_thread(self._log.read, wanted, after, limit=limit)
        except FedloopError:
            raise Problem("log-away", "the log cannot be read now", retry_after_s=1) from None

    @asynccontextmanager
    async def _notified(self, client_id: str | None) -> AsyncIterator[asyncio.Event]:
        news = asyncio.Event()
        self._waiting[client_id].add(news)
        try:
            yield news
        finally:
            self._waiting[client_id].discard(news)
            if not self._waiting[client_id]:
                del self._waiting[client_id]

    # --- following ---

    def _follow(self, loop: asyncio.AbstractEventLoop) -> None:
        position = self._ring.position
        while not self._stopping.is_set():
            try:
                batch = self._log.read(topics.ALL, position, limit=_TAIL_BATCH, wait_s=_TAIL_WAIT_S)
                self.away = ""
            except FedloopError as error:
                if not self.away:
                    _logger.warning("the log cannot be followed: %s", error.message)
                self.away = error.message
                self._stopping.wait(_TAIL_WAIT_S)
                continue
            if batch.position == position:
                continue
            position = batch.position
            entries = []
            for record in batch.records:
                self._learn(record)
                entries.append(Entry(record, self.visibility.audience(record)))
            taken = threading.Event()
            try:
                loop.call_soon_threadsafe(self._take, entries, position, taken)
            except RuntimeError:  # the loop is closed
                return
            while not taken.wait(_TAIL_WAIT_S) and not self._stopping.is_set():
                pass

    def _learn(self, record: Record, *, believed: bool = False) -> None:
        """Take in an authentic event. Runs in the following thread."""
        if record.topic not in _TELLING or record.type == types.ClientSeen.type_name:
            self._learn_standing(record, believed=believed)
            return
        try:
            payload = self._admit(record)
        except InvalidEventError:
            return
        match payload:
            case None:
                pass
            case types.DeploymentCreated():
                self.created = self.created or record
                self.taken.add(payload.public_key)
            case types.ClientEnrolled():
                self.enrolled(record, payload)
            case _:
                self.visibility.learn(payload)
                if isinstance(payload, types.InstructionSent):
                    self.standing.instructed(record.id, payload.client_id)
                    self.uploads.instructed(record.id, payload)
                elif isinstance(payload, types.RoundOpened):
                    self.uploads.opened(payload)

    def enrolled(self, event: Event, payload: types.ClientEnrolled) -> None:
        """What the enrolment takes is taken, and the client's events begin."""
        self.taken |= {payload.public_key, payload.node_id}
        self.standing.learn(payload.client_id, payload.seq, event.id)

    def _learn_standing(self, record: Record, *, believed: bool) -> None:
        """Verifying everything a second time would cost a start many minutes, and following what this gateway has appended itself
        as much as appending it.
        """
        try:
            found = _numbered.decode(record.data)
            known = self.standing.has(found.client_id, found.seq, record.id)
            if known or found.client_id != record.key or not DECLARED[record.topic].by_client:
                return
            payload = envelope.decode(record) if not believed or record.type == types.BudgetSpent.type_name else None
            if not believed and payload is not None:
                self.identities.authenticate(record, payload)
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError, InvalidEventError, KeyError):
            return
        self.standing.learn(found.client_id, found.seq, record.id)
        if record.type in ANSWERS and found.instruction_id is not None:
            self.uploads.answered(found.client_id, found.instruction_id)
        if isinstance(payload, types.BudgetSpent):
            self.standing.spent(payload)

    def _take(self, entries: list[Entry], position: Position, taken: threading.Event) -> None:
        self._ring.add(entries, position)
        taken.set()
        for event in self._moved:
            event.set()
        everyone = any(entry.audience is EVERYONE for entry in entries)
        if everyone:
            self.wake()
            return
        for name in {None, *(name for entry in entries for name in entry.audience)} if entries else ():
            for event in self._waiting.get(name, ()):
                event.set()


def _wires(entries: Sequence[Entry]) -> list[bytes]:
    return [entry.wire for entry in entries if entry.wire]


def _latest(one: Position, other: Position) -> Position:
    return Position({name: max(one.offsets.get(name, 0), other.offsets.get(name, 0)) for name in {*one.offsets, *other.offsets}})
