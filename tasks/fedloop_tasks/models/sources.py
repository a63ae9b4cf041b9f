"""What a model can be made from: a GGUF file, an installed package that carries one, or a Hugging Face folder."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Final, Protocol

import numpy as np
from fedloop_events.blobs.tensors import Array
from fedloop_events.errors import UsageError

from fedloop_tasks.models.families import FAMILIES, Part, config_of, family_of
from fedloop_tasks.models.gguf_file import GgufFile
from fedloop_tasks.models.tokenizer import TOKENIZER, TOKENIZER_CONFIG, as_json, ids, tokenizer_files
from fedloop_tasks.models.weights import TensorFile

CONFIG: Final = "config.json"
WEIGHTS: Final = "model.safetensors"
GENERATION: Final = "generation_config.json"
_INDEX: Final = "model.safetensors.index.json"
_TEMPLATE: Final = "chat_template.jinja"
_MAX_JSON_BYTES: Final = 64 * 1024 * 1024
_FOREIGN: Final = {"_name_or_path", "auto_map", "custom_pipelines", "dtype", "torch_dtype", "transformers_version"}
"""Keys that say where a model came from or what to import, or what this project writes itself."""
_IDS: Final = ("bos_token_id", "eos_token_id", "pad_token_id")
_BUFFERS: Final = (".attn.bias", ".attn.masked_bias", ".rotary_emb.inv_freq")
"""Constants that older files store beside the weights."""


class Source(Protocol):
    """A model as it was downloaded."""

    config: dict[str, Any]
    """`config.json`, without a type of the weights."""
    files: dict[str, bytes]
    """The tokenizer's files."""
    generation: dict[str, Any]
    """`generation_config.json`: which tokens begin and end a text."""
    has_chat_template: bool
    parts: list[Part]
    licence: str
    """As the source names it; "" if it does not."""

    def sha256(self) -> str:
        """Of what the model is made from."""

    def read(self, part: Part) -> Iterator[Array]:
        """The values of a tensor in float32, as Hugging Face lays them out, some rows at a time."""


def find(source: str) -> tuple[Path, str]:
    """The file or folder that `source` names (a path, or the name of an installed package that carries one GGUF file), and the
    name that the model gets if no other is given. Raises UsageError."""
    path = Path(source)
    with suppress(OSError):  # a name that is too long
        if path.is_file() or path.is_dir():
            return path, path.absolute().stem if path.is_file() else path.absolute().name
        if path.exists():
            raise UsageError(f"{path} is neither a file nor a folder")
    folders = package_folders(source)
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if len(files) != 1:
        held = f"the package {source} holds {len(files)} GGUF files" if folders else "no package is called so either"
        raise UsageError(
            f"there is no {source}", cause=held, hint="give a GGUF file, a package that carries one, or a Hugging Face folder"
        )
    return files[0], source


def package_folders(name: str) -> list[Path]:
    """The folders of the installed package of that name, which is found and not imported; none if there is no such package."""
    package = name.replace("-", "_")
    found = None
    with suppress(ValueError):  # of a module that is no package, such as the running program
        found = importlib.util.find_spec(package) if package.isidentifier() else None
    return [Path(root) for root in (found.submodule_search_locations or ())] if found else []


def open_source(path: Path) -> Source:
    """Raises UsageError for what is no model, or none that can be used."""
    return HuggingFace(path) if path.is_dir() else Gguf(path)


class Gguf:
    """A GGUF file."""

    def __init__(self, path: Path) -> None:
        self._file = GgufFile(path)
        self.config = config_of(self._file)
        self.parts = list(family_of(self.config).parts())
        self._check()
        self.generation = ids(self._file)
        self.config |= {name: self.generation.get(name) for name in _IDS}  # null: Transformers has numbers of its own for none
        self.has_chat_template = "tokenizer.chat_template" in self._file.metadata
        max_tokens = self.config.get("max_position_embeddings") or self.config["n_positions"]
        self.files = tokenizer_files(self._file, self.config["vocab_size"], max_tokens)
        self.licence = str(self._file.metadata.get("general.license", ""))[:100]

    def sha256(self) -> str:
        return _sha256([self._file.path])

    def read(self, part: Part) -> Iterator[Array]:
        found = self._file.read(part.gguf)
        return found if part.laid == "alike" else iter([part.restored(np.concatenate([*found]))])

    def _check(self) -> None:
        rest = dict(self._file.tensors)
        for part in self.parts:
            tensor = rest.pop(part.gguf, None)
            if tensor is None or tensor.shape != part.gguf_shape:
                found = f"has the shape {list(tensor.shape)}, not {list(part.gguf_shape)}" if tensor else "is not there"
                raise UsageError(f"{self._file.path} cannot be read as a model", cause=f"the tensor {part.gguf} {found}")
        if rest:
            raise UsageError(
                f"{self._file.path} has {len(rest)} tensors that a model of its architecture does not have",
                cause=f"one is {next(iter(rest))[:80]!r}: without it the model would answer otherwise",
                hint="take the model's Hugging Face folder",
            )


