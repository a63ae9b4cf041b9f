"""A release as a LoRA adapter for llama.cpp, as its `convert_lora_to_gguf.py` lays one out and `llama-adapter.cpp` reads it.

The header is made by the package `gguf` (0.19), into memory instead of a file; the factors follow it as they are.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

import numpy as np
from fedloop_events.blobs.tensors import Array
from fedloop_events.errors import UsageError

from fedloop_tasks.causal.adapted import Pair
from fedloop_tasks.task import Streamed

_ARCHITECTURES: Final = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "gpt2": "gpt2"}
"""What llama.cpp calls a base of that `model_type`: the adapter must say the same."""


def adapter(
    pairs: Sequence[Pair],
    *,
    model_type: str,
    alpha: float,
    rank: int,
    name: str,
    base_model: str,
    invocation: Sequence[int] = (),
) -> Streamed:
    """The file of these factors in float32. An adapter with an `invocation` acts from those tokens on, where they are last.
    llama.cpp divides alpha by the rank that a pair has: where that is another than `rank`, B makes up for it.

    B's rows stand in the order of the outputs in a GGUF file of the base: of LLaMA's queries and keys it is another one than in a
    Hugging Face folder. Raises UsageError if the package is not installed.
    """
    try:
        import gguf
    except ImportError:
        raise UsageError("the package that writes GGUF files is not installed", hint="install fedloop[models]") from None

    factors: dict[str, Array] = {}
    for each in pairs:
        factors[f"{each.part.gguf}.lora_a"] = each.a
        b = each.b if each.rank == rank else (each.b * (each.rank / rank)).astype(np.float32)
        factors[f"{each.part.gguf}.lora_b"] = np.ascontiguousarray(each.part.outputs_laid(b))
    writer = gguf.GGUFWriter(None, _ARCHITECTURES[model_type])
    writer.add_type(gguf.GGUFType.ADAPTER)
    writer.add_name(name)
    writer.add_base_model_count(1)
    writer.add_base_model_name(0, base_model)
    writer.add_string(gguf.Keys.Adapter.TYPE, "lora")
    writer.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    if invocation:  # llama.cpp takes no other type of numbers
        kind = gguf.GGUFValueType
        writer.add_key_value(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, list(invocation), kind.ARRAY, sub_type=kind.UINT32)
    for key, values in factors.items():
        writer.add_tensor_info(key, values.shape, values.dtype, values.nbytes)
    header = _header(writer)
    chunks = list(_aligned(header, factors.values(), writer.data_alignment))
    return Streamed(sum(len(chunk) for chunk in chunks), chunks)


def _header(writer: Any) -> bytes:
    """All that stands before the tensors: the writer takes an open file in place of a path, if it believes to have opened it."""
    from gguf.gguf_writer import WriterState

    file = io.BytesIO()
    writer.fout, writer.state = [file], WriterState.EMPTY
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    return file.getvalue()


def _aligned(header: bytes, factors: Iterable[Array], alignment: int) -> Iterator[bytes | memoryview]:
    yield header
    yield bytes(-len(header) % alignment)
    for each in factors:
        yield np.ascontiguousarray(each, "<f4").reshape(-1).view(np.uint8).data
        yield bytes(-each.nbytes % alignment)
