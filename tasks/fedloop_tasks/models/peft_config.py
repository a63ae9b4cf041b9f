"""`adapter_config.json` of an adapter that leaves, as PEFT (0.21) writes it, the same bytes each time."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from peft import LoraConfig, TaskType
from peft.utils import CONFIG_NAME

ADAPTER: Final = "adapter_model.safetensors"


def patterns(ranks: Mapping[str, int], rank: int, alpha: float) -> dict[str, Any]:
    """What a configuration of that `rank` and `alpha` says of modules of other `ranks`: PEFT divides alpha by them."""
    others = {module: each for module, each in ranks.items() if each != rank}
    return {"rank_pattern": others, "alpha_pattern": {module: alpha / rank * each for module, each in others.items()}}


def written(config: LoraConfig, base_model: str, task: TaskType) -> dict[str, Any]:
    """The configuration of an adapter for `base_model` that is to be used, not trained on."""
    config.base_model_name_or_path, config.task_type, config.inference_mode = base_model, task, True
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        found: dict[str, Any] = json.loads((Path(folder) / CONFIG_NAME).read_bytes())
    return found | {"target_modules": sorted(found["target_modules"])}
