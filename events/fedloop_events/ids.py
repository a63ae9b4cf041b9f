"""Event ids: UUIDs as 32 hexadecimal digits. New ones rise with time (they keep an index flat), derived ones are a function of
what they name (they make a decision happen once)."""

from __future__ import annotations

import hashlib
import os
import threading
import time

_lock = threading.Lock()
_last = 0


def new_id() -> str:
    """A UUIDv7 (RFC 9562, section 5.7), rising within this process: 48 bits of milliseconds, 12 of a counter, 62 random."""
    global _last
    with _lock:
        _last = max(_last + 1, time.time_ns() // 1_000_000 << 12)
        stamp = _last
    milliseconds, counter = stamp >> 12, stamp & 0xFFF
    random = int.from_bytes(os.urandom(8), "big") & (1 << 62) - 1
    return f"{milliseconds << 80 | 7 << 76 | counter << 64 | 2 << 62 | random:032x}"


def derived_id(*parts: str | int) -> str:
    """A UUIDv8 (RFC 9562, section 5.8) that is a function of `parts`: the same decision has the same id, whoever makes it."""
    digest = hashlib.sha256("\x00".join(map(str, parts)).encode()).digest()
    value = int.from_bytes(digest[:16], "big")
    value = value & ~(0xF << 76) | 8 << 76
    value = value & ~(3 << 62) | 2 << 62
    return f"{value:032x}"
