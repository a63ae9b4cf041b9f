"""The rounds of a chat's deployment: training alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, ClassVar, Final

from msgspec import Meta

from fedloop_tasks.planning import SERVER_RATES, Many, Strategy, TrainingPlan, meaning

PRIVATE_RATES: Final = {"lora_lr": 4.0}
"""SGD's, for one clipped example's gradient a step."""
PLAIN_RATES: Final = {"lora_lr": 0.001}
"""AdamW's."""
CHAT_SERVER_RATES: Final = {**SERVER_RATES, "fedadam": 0.0025}
"""Chosen with banking77's intents as words at epsilon 8, after public examples: in ten rounds .75 of loss per token becomes .62,
at 0.005 it is .68, and at 0.03 noise undoes what was learnt before."""


class ChatPlan(TrainingPlan, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """See `TrainingPlan`. Many rounds of one private step, with Adam on the server, learn more than few of local steps: the noise
    of all devices is averaged before anybody walks on it."""

    planned_rounds: Annotated[int, Meta(ge=1, le=10_000)] = 10
    steps: Many | None = 1

    MEANING: ClassVar[Mapping[str, str]] = meaning(
        "fedadam", "fedavg", (PRIVATE_RATES["lora_lr"], PLAIN_RATES["lora_lr"]), CHAT_SERVER_RATES
    )
    PRIVATE: ClassVar[Strategy] = "fedadam"
    SERVER_RATES: ClassVar[Mapping[str, float]] = CHAT_SERVER_RATES

    def rates(self) -> dict[str, float]:
        return {"lora_lr": self.lora_lr or (PLAIN_RATES if self.epsilon is None else PRIVATE_RATES)["lora_lr"]}
