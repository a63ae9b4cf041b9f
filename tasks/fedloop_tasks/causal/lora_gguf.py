"""A release as a LoRA adapter for llama.cpp, as its `convert_lora_to_gguf.py` lays one out and `llama-adapter.cpp` reads it."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Final

import numpy as np
from fedloop_events.blobs.tensors import Array

from fedloop_tasks.causal.adapted import Pair
from fedloop_tasks.models.gguf_written import Laid, streamed, writer
from fedloop_tasks.task import Streamed

ARCHITECTURES: Final = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "gpt2": "gpt2"}
"""What llama.cpp calls a model of that `model_type`: an adapter must say the same as its base."""


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
    header = writer(ARCHITECTURES[model_type])
    import gguf

    header.add_type(gguf.GGUFType.ADAPTER)
    header.add_name(name)
    header.add_base_model_count(1)
    header.add_base_model_name(0, base_model)
    header.add_string(gguf.Keys.Adapter.TYPE, "lora")
    header.add_float32(gguf.Keys.Adapter.LORA_ALPHA, alpha)
    if invocation:  # llama.cpp takes no other type of numbers
        kind = gguf.GGUFValueType
        header.add_key_value(gguf.Keys.Adapter.ALORA_INVOCATION_TOKENS, list(invocation), kind.ARRAY, sub_type=kind.UINT32)
    factors: list[Laid] = []
    for each in pairs:
        b = each.b if each.rank == rank else (each.b * (each.rank / rank)).astype(np.float32)
        factors += [_laid(f"{each.part.gguf}.lora_a", each.a), _laid(f"{each.part.gguf}.lora_b", each.part.outputs_laid(b))]
    return streamed(header, factors)


def _laid(name: str, values: Array) -> Laid:
    return Laid(name, values.shape, "F32", partial(_whole, values))


def _whole(values: Array) -> list[Array]:
    return [values]
