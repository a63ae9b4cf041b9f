"""Reading the log for a device whose loop does not run here, in a thread of its own: nobody waits for a log that is away."""

from __future__ import annotations

import threading
from contextlib import suppress
from typing import Final

from fedloop_events.errors import FedloopError

from fedloop_clients.device import VIEW, Device
from fedloop_clients.device_view import DeviceView

THREAD: Final = "fedloop-refresh"
"""Its name. It is a daemon: a log that is away holds up nobody's exit."""
AT_ONCE_S: Final = 0.02
"""How long an answer waits for a log that is reached over a network: what it brings later is for the next answer."""
BESIDE_S: Final = 1.0
"""The same for a file: it is there or not, and a busy machine may need that long."""
FIRST_S: Final = 15.0
"""The same while the device knows no release to answer with."""


class Refresher:
    """Brings a device's view and its release up to date, one reading at a time. Under `reading` alone the view is replaced."""

    def __init__(self, device: Device, reading: threading.Lock, *, beside: bool) -> None:
        self._device, self._reading = device, reading
        self._patience_s = BESIDE_S if beside else AT_ONCE_S
        self._thread: threading.Thread | None = None
        self._changes: object = None
        self.running = 0
        """Loops of this process: while one runs, it alone reads the log."""
        self.problem = ""
        """Why the last reading ended early."""

    def refresh(self) -> None:
        """Take over what another process has kept, and begin to read the log, which may answer at once."""
        self._take_over()
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._read, name=THREAD, daemon=True)
            self._thread.start()
            self._thread.join(self._patience_s)

    def refresh_first(self) -> None:
        """The same for who has nothing to go by, and so waits for longer."""
        self.refresh()
        if self._thread is not None:
            self._thread.join(FIRST_S)

    def _take_over(self) -> None:
        device = self._device
        if self._changes == (changes := device.store.changes()) or not self._reading.acquire(blocking=False):
            return
        try:
            kept = DeviceView(device.identity.client_id, device.identity.server_key, device.store.kept(VIEW))
            ahead = all(kept.position.covers(*each) for each in device.view.position.offsets.items())
            if ahead and kept.position != device.view.position and not self.running:
                device.view = kept
        finally:
            self._reading.release()
        self._changes = changes

    def _read(self) -> None:
        """On a copy of the view, which a log that stops in the middle of an answer holds up alone."""
        self.problem = ""
        try:
            if not self.running:
                self._catch_up()
            self._device.keep_release()
        except FedloopError as error:
            self.problem = error.message

    def _catch_up(self) -> None:
        device, before = self._device, self._device.view
        view = DeviceView(device.identity.client_id, device.identity.server_key, before.to_state())
        view.mine, view.published, view.retracted = [*before.mine], [*before.published], [*before.retracted]
        view.changed = before.changed
        view.catch_up(device.log)
        with self._reading:
            if self.running or device.view is not before:
                return
            if view.changed:
                device.keep(view)
            device.view = view


def refresh_now(device: Device) -> None:
    """Read the log in this thread, as long as it answers: for who has just talked to it."""
    with suppress(FedloopError):
        device.view.catch_up(device.log)
        device.keep(device.view)
        device.keep_release()
