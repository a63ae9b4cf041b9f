"""The agent's loop: publish feedback, report that the device is up, answer instructions, again and again.

Every step is safe to repeat: what is due stands in the store, and what was done stands in the log.
"""

from __future__ import annotations

import random
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Final, Literal

from fedloop_events import types
from fedloop_events.errors import BlobError, PolicyError, UnreachableError
from fedloop_events.masked import MaskedText

from fedloop_clients.alone import alone
from fedloop_clients.device import Device, Status
from fedloop_clients.gate import Apps
from fedloop_clients.instructions import InstructionHandler
from fedloop_clients.outbox import ENROL_ANEW, SuspendedError
from fedloop_clients.pace import Backoff, Heartbeats
from fedloop_clients.publishing import Publisher
from fedloop_clients.store_file import NotWritableError

IDLE_S: Final = 0.25
"""How soon an idle loop sees what another process has captured, and that it should stop; new events wake it at once."""
RETRY_S: Final = 2.0
"""Longest wait after the first try that fails; `Backoff` says how it goes on."""


class RevokedError(PolicyError):
    """The operator has revoked this client: no event of its own counts any more."""


class Loop:
    """One device's loop. Under `reading` alone is its view changed, which other threads read; `mask` raises `MaskingError`."""

    def __init__(
        self, device: Device, apps: Apps, mask: Callable[[Sequence[str]], list[MaskedText]], reading: threading.Lock
    ) -> None:
        self._device, self._apps, self._reading = device, apps, reading
        self._publisher = Publisher(device, mask)
        self._problem = ""
        self._news = True  # whether the log may hold what was not read
        self._heartbeats = Heartbeats(device.identity.client_id, device.settings.heartbeat_s)
        self._backoff = Backoff(RETRY_S, random.SystemRandom())

    def run(self, stop: threading.Event, until: Callable[[Status], bool] | None) -> None:
        """See `Agent.run`."""
        handler = InstructionHandler(self._device, self._apps, self._catch_up)
        with alone(self._device.store.path):
            begun, first = False, True
            while not stop.is_set():
                try:
                    begun = begun or self._begin()
                    self._pass(handler)
                    self._problem = ""
                    self._backoff.succeeded()
                except UnreachableError as error:
                    self._problem = error.message
                except NotWritableError as error:
                    if first:
                        raise
                    self._problem = error.message
                first = False
                if until is not None and until(self._device.status(self._problem)):
                    return
                self._wait(stop)

    def _begin(self) -> bool:
        """Before anything is appended: a store that was restored from a backup learns here what it has appended already."""
        device = self._device
        device.view.check_end(device.log)
        self._catch_up(0.0)
        with device.store.transaction():  # once what was published under an id that was given is known
            device.interactions.derive_ids(device.identity.derived_id)
            for feedback_id in device.view.published:
                device.interactions.published(feedback_id)
        device.interactions.retry_failed()
        client = device.view.identities.clients.get(device.identity.client_id)
        self._heartbeats.begin(time.monotonic(), None if client is None else client.examples_at_least)
        return True

    def _pass(self, handler: InstructionHandler) -> None:
        device = self._device
        appended = device.flush()
        if appended or self._news:
            self._catch_up(0.0)
        while self._publisher.publish():
            appended += device.flush()
        self._heartbeat(appends=appended > 0)
        device.flush()
        for instruction in handler.due():
            handler.answer(instruction)
            device.flush()

    def _wait(self, stop: threading.Event) -> None:
        self._news = True
        if self._problem:
            stop.wait(self._backoff.failed())
            return
        with suppress(UnreachableError):  # the next pass meets it again, and reports it
            if not (self._device.interactions.counts().get("captured") or self._device.retractions.due()):
                self._news = self._device.view.wait(self._device.log, IDLE_S)

    def _catch_up(self, wait_s: float) -> None:
        """Read to the end of the log, and keep what that changes, together with how far it was read."""
        view, log = self._device.view, self._device.log
        if wait_s:
            view.wait(log, wait_s)
        with self._reading:
            view.catch_up(log)
            changed = view.changed
            if changed:
                self._device.keep(view)
        self._check_standing()
        if changed:
            with suppress(BlobError, UnreachableError):  # until then the release before it answers
                self._device.keep_release()

    def _check_standing(self) -> None:
        me, view = self._device.identity.client_id, self._device.view
        client = view.identities.clients.get(me)
        if client is not None and client.revoked:
            raise RevokedError(f"client {me} has been revoked", hint="none of its events counts; ask the operator why")
        if evidence := view.ledger.suspended(me):
            raise SuspendedError(
                f"client {me} is suspended: event {evidence.event_id} does not continue its chain of spends ({evidence.reason})",
                cause="two copies of the device's store have been used",
                hint=ENROL_ANEW,
            )

    def _heartbeat(self, *, appends: bool) -> None:
        """Report that the device is up, at its times, and when the number of examples has another power of two."""
        me, count = self._device.identity, self._device.count_examples()
        at_least, now = 1 << count.bit_length() - 1 if count else 0, time.monotonic()
        if not self._heartbeats.due(now, at_least, appends=appends):
            return
        self._device.outbox.add(
            lambda seq: types.ClientSeen(
                origin=me.origin, client_id=me.client_id, seq=seq, examples_at_least=at_least, device=_accelerator()
            )
        )
        self._heartbeats.sent(now, at_least)


def _accelerator() -> Literal["cpu", "cuda", "mps"]:
    """What this process trains on; "cpu" until it has loaded torch."""
    torch = sys.modules.get("torch")
    if torch is None or getattr(torch.__spec__, "_initializing", False):  # another thread may be loading it
        return "cpu"
    if torch.cuda.is_available():
        return "cuda"
    return "mps" if torch.backends.mps.is_available() else "cpu"
