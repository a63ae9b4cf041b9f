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
    """When a device reports that it is up: at first, when what it reports has changed, and each `every_s` seconds.

    The regular ones come at a time of its own, a function of its name: devices that are started together check in spread over the
    whole period from the second time on. Times are a monotonic clock's.
    """

    def __init__(self, client_id: str, every_s: float) -> None:
        drawn = int.from_bytes(hashlib.sha256(client_id.encode()).digest()[:8], "big")
        self._every_s, self._first_s = every_s, every_s * (drawn + 1) / 2**64
        self._reported: int | None = None
        self._next_s = 0.0

    def due(self, now_s: float, report: int) -> bool:
        return report != self._reported or now_s >= self._next_s

    def sent(self, now_s: float, report: int) -> None:
        """It has reported; a change that is reported in between leaves the device's own times as they are."""
        if self._reported is None:
            self._next_s = now_s + self._first_s
        elif now_s >= self._next_s:
            late_s = (now_s - self._next_s) % self._every_s if self._every_s else 0.0
            self._next_s = now_s - late_s + self._every_s
        self._reported = report
