"""A conversation, before it is tokens."""

from __future__ import annotations

from fedloop_tasks.turns import Turn as Turn
