"""In what type a device holds a language model's frozen base. Adapters, their gradients and the losses are float32 in each.

Nothing here imports torch before it is asked what this machine does best.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Final, Literal

from fedloop_events.errors import UsageError

# PEFT imports it where there is one, and it warns of options of its own.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

Held = Literal["f32", "bf16", "nf4"]
"""float32, bfloat16 (half of it), or 4 bits of a normal distribution's quantiles for the layers (Dettmers et al. 2023, arXiv
2305.14314)."""
BaseDtype = Literal["auto", "f32", "bf16", "nf4"]
LARGE_BYTES: Final = 2 * 10**9
"""Weights of fewer bytes in float32 are worth no rounding."""


def check(asked: BaseDtype) -> None:
    """Raises `UsageError` for 4 bits without the package that has them."""
    if asked == "nf4" and find_spec("bitsandbytes") is None:
        raise UsageError(
            "a base model in 4 bits needs the package bitsandbytes, which is not installed",
            hint="install fedloop[4bit], or choose --base-dtype bf16",
        )


def chosen(asked: BaseDtype, weights_bytes: int, device: str) -> Held:
    """The type that is asked for; "auto" is bfloat16 for a large model (`weights_bytes` in float32) where the `device` computes
    with it, else float32. Raises as `check`."""
    check(asked)
    if asked != "auto":
        return asked
    return "bf16" if weights_bytes >= LARGE_BYTES and _has_bf16(device) else "f32"


def _has_bf16(device: str) -> bool:
    import torch

    if device == "cuda":
        return bool(torch.cuda.is_bf16_supported())
    able = torch.cpu.get_capabilities()
    return device == "cpu" and any(bool(able.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))
