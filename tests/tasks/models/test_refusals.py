"""What is no model, or none that can be trained right, is refused in one sentence, before anything large is allocated."""

from __future__ import annotations

import json
import os
import random
import struct
import sys
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import gguf
import gguf_files
import numpy as np
import pytest
import torch
from fedloop_events.errors import UsageError
from fedloop_tasks.models import registry
from safetensors.torch import load_file, save_file

MODEL = gguf_files.small("llama")


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "data"))
    return tmp_path / "data" / "fedloop" / "models"


def refused(source: Path | str, **options: Any) -> str:
    with pytest.raises(UsageError) as found:
        registry.add(str(source), **options)
    assert registry.listed() == []
    return f"{found.value.message}: {found.value.cause} ({found.value.hint})"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"metadata": {"llama.expert_count": 8}}, "llama.expert_count = 8, which cannot be used"),
        ({"metadata": {"split.count": 3}}, "is one of 3 parts"),
        ({"metadata": {"llama.rope.scaling.type": "yarn"}}, "llama.rope.scaling.type = 'yarn'"),
        ({"metadata": {"llama.rope.dimension_count": 8}}, "turn a part of each head alone"),
        ({"metadata": {"llama.attention.head_count": None}}, "it has no llama.attention.head_count"),
        ({"metadata": {"llama.attention.head_count": "four"}}, "its llama.attention.head_count is no int"),
        ({"metadata": {"llama.attention.head_count": 0, "llama.rope.dimension_count": None}}, "num_attention_heads"),
        ({"metadata": {"llama.attention.head_count_kv": 3}}, "4 heads of width 16 over 3 cannot be"),
        ({"metadata": {"llama.block_count": 3}}, "the tensor blk.2.attn_norm.weight is not there"),
        ({"metadata": {"llama.block_count": 2**31}}, "num_hidden_layers"),
        (
            {"metadata": {"llama.embedding_length": 32, "llama.rope.dimension_count": 8}},
            "token_embd.weight has the shape",
        ),
        (
            {"extra": {"rope_freqs.weight": np.ones(8, np.float32)}},
            "'rope_freqs.weight': without it the model would answer",
        ),
        ({"extra": {"blk.0.attn_q.lora": np.ones(8, np.float32)}}, "1 tensors that a model of its architecture does not have"),
        ({"without": ["blk.1.ffn_up.weight"]}, "the tensor blk.1.ffn_up.weight is not there"),
        ({"without": ["token_embd.weight"]}, "it has no token_embd.weight"),
        ({"extra": {"output_norm.weight": np.full(gguf_files.WIDE, np.nan, np.float32)}}, "values that are not finite in f32"),
        ({"metadata": {"general.alignment": 12}}, "its alignment is 12"),
    ],
)
def test_a_file_of_a_model_that_is_another_than_it_seems(tmp_path: Path, options: dict[str, Any], said: str) -> None:
    path = gguf_files.write(tmp_path / "small.gguf", MODEL, **options)
    assert said in refused(path)


