"""The models on this machine: one folder each, in Hugging Face's layout, with a manifest of what it was made from.

A folder appears whole or not at all, and its bytes depend on nothing but what it was made from and the type of the weights.
"""

from __future__ import annotations

import hashlib
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Final

import msgspec
from fedloop_events import files
from fedloop_events.errors import UsageError
from msgspec import Struct
from msgspec.structs import replace

from fedloop_tasks.models import sources, weights
from fedloop_tasks.models.sources import CONFIG, GENERATION, WEIGHTS, Source
from fedloop_tasks.models.tokenizer import TOKENIZER, TOKENIZER_CONFIG, as_json

MANIFEST: Final = "fedloop.json"
FILES: Final = (CONFIG, WEIGHTS, GENERATION, TOKENIZER, TOKENIZER_CONFIG)
_AGAIN: Final = "remove its folder and add it again"
_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_DTYPES: Final = {"f32": "float32", "bf16": "bfloat16"}
_MAX_MANIFEST_BYTES: Final = 65_536
_ROOM_BYTES: Final = 1_048_576
"""For folders and the manifest."""


class Manifest(Struct, frozen=True, forbid_unknown_fields=True):
    """What stands in `fedloop.json`. `files` are the SHA-256 of the others."""

    family: str
    dtype: weights.Dtype
    parameters: int
    licence: str
    chat_template: bool
    source_sha256: str
    files: dict[str, str]

    @property
    def sha256(self) -> str:
        """Of the model: of all that it answers by."""
        return combined(self.files)


class BaseModel(Struct, frozen=True):
    """A model, as it lies in its folder. `new`: it was made just now."""

    name: str
    folder: Path
    manifest: Manifest
    size_bytes: int
    new: bool = False


def default_folder() -> Path:
    """Where the user's models are, unless a folder is named: the place of the user's own data on this system.

    Raises UsageError for a user without a home.
    """
    try:
        home = Path.home()
    except RuntimeError:
        raise UsageError("this user has no home folder for models", hint="name a folder with --model-dir") from None
    if sys.platform == "darwin":
        base = home / "Library" / "Application Support"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_DATA_HOME") or home / ".local" / "share")
    return base / "fedloop" / "models"


def is_name(name: str) -> bool:
    """Whether a model can be called so: no path, nothing hidden."""
    return _NAME.fullmatch(name) is not None


def added(name: str) -> Path | None:
    """The folder of the model that the user has added under that name, which may come from elsewhere."""
    with suppress(UsageError):
        folder = default_folder() / name
        return folder if is_name(name) and (folder / MANIFEST).is_file() else None
    return None


def to_add(name: str) -> bool:
    """Whether an installed package carries this model in a form of which it has still to be made: `add(name)` does that."""
    return added(name) is None and any(any(root.glob("*.gguf")) for root in sources.package_folders(name))


def sha256(folder: Path) -> str:
    """The SHA-256 of the model in `folder`: of names and digests of the files that it answers by. Raises UsageError."""
    return combined(_digests(folder))


def combined(digests: Mapping[str, str]) -> str:
    """As `sha256sum` would list the files, sorted by name."""
    return hashlib.sha256("".join(f"{digests[name]}  {name}\n" for name in sorted(digests)).encode()).hexdigest()


def add(source: str, *, name: str | None = None, model_dir: Path | None = None, dtype: weights.Dtype = "f32") -> BaseModel:
    """Make the model `name` of a GGUF file, a package with one or a Hugging Face folder; one that was made of it before stays.

    Raises UsageError if `source` is no model that can be used, if another model is called so, or if there is no room.
    """
    path, found = sources.find(source)
    name = found if name is None else name
    if not is_name(name):
        raise UsageError(
            f"a model cannot be called {name[:100]!r}",
            hint="give 1 to 100 letters, digits, dots, hyphens and underscores with --name",
        )
    folder = (model_dir or default_folder()) / name
    opened = sources.open_source(path)
    origin = opened.sha256()
    if folder.exists():
        return _same(folder, origin, dtype)
    needed = weights.size_bytes(opened.parts, dtype) + sum(map(len, opened.files.values())) + _ROOM_BYTES
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        free = files.free_bytes(folder)
        if free is not None and free < needed:
            raise UsageError(
                f"the model {name} needs {needed:,} bytes, and {free:,} are free in {folder.parent}",
                hint="make room, or name a folder on another disk with --model-dir",
            )
        files.write_folder(folder, _written(opened, dtype, origin))
    except OSError as error:
        if (folder / MANIFEST).is_file():  # somebody else was faster
            return _same(folder, origin, dtype)
        raise UsageError(
            f"the model's folder {folder} cannot be made",
            cause=files.reason(error, folder),
            hint="name another folder with --model-dir",
        ) from None
    return replace(read(folder), new=True)


