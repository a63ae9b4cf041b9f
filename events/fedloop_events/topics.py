"""The topics of the log (names, keys, retention: docs/architecture.md)."""

from __future__ import annotations

from typing import Final

CLIENTS: Final = "clients"
FEEDBACK: Final = "feedback"
ROUNDS: Final = "rounds"
UPDATES: Final = "updates"
RELEASES: Final = "releases"
AUDIT: Final = "audit"
QUARANTINE: Final = "quarantine"

ALL: Final = (CLIENTS, FEEDBACK, ROUNDS, UPDATES, RELEASES, AUDIT, QUARANTINE)
