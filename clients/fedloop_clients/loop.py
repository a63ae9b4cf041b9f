"""The agent's loop: publish what users said, say that the device is up, answer what the server asks, again and again.

Every step is safe to repeat: what is due stands in the store, and what was done stands in the log.
"""

from __future__ import annotations

import fcntl
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal

from fedloop_events import types
from fedloop_events.blobs.store import BlobStore
from fedloop_events.errors import PolicyError, UnreachableError
from fedloop_events.logs.port import EventLog
from fedloop_events.masked import MaskedText
from msgspec import Struct

from fedloop_clients.device_view import DeviceView
from fedloop_clients.enrolment import Identity
from fedloop_clients.examples import Examples
from fedloop_clients.interactions import Interactions
from fedloop_clients.outbox import Outbox, SuspendedError
from fedloop_clients.publishing import Publisher
from fedloop_clients.store import Store

if TYPE_CHECKING:
    from fedloop_clients.instructions import App, InstructionHandler

FOLLOWING: Final = "following"
"""Name of the followed state in the store."""
IDLE_S: Final = 0.25
"""How soon an idle loop sees what another process has captured, and that it should stop; new events wake it at once."""
RETRY_S: Final = 2.0
ALONE_TIMEOUT_S: Final = 5.0


class RevokedError(PolicyError):
    """The operator has revoked this client: nothing that it says counts any more."""


class Settings(Struct, frozen=True, kw_only=True):
    """How a device takes part.

    `heartbeat_s` is how often it says that it is up; `rounds_per_day` bounds what a server can make it spend in a day, by the
    log's clock; with fewer than `min_examples` it declines a round. `model_dir` is where base models lie that are not installed
    packages.
    """

    model: str = types.DEFAULT_MODEL
    model_dir: Path | None = None
    heartbeat_s: float = 30.0
    rounds_per_day: int = 48
    min_examples: int = 1


class Status(Struct, frozen=True):
    """Where a device stands.

    `waiting` pieces of feedback are not masked yet, `failed` (by reason) could not be and stay on the device until the next run;
    `unsent` events are not in the log yet; `answers` counts instructions by outcome; `problem` is why the loop cannot go on now.
    """

    client_id: str
    release: str | None
    waiting: int
    published: int
    failed: dict[str, int]
    unsent: int
    examples: int
    answers: dict[str, int]
    spends: int
    epsilon_spent: float
    epsilon: float | None
    delta: float
    suspended: str | None
    problem: str = ""

    @property
    def settled(self) -> bool:
        """Whether everything that users said, and that can be masked, is in the log."""
        return not (self.waiting or self.unsent)


def read_status(
    identity: Identity,
    store: Store,
    following: DeviceView,
    interactions: Interactions,
    examples: Examples,
    model: str,
    problem: str = "",
) -> Status:
    """The status as of what `following` has read."""
    me, counts, spec = identity.client_id, interactions.counts(), following.releases.models.get(model)
    suspended, release = following.ledger.suspended(me), following.releases.current(model)
    spends = len(following.ledger.spends(me))
    return Status(
        client_id=me,
        release=release.release if release else None,
        waiting=counts.get("captured", 0),
        published=counts.get("published", 0),
        failed=interactions.failures(),
        unsent=store.rows("SELECT count(*) FROM outbox WHERE event IS NOT NULL")[0][0],
        examples=examples.count(spec.labels if spec else ()),
        answers=dict(store.rows("SELECT outcome, count(*) FROM answers GROUP BY outcome")),
        spends=spends,
        epsilon_spent=following.ledger.epsilon(me, identity.delta) if spends else 0.0,
        epsilon=identity.epsilon,
        delta=identity.delta,
        suspended=suspended.reason if suspended else None,
        problem=problem,
    )


