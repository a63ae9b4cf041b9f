"""The pace of one device among many: when it checks in, and when it tries again, so that not all do so at once."""

from __future__ import annotations

import hashlib
import random
from typing import Final

RETRY_MAX_S: Final = 30.0
"""Longest wait between two tries: so long a device may stay away after the log is back."""


class Backoff:
    """Waits between tries that fail, drawn from nothing to a bound that doubles with each failure ("full jitter", Brooker, 2015).

    Devices that lost their connection in the same moment come back spread over the bound.
    """

    def __init__(self, first_s: float, source: random.Random) -> None:
        self._first_s, self._source, self._failures = first_s, source, 0

    def failed(self) -> float:
        """A try has failed: seconds to wait before the next one."""
        bound_s = min(self._first_s * 2.0 ** min(self._failures, 30), RETRY_MAX_S)
        self._failures += 1
        return self._source.uniform(0.0, bound_s)

    def succeeded(self) -> None:
        self._failures = 0


class Heartbeats:
    """When a device reports that it is up: each `every_s` seconds, when what it reports has changed, and at first with whatever
    else it appends.

    The regular ones come at a time of its own, a function of its name: devices that are started together check in spread over the
    whole period from the first time on. Times are a monotonic clock's.
    """

    def __init__(self, client_id: str, every_s: float) -> None:
        drawn = int.from_bytes(hashlib.sha256(client_id.encode()).digest()[:8], "big")
        self._every_s, self._first_s = every_s, every_s * (drawn + 1) / 2**64
        self._reported: int | None = None
        self._next_s, self._sent = 0.0, False

    def begin(self, now_s: float, reported: int | None) -> None:
        """The device starts; `reported` is its last report in the log, if there is any."""
        self._reported, self._next_s = reported, now_s + self._first_s

    def due(self, now_s: float, report: int, *, appends: bool = False) -> bool:
        """Whether to report. `appends`: it has something else to append, so that it connects to the log anyway."""
        return report != self._reported or now_s >= self._next_s or (appends and not self._sent)

    def sent(self, now_s: float, report: int) -> None:
        """It has reported; one that is sent in between leaves the device's own times as they are."""
        self._sent = True
        if now_s >= self._next_s:
            late_s = (now_s - self._next_s) % self._every_s if self._every_s else 0.0
            self._next_s = now_s - late_s + self._every_s
        self._reported = report