@pytest.mark.parametrize("architecture", ["bert", "mamba", "llama2", "../../etc"])
def test_an_architecture_that_is_not_known(tmp_path: Path, architecture: str) -> None:
    writer = gguf.GGUFWriter(tmp_path / "small.gguf", architecture)
    writer.add_tensor("token_embd.weight", np.ones((4, 4), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    said = refused(tmp_path / "small.gguf")
    assert f"is of the architecture {architecture!r}, which cannot be used" in said
    assert "take one of llama, qwen2 and gpt2" in said


def test_a_quantisation_that_cannot_be_read(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "small.gguf", MODEL, quantisation=gguf.GGMLQuantizationType.Q8_0)
    data = bytearray(path.read_bytes())
    name = b"blk.0.ffn_gate.weight"
    at = data.index(name) + len(name) + 4 + 16
    assert struct.unpack_from("<I", data, at) == (gguf.GGMLQuantizationType.Q8_0,)
    for kind, said in ((gguf.GGMLQuantizationType.Q8_1, "quantised as Q8_1, which cannot be read"), (77, "number 77")):
        struct.pack_into("<I", data, at, kind)
        path.write_bytes(data)
        assert said in refused(path)


def test_a_file_that_is_cut_short_anywhere_or_is_garbage(tmp_path: Path) -> None:
    path = gguf_files.write(tmp_path / "small.gguf", MODEL)
    whole, cut = path.read_bytes(), tmp_path / "cut.gguf"
    for size in [*range(0, 600, 7), *range(600, len(whole) - 32, 4_001)]:
        cut.write_bytes(whole[:size])
        refused(cut)
    cut.write_bytes(b"GGUF" + random.Random(1).randbytes(4096))
    refused(cut)
    cut.write_bytes(b"PK\3\4" + bytes(100))
    assert "is no GGUF file" in refused(cut)


def test_any_byte_that_is_changed_is_refused_or_harmless(tmp_path: Path) -> None:
    """Never another error, and never without end."""
    path = gguf_files.write(tmp_path / "small.gguf", MODEL)
    whole, changed = path.read_bytes(), tmp_path / "changed.gguf"
    header, chance = whole.index(b"output_norm.weight") + 60, random.Random(5)
    for number in range(400):
        data = bytearray(whole)
        at = chance.randrange(4, 900 if number % 2 else header)
        data[at : at + 1 + 7 * (number % 3 == 0)] = chance.choice([b"\xff", b"\0", b"\x7f"]) * (1 + 7 * (number % 3 == 0))
        changed.write_bytes(data)
        with suppress(UsageError):
            registry.add(str(changed), name=f"m{number}")


@pytest.mark.parametrize(("at", "value"), [(8, 2**62), (16, 2**62), (24, 2**62)], ids=["tensors", "keys", "the length of a key"])
def test_a_claim_is_checked_before_memory_is_taken_for_it(tmp_path: Path, at: int, value: int) -> None:
    path = gguf_files.write(tmp_path / "small.gguf", MODEL)
    data = bytearray(path.read_bytes())
    struct.pack_into("<Q", data, at, value)
    path.write_bytes(data)
    tracemalloc.start()
    said = refused(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "claims to have" in said
    assert peak < 2**20


def test_a_list_or_a_tensor_that_claims_more_than_the_file_holds(tmp_path: Path) -> None:
    whole = gguf_files.write(tmp_path / "small.gguf", MODEL).read_bytes()
    key, name = b"tokenizer.ggml.tokens", b"blk.0.ffn_gate.weight"
    for at, said in (
        (whole.index(key) + len(key) + 8, "items"),
        (whole.index(name) + len(name) + 4, "has the shape"),
        (whole.index(name) + len(name) + 4 + 16 + 4, "does not lie within the file"),
    ):
        data = bytearray(whole)
        struct.pack_into("<Q", data, at, 2**60)
        (tmp_path / "small.gguf").write_bytes(data)
        assert said in refused(tmp_path / "small.gguf")


# --- folders ----------------------------------------------------------------------------------------------------------


def config(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        found = json.loads((path / "config.json").read_text())
        change(found)
        (path / "config.json").write_text(json.dumps(found))

    return changed


def tensors(change: Callable[[dict[str, torch.Tensor]], None]) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        found = {name: value.clone() for name, value in load_file(path / "model.safetensors").items()}
        change(found)
        save_file(found, path / "model.safetensors")

    return changed


def pickled(path: Path) -> None:
    (path / "model.safetensors").rename(path / "pytorch_model.bin")


def index(name: str) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        (path / "model.safetensors").rename(path.parent / "outside.safetensors")
        (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))

    return changed


def text(name: str, content: str) -> Callable[[Path], None]:
    def changed(path: Path) -> None:
        (path / name).write_text(content)

    return changed


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (pickled, "pickled weights are never read: they can run code (take the model's safetensors files)"),
        (lambda path: (path / "model.safetensors").unlink(), "there is no model.safetensors"),
        (lambda path: (path / "tokenizer.json").unlink(), "there is no tokenizer.json"),
        (lambda path: (path / "config.json").unlink(), "config.json cannot be read"),
        (text("config.json", "[1]"), "config.json is no JSON object"),
        (text("config.json", "[" * 100_000), "config.json is no JSON object"),
        (text("tokenizer.json", "{"), "tokenizer.json is no JSON object"),
        (index("../outside.safetensors"), "names '../outside.safetensors', which is no safetensors file in that folder"),
        (index("/etc/passwd"), "names '/etc/passwd'"),
        (index("pytorch_model.bin"), "names 'pytorch_model.bin'"),
        (index("absent.safetensors"), "absent.safetensors cannot be read as safetensors"),
        (config(lambda found: found.update(model_type="bert")), "of the family 'bert' cannot be used: "),
        (config(lambda found: found.pop("model_type")), "of the family None cannot be used"),
        (config(lambda found: found.update(quantization_config={"bits": 4})), "are quantised"),
        (config(lambda found: found.update(hidden_size=2**40)), "configuration cannot be used"),
        (config(lambda found: found.update(num_hidden_layers=3)), "model.layers.2.input_layernorm.weight is not there"),
        (tensors(lambda found: found.update(pop=found.pop("model.norm.weight"))), "the tensor model.norm.weight is not there"),
        (tensors(lambda found: found.update(extra=torch.ones(2))), "1 tensors are not of such a model, 'extra' among them"),
        (
            tensors(lambda found: found.update({"lm_head.weight": found["model.embed_tokens.weight"] + 1})),
            "'lm_head.weight' among",
        ),
        (tensors(lambda found: found.update({"lm_head.weight": torch.ones(())})), "'lm_head.weight' among"),
        (tensors(lambda found: found.update({"model.norm.weight": torch.ones(3)})), "has the shape [3], not [64]"),
        (tensors(lambda found: found.update({"model.norm.weight": torch.ones(64, dtype=torch.int32)})), "is I32"),
        (tensors(lambda found: found.update({"model.norm.weight": torch.full((64,), torch.inf)})), "not finite in f32"),
        (text("model.safetensors", "\xff" * 100), "model.safetensors cannot be read as safetensors"),
        (text("model.safetensors", ""), "cannot be read as safetensors: it is empty"),
    ],
)
def test_a_folder_that_cannot_be_used(tmp_path: Path, change: Callable[[Path], None], said: str) -> None:
    first = registry.add(str(gguf_files.write(tmp_path / "small.gguf", MODEL)), model_dir=tmp_path / "others")
    folder = tmp_path / "folder"
    MODEL.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((first.folder / "tokenizer.json").read_bytes())
    change(folder)
    assert said in refused(folder)


def test_what_is_neither_a_file_nor_a_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "neither a file nor a folder" in refused(tmp_path / "pipe")
    assert "neither a file nor a folder" in refused("/dev/null")


def test_without_the_package_that_reads_gguf_files_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = gguf_files.write(tmp_path / "small.gguf", MODEL)
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "install fedloop[models]" in refused(path)


# --- names ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "..", "../up", "/etc", ".hidden", "a/b", "a\\b", "a b", "ä", "x" * 101, "a\n"])
def test_a_name_that_is_a_path_or_hidden(tmp_path: Path, name: str) -> None:
    path = gguf_files.write(tmp_path / "small.gguf", MODEL)
    assert "cannot be called" in refused(path, name=name)
    with pytest.raises(UsageError, match="there is no model"):
        registry.show(name)
    assert registry.added(name) is None


def test_the_name_in_a_file_is_no_part_of_a_path(tmp_path: Path, folder: Path) -> None:
    evil = {"general.name": "../../../evil", "general.basename": "/evil"}
    made = registry.add(str(gguf_files.write(tmp_path / "small.gguf", MODEL, metadata=evil)))
    assert made.folder == folder / "small"
    assert [each.name for each in folder.iterdir()] == ["small"]


@pytest.mark.parametrize("source", ["nowhere.gguf", "no-such-package", "numpy", "../x", "a.b", "__main__", "sys", "x" * 5_000])
def test_a_source_that_is_not_there(source: str) -> None:
    assert f"there is no {source}" in refused(source)
