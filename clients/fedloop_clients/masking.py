"""Masking on the device: the owner's masker or the one that is installed, loaded when it is first needed."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Protocol, runtime_checkable

from fedloop_events.masked import MaskedText
from fedloop_privacy.masking import MaskingError


class Masks(Protocol):
    """The masker: `fedloop_privacy.masking.Masker`, with any engine the owner of the device has chosen."""

    def mask(self, text: str) -> MaskedText:
        """Raises `MaskingError`."""


@runtime_checkable
class MasksTogether(Masks, Protocol):
    """A masker that knows a value again in another text."""

    def mask_together(self, texts: Sequence[str]) -> list[MaskedText]:
        """Each text masked, with the same placeholder for the same value in all of them. Raises `MaskingError`."""


class Masking:
    """One masker, used by one thread at a time. It raises `MaskingError`, whatever goes wrong: a masker of the owner's own may
    raise anything, with the text in it."""

    def __init__(self, masker: Masks | None) -> None:
        self._masker = masker
        self._lock = threading.Lock()

    def together(self, texts: Sequence[str]) -> list[MaskedText]:
        """Each text masked; with a masker that can do that, the same value has the same placeholder in all of them."""
        failure = ""
        with self._lock:
            try:
                masker = self._loaded()
                if isinstance(masker, MasksTogether):
                    return list(masker.mask_together(texts))
                return [masker.mask(text) for text in texts]
            except MaskingError:
                raise
            except Exception as error:
                failure = type(error).__name__
        raise MaskingError("the text could not be masked, so nothing of it is used", cause=failure)

    def masked_or_none(self, text: str) -> MaskedText | None:
        """What is not masked now is masked by the loop, or never leaves the device."""
        with suppress(MaskingError):
            return self.together([text])[0]
        return None

    def _loaded(self) -> Masks:
        if self._masker is None:
            from fedloop_privacy.masking import Masker

            self._masker = Masker()
        return self._masker
