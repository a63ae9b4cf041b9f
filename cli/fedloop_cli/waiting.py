"""Showing what rounds wait for, while they do."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Final

import msgspec

from fedloop_cli import console

if TYPE_CHECKING:
    from fedloop_server.operations.awaiting import Awaited

AT_ONCE_S: Final = 5.0
"""A server that has just decided something decides the next thing in less: nobody waits for it yet."""
AGAIN_S: Final = 30.0
"""After so long the same is said again, with the seconds that are left by now."""


def document(awaited: Awaited) -> dict[str, Any]:
    """For --json."""
    found: dict[str, Any] = msgspec.to_builtins(awaited)
    return found | {"hint": awaited.hint}


class Waiting:
    """Prints on standard error what is waited for: when that changes, and every `AGAIN_S` seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._subject: tuple[object, ...] = ()
        self._shown_s = 0.0

    def show(self, awaited: Awaited) -> None:
        if awaited.what == "server" and awaited.decided_s is not None and awaited.decided_s < AT_ONCE_S:
            return
        now_s = self._clock()
        if awaited.subject != self._subject or (awaited.what != "nothing" and now_s - self._shown_s >= AGAIN_S):
            self._subject, self._shown_s = awaited.subject, now_s
            console.note(f"waiting: {console.printable(awaited.line)}")
            if awaited.hint:
                console.note(f"hint: {console.printable(awaited.hint)}")
