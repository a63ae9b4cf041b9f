"""Files of sound, pictures and films: read whole, within bounds, and opened in a way that reaches nothing else."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from fedloop_events.errors import UsageError
from fedloop_events.files import reason

File = str | Path | bytes
"""A path, or what stands in the file."""
MAX_BYTES: Final = 64 << 20
MAX_S: Final = 300.0
"""How long sound and films may be."""
MAX_PIXELS: Final = 40_000_000
"""Of a picture, or of one of a film: about 8,000 by 5,000."""
_FORMATS: Final = "aac,amr,avi,caf,flac,flv,matroska,webm,mov,mp4,m4a,3gp,3g2,mj2,mp3,mpeg,mpegts,ogg,wav,w64,aiff,au"


class MediaError(UsageError):
    """A file that is not what it is given as, or more than a device works through."""


def missing(what: str, package: str | None, extra: str) -> UsageError:
    """The packages of an extra are not installed."""
    return UsageError(f"{what} needs the package {package}, which is not installed", hint=f"pip install 'fedloop[{extra}]'")


def read(what: str, given: File) -> bytes:
    """What stands in the file. Raises `MediaError`."""
    if isinstance(given, bytes):
        data = given
    else:
        path = Path(given)
        try:
            with path.open("rb") as file:
                data = file.read(MAX_BYTES + 1)
        except OSError as error:
            raise MediaError(f"the {what} {path} cannot be read", cause=reason(error, path)) from None
    if len(data) > MAX_BYTES:
        raise MediaError(f"the {what} has more than {MAX_BYTES:,} bytes", hint="give a shorter one")
    return data


@contextmanager
def opened(what: str, data: bytes) -> Iterator[Any]:
    """PyAV's container of a file; what goes wrong with it within the block is a `MediaError`.

    No playlist is one of the formats, and no other file or address can be opened from within it.
    """
    try:
        import av
        from av.error import FFmpegError
    except ImportError as error:
        raise missing(f"feedback by {what}", error.name, "audio") from None
    try:
        options = {"protocol_whitelist": "none", "format_whitelist": _FORMATS}
        with av.open(io.BytesIO(data), options=options, metadata_errors="ignore") as container:
            yield container
    except FFmpegError as error:
        raise MediaError(f"the {what} is no file that can be played", cause=error.strerror or "") from None


def check_length(what: str, seconds: float) -> None:
    """Raises `MediaError`."""
    if seconds > MAX_S:
        raise MediaError(f"the {what} is longer than {MAX_S:g} seconds", hint="give a shorter one")


def check_pixels(what: str, width: int, height: int) -> None:
    """Raises `MediaError`."""
    if width * height > MAX_PIXELS:
        raise MediaError(f"the {what} has {width:,} by {height:,} pixels, more than {MAX_PIXELS:,}", hint="make it smaller")
