"""What every command needs: who is enrolled, and a reason that can stand in the log."""

from __future__ import annotations

from typing import Final

from fedloop_events.errors import UsageError
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.writer import EventWriter

MAX_REASON_CHARS: Final = 200


def identities(writer: EventWriter) -> Identities:
    """The deployment that the log holds, and its clients."""
    found = Identities()
    Reader(writer.log, found).catch_up()
    return found


def check_reason(text: str) -> str:
    """`text`, if it is a line that a log can hold and a terminal show. Raises `UsageError`."""
    if len(text) > MAX_REASON_CHARS or not text.isprintable():
        raise UsageError(f"a reason is one line of at most {MAX_REASON_CHARS} characters")
    return text
