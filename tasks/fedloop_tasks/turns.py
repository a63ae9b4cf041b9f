"""A conversation, before it is tokens."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct

Role = Literal["system", "user", "assistant"]


class Turn(Struct, frozen=True):
    """What one side has written."""

    role: Role
    content: str
