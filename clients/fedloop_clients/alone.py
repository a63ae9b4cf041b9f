"""At most one process runs a device: whoever does holds a lock beside the store."""

from __future__ import annotations

import fcntl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fedloop_events.errors import UnreachableError
from fedloop_events.files import reason

from fedloop_clients.store_file import StoreError, cannot_write

TIMEOUT_S: Final = 5.0
LOCK_FILE: Final = "agent.lock"


def runs(store: Path) -> bool:
    """Whether a loop of any process runs the device of this store now."""
    try:
        with store.with_name(LOCK_FILE).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # none ever did, or nobody can tell
        return False
    return False


@contextmanager
def alone(store: Path) -> Iterator[None]:
    """Run the device of this store, as long as the block lasts; the kernel lets go when the process ends, however it ends.

    Raises `UnreachableError` if another process keeps running it, `StoreError` if the lock cannot be made.
    """
    path = store.with_name(LOCK_FILE)
    deadline = time.monotonic() + TIMEOUT_S
    try:
        opened = path.open("a")
    except OSError as error:
        raise cannot_write(path) or StoreError(f"the lock {path} cannot be made", cause=reason(error, path)) from None
    with opened as file:
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
