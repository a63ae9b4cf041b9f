"""The text of what a user says, shows and films: one comment, in the order audio, image, video."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

from fedloop_events.errors import UsageError
from msgspec import Struct

from fedloop_clients.media.audio import Transcriber, Whisper, samples
from fedloop_clients.media.files import File, check_length, check_pixels, opened, read
from fedloop_clients.media.image import RapidOcr, Reader, pixels

MAX_PICTURES: Final = 12
"""Of a film, evenly spread over its length."""
EVERY_S: Final = 5.0
"""How far apart they are at least."""


class Media(Struct, frozen=True):
    """What a user gives beside words."""

    audio: File | None = None
    image: File | None = None
    video: File | None = None


class MediaTexts:
    """The engines of one device, loaded when they are first needed. Nothing that it reads is kept."""

    def __init__(self, transcriber: Transcriber | None, reader: Reader) -> None:
        self._transcriber, self._reader = transcriber, reader

    def of(self, media: Media) -> str:
        """What is said and written in it, a line each; "" if that is nothing.

        Raises `UsageError`: for a file that cannot be read, is not what it is given as or beyond a bound (`MediaError`), and
        where an engine or its model is not there.
        """
        lines: dict[str, str] = {}
        for line in self._lines(media):
            lines.setdefault(line.casefold(), line)
        return "\n".join(lines.values())

    def _lines(self, media: Media) -> Iterator[str]:
        if media.audio is not None:
            yield from self._said("audio", samples("audio", read("audio", media.audio)))
        if media.image is not None:
            yield from self._written(pixels(read("image", media.image)))
        if media.video is not None:
            data = read("video", media.video)
            yield from self._said("video", samples("video", data))
            for picture in pictures(data):
                yield from self._written(picture)

    def _said(self, what: str, sound: Any) -> Iterator[str]:
        if not len(sound):
            return
        if self._transcriber is None:
            raise UsageError(
                f"no speech model says what is said in the {what}",
                hint="name the folder of a Whisper model for faster-whisper: Settings(speech_model=...), or --speech-model",
            )
        if text := self._transcriber.said(sound):
            yield text

    def _written(self, picture: Any) -> Iterator[str]:
        yield from filter(None, (line.strip() for line in self._reader.written(picture)))


def engines(speech_model: Path | None) -> MediaTexts:
    """Those that are kept: faster-whisper with the model in that folder, if one is named, and RapidOCR."""
    return MediaTexts(None if speech_model is None else Whisper(speech_model), RapidOcr())


def pictures(data: bytes) -> Iterator[Any]:
    """Pictures of a film, each [height, width, 3] of red, green and blue; of sound alone none. Raises `MediaError`."""
    with opened("video", data) as container:
        if not container.streams.video:
            return
        stream = container.streams.video[0]
        check_pixels("video", stream.codec_context.width, stream.codec_context.height)
        length_s = container.duration / 1e6 if container.duration else 0.0
        check_length("video", length_s)
        apart_s, due_s, taken = max(EVERY_S, length_s / MAX_PICTURES), 0.0, 0
        for frame in container.decode(stream):
            check_length("video", frame.time or 0.0)
            check_pixels("video", frame.width, frame.height)
            if (frame.time or 0.0) >= due_s and taken < MAX_PICTURES:
                due_s, taken = (frame.time or 0.0) + apart_s, taken + 1
                yield frame.to_ndarray(format="rgb24")
