"""`fedloop model`: base models on this machine, made once of what was downloaded."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedloop_cli import console, options

if TYPE_CHECKING:
    from fedloop_tasks.models.registry import BaseModel

app = options.group(help="Add base models, list them, check one.")

ModelDir = Annotated[
    Path | None, typer.Option(metavar="DIR", help="Where models are.", show_default="the user's own data folder")
]


class Dtype(StrEnum):
    f32 = "f32"
    bf16 = "bf16"


@app.command(cls=options.Command)
def add(
    source: Annotated[str, typer.Argument(metavar="GGUF_OR_FOLDER")],
    model_dir: ModelDir = None,
    name: Annotated[str | None, typer.Option(help="What to call it.", show_default="as the file, package or folder")] = None,
    dtype: Annotated[Dtype, typer.Option(help="Type of the weights that are written.")] = Dtype.f32,
    json: options.Json = False,
) -> None:
    """Make a base model of a GGUF file, of an installed package that carries one, or of a Hugging Face folder with safetensors.

    The same source makes the same bytes on every machine; devices and server compare their SHA-256. Nothing is downloaded.
    """
    from fedloop_tasks.models import registry

    made = registry.add(source, name=name, model_dir=model_dir, dtype=dtype.value)
    rows = _document(made) | {"new": made.new}
    text = f"{_fields(made)}\n\n{made.name} {'is added' if made.new else 'was there already, and is intact'}"
    console.show(rows, text, as_json=json)


@app.command("list", cls=options.Command)
def list_(model_dir: ModelDir = None, json: options.Json = False) -> None:
    """List the base models that were added."""
    from fedloop_tasks.models import registry

    within, found = model_dir or registry.default_folder(), registry.listed(model_dir)
    heads = ["model", "family", "dtype", "parameters", "bytes", "licence", "sha256"]
    rows = [
        [
            each.name,
            each.manifest.family,
            each.manifest.dtype,
            f"{each.manifest.parameters:,}",
            f"{each.size_bytes:,}",
            each.manifest.licence,
            each.manifest.sha256[:12],
        ]
        for each in found
    ]
    text = console.table(heads, rows, empty=f"no models in {within}")
    console.show({"model_dir": str(within), "models": [_document(each) for each in found]}, text, as_json=json)


@app.command(cls=options.Command)
def show(name: Annotated[str, typer.Argument(metavar="MODEL")], model_dir: ModelDir = None, json: options.Json = False) -> None:
    """Show a base model, after comparing each of its files with what was written."""
    from fedloop_tasks.models import registry

    found = registry.show(name, model_dir)
    document = _document(found) | {"files": found.manifest.files, "source_sha256": found.manifest.source_sha256}
    console.show(document, f"{_fields(found)}\n\n{console.fields(found.manifest.files)}", as_json=json)


def _document(model: BaseModel) -> dict[str, Any]:
    return {
        "name": model.name,
        "folder": str(model.folder),
        "family": model.manifest.family,
        "dtype": model.manifest.dtype,
        "parameters": model.manifest.parameters,
        "size_bytes": model.size_bytes,
        "licence": model.manifest.licence,
        "chat_template": model.manifest.chat_template,
        "sha256": model.manifest.sha256,
    }


def _fields(model: BaseModel) -> str:
    numbers = {"parameters": f"{model.manifest.parameters:,}", "size_bytes": f"{model.size_bytes:,}"}
    return console.fields(_document(model) | numbers)
