"""A conversation, before it is tokens."""

from __future__ import annotations

from typing import Literal

from msgspec import Struct


class Turn(Struct, frozen=True):
    """What one side has written."""

    role: Literal["system", "user", "assistant"]
    content: str
