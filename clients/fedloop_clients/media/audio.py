"""What is said in a recording, by a Whisper model in a folder that the user names (faster-whisper, the extra `audio`)."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from fedloop_events.errors import UsageError

from fedloop_clients.media.files import MediaError, check_length, missing, opened

RATE: Final = 16_000
"""Samples a second, as Whisper takes them."""
_NEEDED: Final = ("model.bin", "config.json", "tokenizer.json")
"""Without the last one faster-whisper would download it."""


class Transcriber(Protocol):
    """Turns speech into text."""

    def said(self, samples: Any) -> str:
        """What is said in mono samples from -1 to 1, float32 at `RATE`; "" where nobody speaks."""


class Whisper:
    """A model that faster-whisper reads, in `folder`; loaded when it is first needed. Raises `UsageError` if it is not there."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._lock = folder, threading.Lock()
        self._model: Any = None

    def said(self, samples: Any) -> str:
        with self._lock:
            segments, _ = self._loaded().transcribe(
                samples, temperature=0.0, vad_filter=True, condition_on_previous_text=False, without_timestamps=True
            )
            return " ".join(each.text.strip() for each in segments).strip()

    def _loaded(self) -> Any:
        if self._model is None:
            absent = [name for name in _NEEDED if not (self._folder / name).is_file()]
            if absent:
                raise UsageError(
                    f"the speech model {self._folder} has no {', '.join(absent)}",
                    hint="name the folder of a Whisper model that was converted for faster-whisper",
                )
            try:
                from faster_whisper import WhisperModel
            except ImportError as error:
                raise missing("feedback by audio", error.name, "audio") from None
            try:
                self._model = WhisperModel(str(self._folder), device="cpu", compute_type="int8", local_files_only=True)
            except (RuntimeError, ValueError) as error:
                raise UsageError(f"the speech model {self._folder} cannot be loaded", cause=str(error)) from None
        return self._model


def samples(what: str, data: bytes) -> Any:
    """The sound of a file as a `Transcriber` takes it; of a film without sound, none. Raises `MediaError`."""
    with opened(what, data) as container:
        if not container.streams.audio:
            if what == "video":
                return np.zeros(0, np.float32)
            raise MediaError(f"the {what} has no sound")
        return _decoded(what, container)


def _decoded(what: str, container: Any) -> Any:
    import av

    resampler, pieces, count = av.AudioResampler(format="s16", layout="mono", rate=RATE), [], 0
    for frame in _frames(container):
        for each in resampler.resample(frame):
            pieces.append(each.to_ndarray()[0])
            count += len(pieces[-1])
        check_length(what, count / RATE)
    return (np.concatenate(pieces) if pieces else np.zeros(0)).astype(np.float32) / 32768


def _frames(container: Any) -> Any:
    yield from container.decode(audio=0)
    yield None  # what the resampler still holds
