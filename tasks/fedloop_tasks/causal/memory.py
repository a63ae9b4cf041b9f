"""How much memory a language model needs, before anything of it is loaded: from its configuration and its file's header.

What training needs is an upper bound over all examples that the spec allows: it must not depend on a device's own examples, for
a round that is declined for want of memory would tell how long they are. Measured on a CPU (PyTorch 2.13, Transformers 5.23).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Final, NamedTuple

from fedloop_events.types import CausalSpec
from msgspec.structs import replace

from fedloop_tasks.causal.keeping import BATCH_TOKENS
from fedloop_tasks.causal.training import HEAD_TOKENS, PROMPT_TOKENS
from fedloop_tasks.models import folder as folders
from fedloop_tasks.precision import Held
from fedloop_tasks.task import TooLittleMemoryError

_FLOAT: Final = 4
_STATES: Final = {"gpt2": 3.5}
_GATED: Final = 2.0
"""Floats that a layer keeps of a token for the backward pass, by those that go into its linear modules and come out of them: an
activation that is made of several steps, as GPT-2's, keeps more."""
_LOGITS: Final = 4
"""Copies of the logits of `HEAD_TOKENS` tokens: themselves, what their sum and their gradient are made of, and a spare one."""
_ADAPTERS: Final = 12
"""Copies of the adapters: the values, their sum and gradient, noise in float64 or two moments, the release, and what is sent."""
_FIXED: Final = 4
"""Copies of what acts and is not trained: the values, the release as it is read, that which was held before, and a spare one."""
_NF4: Final = (4 + 32 / 64) / 32
"""Of a float: 4 bits, and a scale for 64 of them."""
_SLACK: Final = 1.25
"""Of what training takes: what the allocator does not give back at once, and what is there for a moment only."""
_SHORTEST: Final = 4
"""Tokens on which adapters act in the shortest answer: the turn's beginning, and one of the answer."""
_SMALLER: Final[Mapping[Held, Sequence[Held]]] = {"f32": ("bf16", "nf4"), "bf16": ("nf4",), "nf4": ()}
_LINEAR: Final = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)\.(.+)\.weight")
_ROOT: Final = Path("/sys/fs/cgroup")
_OWN: Final = Path("/proc/self/cgroup")

Free = Callable[[], int | None]
"""Bytes that this process can still take; None where nobody can say."""


class Sizes(NamedTuple):
    """What memory depends on, of a base model."""

    weights_bytes: int
    """As loaded in float32."""
    layers_bytes: int
    """Of these, the linear modules of the layers."""
    largest_bytes: int
    """Of these, the largest one's."""
    states: float
    """Floats that a layer keeps of a token for the backward pass."""
    linear: dict[str, int]
    """Of each linear module of a layer, by its path within it: what goes in and what comes out."""
    vocabulary: int
    heads: int
    keys: int
    """Floats of a token's queries, and of its keys."""


class Trained(NamedTuple):
    """What a round trains of a model's adapters."""

    rank: int
    fixed_bytes: int = 0
    """Of the release's fixed factors."""


