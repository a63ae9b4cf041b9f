"""The one error of masking."""

from __future__ import annotations

from fedloop_events.errors import FedloopError


class MaskingError(FedloopError):
    """A text could not be masked, so nothing of it may be used. Never holds anything of the text."""
