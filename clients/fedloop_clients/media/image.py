"""What is written in a picture, by RapidOCR, whose weights come with it (the extra `image`)."""

from __future__ import annotations

import io
import threading
import warnings
from typing import Any, Final, Protocol

import numpy as np

from fedloop_clients.media.files import MediaError, check_pixels, missing

_FORMATS: Final = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""Others may start other programs."""


class Reader(Protocol):
    """Turns pictures into text."""

    def written(self, pixels: Any) -> list[str]:
        """The lines that are written in a picture [height, width, 3] of red, green and blue, uint8."""


class RapidOcr:
    """Loaded when it is first needed."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._engine: Any = None

    def written(self, pixels: Any) -> list[str]:
        with self._lock:
            if self._engine is None:
                try:
                    from rapidocr_onnxruntime import RapidOCR
                except ImportError as error:
                    raise missing("feedback by image", error.name, "image") from None
                self._engine = RapidOCR()
            found, _ = self._engine(np.ascontiguousarray(pixels[:, :, ::-1]))
        return [text for _, text, _ in found or ()]


def pixels(data: bytes) -> Any:
    """The picture in a file as a `Reader` takes it, the right way up. Raises `MediaError`."""
    try:
        from PIL import Image, ImageOps
    except ImportError as error:
        raise missing("feedback by image", error.name, "image") from None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the bound here is our own
            with Image.open(io.BytesIO(data), formats=_FORMATS) as image:
                check_pixels("image", *image.size)
                return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Image.DecompressionBombError:
        raise MediaError("the image has more pixels than can be read", hint="make it smaller") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise MediaError("the image is no picture that can be read", cause=type(error).__name__, hint=_HINT) from None


_HINT: Final = f"give one of {', '.join(_FORMATS)}"
