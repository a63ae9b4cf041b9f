"""The server's configuration: `DIR/server/server.toml`, decoded strictly.

Every number of the private part is a public one, fixed before anybody looks at data: none may come from a device's counts
(docs: what epsilon covers).
"""

from __future__ import annotations

import math
import tomllib
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any, Final, Literal, get_type_hints

import msgspec
from fedloop_events.errors import UsageError
from msgspec import Meta, Struct

MAX_COHORT = 1_500
"""`ReleaseProposed` names each update that went in, and is one event of at most 60 KiB."""

Strategy = Literal["ffa", "fedavg"]
_Number = Annotated[float, Meta(gt=0, le=1e12)]
_Share = Annotated[float, Meta(gt=0, le=1)]
_Many = Annotated[int, Meta(ge=1, le=1_000_000)]


class ServerConfig(Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What the operator decides; `MEANING` says what each value means. Raises `UsageError` for a pair of values that promises
    nothing sensible (types and ranges are checked where a file is decoded).
    """

    epsilon: _Number | None = 8.0
    delta: Annotated[float, Meta(gt=0, lt=1)] = 1e-5
    strategy: Strategy | None = None
    planned_rounds: Annotated[int, Meta(ge=1, le=10_000)] = 8
    sums_share: _Share = 0.7
    nominal_examples: _Many = 1000
    sampling_rate: _Share = 0.25
    steps: _Many | None = None
    clip_norm: _Number = 1.0
    head_lr: _Number | None = None
    lora_lr: _Number | None = None
    head_scale: _Number = 20.0
    local_epochs: Annotated[int, Meta(ge=1, le=1000)] = 1
    local_batch: Annotated[int, Meta(ge=1, le=65_536)] = 32
    quorum: _Many = 2
    cohort_size: Annotated[int, Meta(ge=1, le=MAX_COHORT)] = 64
    min_examples: Annotated[int, Meta(ge=0, le=1_000_000)] = 1
    deadline_s: _Number = 600.0
    availability_s: _Number = 120.0
    quorum_wait_s: _Number = 600.0
    max_update_norm: _Number = 1000.0
    max_upload_bytes: Annotated[int, Meta(ge=1, le=2**40)] = 64 << 20
    gate_margin: Annotated[float, Meta(ge=0, le=1)] = 0.02
    model_dir: Annotated[str, Meta(max_length=4096)] = ""

    def __post_init__(self) -> None:
        if self.cohort_size < self.quorum:
            raise _wrong("quorum", self.quorum, f"at most cohort_size, which is {self.cohort_size}")
        if self.epsilon is None:
            return
        if self.planned_rounds < 2:
            raise _wrong("planned_rounds", self.planned_rounds, "2 or more: one of sums, then training")
        if self.sums_share >= 1:
            raise _wrong("sums_share", self.sums_share, "below 1")
        if self.delta * self.nominal_examples >= 1:
            raise _wrong("delta", self.delta, f"below 1 / nominal_examples, which is {1 / self.nominal_examples:g}")

    @property
    def merge(self) -> Strategy:
        """The strategy of training rounds."""
        return self.strategy or ("fedavg" if self.epsilon is None else "ffa")

    @property
    def hyperparameters(self) -> dict[str, float]:
        """Of a training round, by the names that the trainer of the clients reads."""
        head, lora = (0.05, 0.002) if self.epsilon is None else (40.0, 4.0)
        rates = {"head_lr": self.head_lr or head, "lora_lr": self.lora_lr or lora}
        return rates | ({"local_epochs": self.local_epochs, "batch": self.local_batch} if self.epsilon is None else {})

    @property
    def round_steps(self) -> int:
        """Private steps of one round."""
        return self.steps or math.ceil(1 / self.sampling_rate)

    @property
    def divisor(self) -> float:
        """What the noisy sum of a private step is divided by."""
        return self.sampling_rate * self.nominal_examples


MEANING: Final = {
    "epsilon": 'Privacy budget of each client for its whole life; "none": rounds without differential privacy.',
    "delta": "The delta of that budget; below 1 / nominal_examples.",
    "strategy": '"ffa" (A frozen, B averaged), "fedavg" (both averaged), or "default": ffa with an epsilon, else fedavg.',
    "planned_rounds": "Rounds that the budget is planned for, the sums included; under differential privacy there are no more.",
    "sums_share": "Share of epsilon that the first round, of noisy sums per class, takes; below 1.",
    "nominal_examples": "Examples a device is assumed to have, from public knowledge: never counted on devices.",
    "sampling_rate": "Probability that an example takes part in a private step.",
    "steps": 'Private steps of a round; "default": one expected pass, 1 / sampling_rate.',
    "clip_norm": "L2 bound on one example's gradient.",
    "head_lr": 'Learning rate of the head; "default": 40 with an epsilon (SGD), else 0.05 (AdamW).',
    "lora_lr": 'Learning rate of the adapters; "default": 4 with an epsilon (SGD), else 0.002 (AdamW).',
    "head_scale": "Norm of a row of the head that starts from the sums of its class.",
    "local_epochs": "Passes over a device's examples in a round without differential privacy.",
    "local_batch": "Examples of a step in such a round.",
    "quorum": "Fewest clients that a round may start with, and fewest updates that make a release.",
    "cohort_size": f"Most clients that one round asks, at most {MAX_COHORT}.",
    "min_examples": "Examples a client must say it has at least (it says a power of two, or 0).",
    "deadline_s": "Seconds that clients have for a round.",
    "availability_s": "Seconds for which a client counts as available after it was last seen.",
    "quorum_wait_s": "Seconds that a request waits for enough clients before it is given up.",
    "max_update_norm": "L2 norm of an update's change, above which it is refused (for sums, if more: 4 x nominal_examples).",
    "max_upload_bytes": "Bytes of an update's tensors, above which it is refused.",
    "gate_margin": "How much less accurate than the current release a new one may be.",
    "model_dir": "Folder of base models; empty: the installed packages.",
}

_NONE: Final = {"epsilon": "none"} | dict.fromkeys(("strategy", "steps", "head_lr", "lora_lr"), "default")
"""What stands for None, which TOML does not have."""


def load(path: Path) -> ServerConfig:
    """The configuration in a TOML file. Raises `UsageError` that names the key, its value and what is allowed."""
    try:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise UsageError(f"{path} cannot be read as TOML: {error}", hint="`fedloop server init` writes one") from None
    return decode(found)


def decode(found: dict[str, Any]) -> ServerConfig:
    """The configuration that a parsed TOML table holds; `load` says what it raises."""
    fields = get_type_hints(ServerConfig, include_extras=True)
    values: dict[str, Any] = {}
    for key, value in found.items():
        if key not in fields:
            near = get_close_matches(key, fields, 1)
            meant = f'; did you mean "{near[0]}"?' if near else ""
            raise UsageError(f'"{key}" is no key of the server\'s configuration{meant}', hint=f"the keys are {', '.join(fields)}")
        if value == _NONE.get(key, ()):
            values[key] = None
            continue
        try:
            values[key] = msgspec.convert(_finite(value), fields[key])
        except msgspec.ValidationError as error:
            expected = str(error).replace(" | null", f' or "{_NONE.get(key)}"').replace("`", "")
            raise _wrong(key, value, f"{expected[:1].lower()}{expected[1:]}. {MEANING[key]}") from None
    return ServerConfig(**values)


def dump(config: ServerConfig) -> str:
    """The TOML text of a configuration, each key with what it means: `decode` gives the same configuration back."""
    lines = ["# Configuration of a Fedloop server, which reads it when it starts.", ""]
    for key, meaning in MEANING.items():
        value = getattr(config, key)
        shown = _NONE[key] if value is None else value
        lines += [f"# {meaning}", f"{key} = {msgspec.json.encode(shown).decode()}", ""]
    return "\n".join(lines)


def _finite(value: object) -> object:
    # TOML's inf and nan would pass a bound on one side; its booleans are Python's integers.
    if isinstance(value, bool) or (isinstance(value, float) and not math.isfinite(value)):
        raise msgspec.ValidationError("expected a finite number or a word")
    return value


def _wrong(key: str, value: object, allowed: str) -> UsageError:
    return UsageError(f"{key} = {value!r} in the server's configuration is not allowed: {allowed}")
