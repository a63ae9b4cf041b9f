"""Every table of a lake."""

from __future__ import annotations

from typing import Final

from fedloop_server.feedback.lake.decided import AUDIT, QUARANTINE, RELEASES, ROUNDS
from fedloop_server.feedback.lake.features import FEATURES
from fedloop_server.feedback.lake.measured import DRIFT, FORECASTS, METRICS
from fedloop_server.feedback.lake.tables import FEEDBACK, TRAINING, WITHDRAWN

EVENTS: Final = (FEEDBACK, TRAINING, METRICS, DRIFT, FORECASTS, ROUNDS, RELEASES, AUDIT, QUARANTINE)
"""Those that an event makes a row of, and nothing else changes but a withdrawal."""
EVERY: Final = (*EVENTS, WITHDRAWN, FEATURES)