def sizes(folder: Path) -> Sizes:
    """Of the base model in `folder`. Raises ModelError for a folder that cannot be read."""
    config, shapes = folders.config(folder), folders.shapes(folder)
    total = within = largest = 0
    linear: dict[str, int] = {}
    for name, shape in shapes.items():
        values = 1
        for size in shape:
            values *= size
        total += values
        if len(shape) == 2 and (found := _LINEAR.search(name)):
            linear[found[2]] = sum(shape)
            within, largest = within + values, max(largest, values)
    heads = int(config.num_attention_heads)
    head = int(getattr(config, "head_dim", None) or config.hidden_size // heads)
    keys = int(getattr(config, "num_key_value_heads", None) or heads)
    states = _STATES.get(config.model_type, _GATED) * sum(linear.values())
    return Sizes(
        total * _FLOAT, within * _FLOAT, largest * _FLOAT, states, linear, int(config.vocab_size), heads * head, keys * head
    )


def weights_bytes(base: Sizes, held: Held) -> int:
    """Of the base as it is held; in 4 bits with a module that is unpacked to compute with it."""
    if held == "bf16":
        return base.weights_bytes // 2
    if held == "nf4":
        return base.weights_bytes - base.layers_bytes + int(base.layers_bytes * _NF4) + base.largest_bytes
    return base.weights_bytes


def training_bytes(base: Sizes, spec: CausalSpec, cache_bytes: int, trained: Trained | None = None) -> int:
    """The most that training adds to the loaded model, `cache_bytes` of what is kept of texts included; of the whole adapters,
    without fixed ones, if nothing else is said."""
    rank, fixed = trained or Trained(spec.rank)
    adapted = [size for path, size in base.linear.items() if _names(spec.targets, path)]
    adapters = spec.layers * rank * sum(adapted) * _FLOAT
    fixed += spec.layers * (spec.rank - rank) * sum(adapted) * _FLOAT
    token = spec.layers * (base.states + 2 * rank * len(adapted)) * _FLOAT
    prompt = spec.layers * (4 * base.keys + 2 * base.heads) * _FLOAT  # kept, put before others, and one for each of the heads
    most = 0.0
    for rows, acting, before in _batches(spec):
        whole = min(BATCH_TOKENS, rows * (acting + before)) or 1
        frozen = whole * (base.states + 2 * spec.layers * 2 * base.keys) * _FLOAT
        mask = 2 * acting * (acting + before) * _FLOAT if before else 0
        step = rows * (acting * token + before * prompt + mask + adapters) + base.vocabulary * HEAD_TOKENS * _LOGITS * _FLOAT
        most = max(most, step, frozen)
    return int(_SLACK * (most + _ADAPTERS * adapters + _FIXED * fixed)) + cache_bytes


def _batches(spec: CausalSpec) -> Iterator[tuple[int, int, int]]:
    """Micro-batches that DP-SGD may make: answers in it, the tokens of each on which adapters act, and those before."""
    from fedloop_privacy.dp.dpsgd import MICRO_BATCH_TOKENS  # imports Opacus, which evaluation does without

    together = 1 if spec.learns in {"sft", "kto"} else 2
    lengths = sorted({*(_SHORTEST * 2**n for n in range(17)), spec.max_tokens})
    for acting in (each for each in lengths if each <= spec.max_tokens):
        for before in {0, spec.max_tokens - acting} if spec.activated else {0}:
            example = together * (acting + before // PROMPT_TOKENS)
            yield together * max(1, MICRO_BATCH_TOKENS // example), acting, before


def _names(targets: list[str], path: str) -> bool:
    return any(path == target or path.endswith(f".{target}") for target in targets)


def check_weights(base: Sizes, free: Free, held: Held = "f32") -> None:
    """Raises TooLittleMemoryError if not even the weights fit into what is free: the machine would swap until it stands still."""
    if (left := free()) is not None and (needed := weights_bytes(base, held)) > left:
        smaller = next((each for each in _SMALLER[held] if weights_bytes(base, each) <= left), None)
        raise TooLittleMemoryError(
            f"the base model needs {_gb(needed)} of memory, {_gb(left)} are free",
            hint=f"end other programs, or {f'try --base-dtype {smaller}' if smaller else 'use a smaller base model'}",
        )


def check_training(
    base: Sizes,
    spec: CausalSpec,
    cache_bytes: int,
    kept_bytes: int,
    free: Free,
    trained: Trained | None = None,
    held: Held = "f32",
) -> None:
    """Raises TooLittleMemoryError if training, of which `kept_bytes` are in memory already, may not fit into what is free."""
    left = free()
    if left is None or (needed := training_bytes(base, spec, cache_bytes, trained) - kept_bytes) <= left:
        return
    room = left + kept_bytes
    fixed = 0 if trained is None else trained.fixed_bytes

    def fits(smaller: CausalSpec) -> bool:
        return training_bytes(base, smaller, cache_bytes, Trained(smaller.rank, fixed)) <= room

    smaller: dict[str, list[CausalSpec]] = {
        "rank": [replace(spec, rank=n) for n in range(spec.rank - 1, 0, -1)],
        "layers": [replace(spec, layers=n) for n in range(spec.layers - 1, 0, -1)],
    }
    possible = []
    for name, specs in smaller.items():
        if (found := next((getattr(each, name) for each in specs if fits(each)), None)) is not None:
            possible.append(f"--{name} {found}")
    for dtype in _SMALLER[held]:
        if needed <= left + weights_bytes(base, held) - weights_bytes(base, dtype):
            possible.append(f"--base-dtype {dtype}")
            break
    advice = f"try {', or '.join(possible)}" if possible else "no smaller rank and no fewer layers would fit"
    raise TooLittleMemoryError(f"training needs {_gb(needed)} of memory, {_gb(left)} are free: {advice}")


def free_bytes() -> int | None:
    """What the machine can give without swapping, and the process's control group allows."""
    import psutil

    allowed, available = allowed_bytes(), int(psutil.virtual_memory().available)
    return available if allowed is None else max(0, min(available, allowed))


def allowed_bytes(own: Path = _OWN, root: Path = _ROOT) -> int | None:
    """What the process's control group (version 2), and those it is in, still let it take; None without a limit."""
    return min((room for group in _groups(own, root) if (room := _room(group)) is not None), default=None)


def _groups(own: Path, root: Path) -> Iterator[Path]:
    """The process's control group and those it is in, the root last; none where there is no such thing."""
    try:
        lines = own.read_text().splitlines()
    except OSError:
        return
    for path in (line.removeprefix("0::/") for line in lines if line.startswith("0::/")):
        yield from (root / path, *(each for each in (root / path).parents if each.is_relative_to(root)))


def _room(group: Path) -> int | None:
    """What a control group may still take. What it has read of files counts as taken, and makes way when asked."""
    try:
        most = int((group / "memory.max").read_text())  # "max" if there is none
        taken = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return most - taken + int(stat["active_file"]) + int(stat["inactive_file"])
    except (OSError, ValueError, KeyError):
        return None


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