class HuggingFace:
    """A folder with `config.json`, safetensors (in one file or several) and `tokenizer.json`."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        config = _object(folder / CONFIG)
        if config.get("quantization_config"):
            raise UsageError(f"the weights in {folder} are quantised", hint="take the model in F32, F16 or BF16")
        weights = self._weights()
        self._where = {name: file for file in weights.values() for name in file.specs}
        self.config = {name: value for name, value in sorted(config.items()) if name not in _FOREIGN}
        family = family_of(self.config)
        self.config["architectures"] = [FAMILIES[config["model_type"]][1]]
        self._prefix = "" if any(name.startswith("transformer.") for name in self._where) else "transformer."
        self.parts = list(family.parts())
        self._check()
        self._paths = [folder / CONFIG, *(folder / name for name in weights), *self._read_tokenizer()]
        self.generation = self._read_generation()
        self.licence = ""

    def sha256(self) -> str:
        return _sha256(self._paths)

    def read(self, part: Part) -> Iterator[Array]:
        name = self._name(part)
        return self._where[name].read(name)

    def _weights(self) -> dict[str, TensorFile]:
        folder = self._folder
        if (folder / WEIGHTS).is_file():
            return {WEIGHTS: TensorFile(folder / WEIGHTS)}
        if not (folder / _INDEX).is_file():
            pickled = any(folder.glob("*.bin")) or any(folder.glob("*.pt*"))
            raise UsageError(
                f"there is no {WEIGHTS} in {folder}",
                cause="pickled weights are never read: they can run code" if pickled else "",
                hint="take the model's safetensors files",
            )
        names = sorted(set(map(str, _object(folder / _INDEX).get("weight_map", {}).values())))
        if strange := [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]:
            raise UsageError(f"{folder / _INDEX} names {strange[0][:80]!r}, which is no safetensors file in that folder")
        return {name: TensorFile(folder / name) for name in names}

    def _name(self, part: Part) -> str:
        """As the folder's files call the tensor: GPT-2's older ones are without the prefix."""
        return part.name.removeprefix(self._prefix) if self._prefix and part.name not in self._where else part.name

    def _check(self) -> None:
        rest = {name for name in self._where if not name.endswith(_BUFFERS)}
        for part in self.parts:
            name = self._name(part)
            spec = self._where[name].specs[name] if name in self._where else None
            if spec is None or spec.shape != part.shape:
                found = f"has the shape {list(spec.shape)}, not {list(part.shape)}" if spec else "is not there"
                raise UsageError(f"the weights in {self._folder} do not fit {CONFIG}", cause=f"the tensor {part.name} {found}")
            rest.discard(name)
        if "lm_head.weight" in rest and self._is_tied():
            rest.discard("lm_head.weight")
        if rest:
            raise UsageError(
                f"the weights in {self._folder} do not fit {CONFIG}",
                cause=f"{len(rest)} tensors are not of such a model, {min(rest)[:80]!r} among them",
            )

    def _is_tied(self) -> bool:
        """Whether the output's matrix, which is stored though it is the embedding, is equal to it."""
        names = ("lm_head.weight", self._name(self.parts[0]))
        if self._where[names[0]].specs[names[0]].shape != self.parts[0].shape:
            return False
        both = (self._where[name].read(name) for name in names)
        return all(np.array_equal(one, other) for one, other in zip(*both, strict=True))

    def _read_tokenizer(self) -> Iterator[Path]:
        """The tokenizer's files, which are read on the way."""
        folder = self._folder
        if not (folder / TOKENIZER).is_file():
            raise UsageError(f"there is no {TOKENIZER} in {folder}", hint="take the model with its tokenizer")
        config = _object(folder / TOKENIZER_CONFIG) if (folder / TOKENIZER_CONFIG).is_file() else {}
        if (folder / _TEMPLATE).is_file():
            config["chat_template"] = _read(folder / _TEMPLATE).decode(errors="replace")
        kept = {name: value for name, value in sorted(config.items()) if name not in _FOREIGN}
        self.has_chat_template = "chat_template" in kept
        self.files = {TOKENIZER: as_json(_object(folder / TOKENIZER)), TOKENIZER_CONFIG: as_json(kept)}
        return (path for name in (TOKENIZER, TOKENIZER_CONFIG, _TEMPLATE, GENERATION) if (path := folder / name).is_file())

    def _read_generation(self) -> dict[str, Any]:
        path = self._folder / GENERATION
        found = _object(path) if path.is_file() else self.config
        return {name: found[name] for name in _IDS if found.get(name) is not None}


def _object(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(_read(path))
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, dict):
        raise UsageError(f"{path} is no JSON object")
    return found


def _read(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            data = file.read(min(os.fstat(file.fileno()).st_size, _MAX_JSON_BYTES) + 1)  # as much is allocated at once
    except OSError as error:
        raise UsageError(f"{path} cannot be read", cause=error.strerror or "") from None
    if len(data) > _MAX_JSON_BYTES:
        raise UsageError(f"{path} has more than {_MAX_JSON_BYTES:,} bytes")
    return data


def _sha256(paths: list[Path]) -> str:
    """Of one file, or of the names and digests of several."""
    digests = []
    for path in paths:
        with path.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    if len(paths) == 1:
        return digests[0]
    lines = "".join(f"{digest}  {path.name}\n" for digest, path in zip(digests, paths, strict=True))
    return hashlib.sha256(lines.encode()).hexdigest()
