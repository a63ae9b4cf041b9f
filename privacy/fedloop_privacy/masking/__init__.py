"""Masking of personal data on the device: fail-closed, offline, reversible by nobody.

The heavy imports (spaCy, Presidio, the lists of names) happen when `Masker` is first asked for.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from fedloop_privacy.masking.errors import MaskingError
from fedloop_privacy.masking.spans import Span

if TYPE_CHECKING:
    from fedloop_privacy.masking.masker import Masker

__all__ = ["Masker", "MaskingError", "Span"]


def __getattr__(name: str) -> Any:
    if name == "Masker":
        from fedloop_privacy.masking.masker import Masker

        return Masker
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