class Loop:
    """One device's loop. Under `reading` alone is `following` changed, which other threads read; `mask` raises `MaskingError`."""

    def __init__(
        self,
        identity: Identity,
        settings: Settings,
        store: Store,
        log: EventLog,
        blobs: BlobStore,
        following: DeviceView,
        reading: threading.Lock,
        interactions: Interactions,
        examples: Examples,
        mask: Callable[[str], MaskedText],
    ) -> None:
        self._identity, self._settings, self._store, self._log, self._blobs = identity, settings, store, log, blobs
        self._following, self._reading = following, reading
        self._interactions, self._examples, self._outbox = interactions, examples, Outbox(store, identity.writer(log))
        self._publisher = Publisher(identity, settings.model, store, interactions, self._outbox, mask)
        self._problem = ""
        self._news = True  # whether the log may hold what was not read
        self._seen: tuple[int, float] | None = None  # what the last heartbeat said, and when

    def run(self, app: App, stop: threading.Event, until: Callable[[Status], bool] | None) -> None:
        """See `Agent.run`."""
        from fedloop_events.blobs.reader import TensorReader

        from fedloop_clients.instructions import InstructionHandler

        answering = InstructionHandler(
            self._identity,
            self._store,
            self._outbox,
            self._following,
            self._log,
            TensorReader(self._blobs, keep_bytes=0),
            app,
            catch_up=self._catch_up,
            rounds_per_day=self._settings.rounds_per_day,
        )
        with _alone(self._store.path.with_name("agent.lock")):
            begun = False
            while not stop.is_set():
                try:
                    begun = begun or self._begin()
                    self._pass(answering)
                    self._problem = ""
                except UnreachableError as error:
                    self._problem = error.message
                if until is not None and until(self._status()):
                    return
                self._wait(stop)

    def _begin(self) -> bool:
        """Before anything is said: a store that was restored from a backup learns here what it has said already."""
        self._following.check_end(self._log)
        self._catch_up(0.0)
        self._interactions.retry_failed()
        return True

    def _pass(self, answering: InstructionHandler) -> None:
        if self._outbox.flush(self._log) or self._news:
            self._catch_up(0.0)
        while self._publisher.publish():
            self._outbox.flush(self._log)
        self._heartbeat()
        self._outbox.flush(self._log)
        for instruction in answering.due():
            answering.answer(instruction)
            self._outbox.flush(self._log)

    def _wait(self, stop: threading.Event) -> None:
        self._news = True
        if self._problem:
            stop.wait(RETRY_S)
            return
        with suppress(UnreachableError):  # the next pass meets it again, and says so
            if not self._interactions.counts().get("captured"):
                self._news = self._following.wait(self._log, IDLE_S)

    def _status(self) -> Status:
        return read_status(
            self._identity,
            self._store,
            self._following,
            self._interactions,
            self._examples,
            self._settings.model,
            self._problem,
        )

    def _catch_up(self, wait_s: float) -> None:
        """Read to the end of the log, and keep what that changes, together with how far it was read."""
        if wait_s:
            self._following.wait(self._log, wait_s)
        with self._reading:
            self._following.catch_up(self._log)
            if self._following.changed:
                self._keep()
        self._check_standing()

    def _keep(self) -> None:
        following = self._following
        with self._store.transaction():
            self._outbox.reconcile(following.mine)
            for feedback_id in following.published:
                self._interactions.published(feedback_id)
            self._store.keep(FOLLOWING, following.to_state())
        following.mine.clear()
        following.published.clear()
        following.changed = False

    def _check_standing(self) -> None:
        me = self._identity.client_id
        client = self._following.identities.clients.get(me)
        if client is not None and client.revoked:
            raise RevokedError(f"client {me} has been revoked", hint="nothing it says counts; ask the operator why")
        if evidence := self._following.ledger.suspended(me):
            raise SuspendedError(
                f"client {me} is suspended: event {evidence.event_id} does not continue its chain of spends ({evidence.reason})",
                cause="two copies of the device's store have been used",
                hint="revoke this client and enrol the device under a new name, with a new store",
            )

    def _heartbeat(self) -> None:
        """Say that the device is up: at first, at times, and when the number of examples has another power of two."""
        spec = self._following.releases.models.get(self._settings.model)
        count = self._examples.count(spec.labels if spec else ())
        at_least, now = 1 << count.bit_length() - 1 if count else 0, time.monotonic()
        if self._seen is not None and self._seen[0] == at_least and now < self._seen[1] + self._settings.heartbeat_s:
            return
        me = self._identity
        self._outbox.add(
            lambda seq: types.ClientSeen(
                origin=me.origin, client_id=me.client_id, seq=seq, examples_at_least=at_least, device=_device()
            )
        )
        self._seen = (at_least, now)


def _device() -> Literal["cpu", "cuda", "mps"]:
    """What this process trains on; "cpu" until it has loaded torch."""
    torch = sys.modules.get("torch")
    if torch is None or getattr(torch.__spec__, "_initializing", False):  # another thread may be loading it
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"


@contextmanager
def _alone(path: Path) -> Iterator[None]:
    """Hold the lock in `path`, which the kernel releases when the process ends, however it ends."""
    deadline = time.monotonic() + ALONE_TIMEOUT_S
    with path.open("a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise UnreachableError(
                        f"another process runs the device in {path.parent}", hint="stop it first; feedback needs no second one"
                    ) from None
                time.sleep(0.05)
        yield