def listed(model_dir: Path | None = None) -> list[BaseModel]:
    """The models that were added, by name; a folder without a manifest, such as one that was left half-made, is none."""
    within = model_dir or default_folder()
    names = sorted(each.name for each in within.iterdir() if is_name(each.name)) if within.is_dir() else []
    return [read(within / name) for name in names if (within / name / MANIFEST).is_file()]


def show(name: str, model_dir: Path | None = None) -> BaseModel:
    """The model `name`, each of its files compared with the manifest. Raises UsageError if there is none, or a file differs."""
    within = model_dir or default_folder()
    if not is_name(name) or not (within / name / MANIFEST).is_file():
        known = [each.name for each in listed(model_dir)]
        raise UsageError(
            f"there is no model {name[:100]!r} in {within}", hint=f"there are {', '.join(known)}" if known else "add one first"
        )
    found = read(within / name)
    digests = _digests(found.folder)
    if wrong := [each for each in FILES if digests[each] != found.manifest.files.get(each)]:
        raise UsageError(
            f"the model {name} is damaged",
            cause=f"{wrong[0]} has the SHA-256 {digests[wrong[0]][:12]}, not {found.manifest.files.get(wrong[0], 'none')[:12]}",
            hint=_AGAIN,
        )
    return found


def read(folder: Path) -> BaseModel:
    """What the manifest in `folder` says. Raises UsageError for one that is damaged."""
    try:
        with (folder / MANIFEST).open("rb") as file:
            manifest = msgspec.json.decode(file.read(_MAX_MANIFEST_BYTES), type=Manifest)
        size = sum((folder / each).stat().st_size for each in FILES)
    except (OSError, msgspec.DecodeError) as error:
        raise UsageError(f"the model in {folder} is damaged", cause=str(error), hint=_AGAIN) from None
    return BaseModel(folder.name, folder, manifest, size)


def _same(folder: Path, origin: str, dtype: weights.Dtype) -> BaseModel:
    """The model that is there, if it is of the same source and type."""
    if (folder / MANIFEST).is_file():
        there = show(folder.name, folder.parent)
        if (there.manifest.source_sha256, there.manifest.dtype) == (origin, dtype):
            return there
    raise UsageError(f"{folder} is there already, and is not this model", hint="give another name with --name")


def _written(source: Source, dtype: weights.Dtype, origin: str) -> dict[str, bytes | Iterator[bytes | memoryview]]:
    """The model's files in the order in which they are written: the manifest, which holds their digests, is the last."""
    config = source.config | {"dtype": _DTYPES[dtype]}
    plain = {CONFIG: as_json(dict(sorted(config.items()))), GENERATION: as_json(source.generation), **source.files}
    digests = {name: hashlib.sha256(data).hexdigest() for name, data in plain.items()}

    def tensors() -> Iterator[bytes | memoryview]:
        digest = hashlib.sha256()
        for chunk in weights.written(source.parts, dtype, source.read):
            digest.update(chunk)
            yield chunk
        digests[WEIGHTS] = digest.hexdigest()

    def manifest() -> Iterator[bytes]:
        yield as_json(
            msgspec.to_builtins(
                Manifest(
                    family=str(source.config["model_type"]),
                    dtype=dtype,
                    parameters=weights.size_bytes(source.parts, "f32") // 4,
                    licence=source.licence,
                    chat_template=source.has_chat_template,
                    source_sha256=origin,
                    files=dict(sorted(digests.items())),
                )
            )
        )

    made: dict[str, Any] = {**plain, WEIGHTS: tensors(), MANIFEST: manifest()}
    return made


def _digests(folder: Path) -> dict[str, str]:
    digests = {}
    for name in FILES:
        try:
            with (folder / name).open("rb") as file:
                digests[name] = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise UsageError(f"the model in {folder} is damaged", cause=f"{name}: {error.strerror}", hint=_AGAIN) from None
    return digests
