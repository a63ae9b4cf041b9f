"""The file that a server's held-out set is kept in."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final, TypeVar

import msgspec
from fedloop_events.errors import UsageError

FILE: Final = "heldout.json"
_AGAIN: Final = "run `fedloop server init` again as before"

T = TypeVar("T")


def read(folder: Path, kind: type[T]) -> tuple[T, str]:
    """The held-out set in `folder`, and the SHA-256 of its file. Raises `UsageError` if there is none that can be read."""
    path = folder / FILE
    try:
        data = path.read_bytes()
        return msgspec.json.decode(data, type=kind), hashlib.sha256(data).hexdigest()
    except FileNotFoundError:
        raise UsageError(f"there is no held-out set {path}", hint=f"{_AGAIN}: it takes one in") from None
    except (OSError, msgspec.MsgspecError) as error:
        raise UsageError(
            f"the held-out set {path} cannot be read", cause=str(error), hint=f"move it away, then {_AGAIN}: it takes one in"
        ) from None
