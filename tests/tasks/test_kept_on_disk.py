"""What a language model keeps of texts beyond its memory: on disk, bounded, sealed, and gone with the process."""

from __future__ import annotations

import os
import resource
import signal
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny_models as tiny
import torch
from exported_models import made
from fedloop_privacy.dp.dpsgd import plain_sgd
from fedloop_tasks.causal.examples import Example
from fedloop_tasks.causal.model import CausalModel
from fedloop_tasks.models.kept import KeptStates
from fedloop_tasks.models.on_disk import DiskStates
from fedloop_tasks.scratch import MOST_BYTES, Scratch
from fedloop_tasks.turns import Turn

MIB = 2**20
EXAMPLES = [Example((Turn("user", f"where is card {n}"),), f"we have sent {n}") for n in range(12)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save(tmp_path_factory.mktemp("models") / "llama")


def model_with(folder: Path, scratch: Scratch | None, cache_bytes: int = 0) -> CausalModel:
    spec = made(folder, activated=True).spec
    model = CausalModel(spec, model_dir=folder, device="cpu", cache_bytes=cache_bytes, scratch=scratch)
    model.load(made(folder, activated=True).arrays())
    return model


def passes(model: CausalModel) -> list[int]:
    """Gets an entry for each pass through the frozen part."""
    found: list[int] = []
    model._trunk.register_forward_hook(lambda *_: found.append(1))
    return found


def states(number: int, size: int = 1000) -> torch.Tensor:
    return torch.full((size,), float(number))


def file_of(kept: DiskStates) -> Any:
    assert kept._file is not None
    return kept._file


def test_what_has_no_room_in_memory_is_read_from_disk_and_the_same(folder: Path, tmp_path: Path) -> None:
    plain, model = model_with(folder, None), model_with(folder, Scratch(tmp_path, MIB))
    wanted = plain.scores(plain.encoded(EXAMPLES))
    assert model.scores(model.encoded(EXAMPLES)) == wanted
    counted = passes(model)
    assert model.scores(model.encoded(EXAMPLES)) == wanted
    assert counted == []
    again = passes(plain)
    plain.scores(plain.encoded(EXAMPLES))
    assert again
    assert model._kept.size_bytes == 0


def test_training_from_disk_gives_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    found = []
    for scratch in (None, Scratch(tmp_path, MIB)):
        model = model_with(folder, scratch)
        with model.training(EXAMPLES, list(model.shapes), {"lora_lr": 0.01}) as training:
            assert training is not None
            plain_sgd(*training, epochs=2, batch_size=4, seed=0, make_optimizer=torch.optim.AdamW)
        found.append(model.arrays())
    assert all(np.array_equal(found[0][name], found[1][name]) for name in found[0])


def test_the_file_has_no_name_and_nobody_can_read_what_is_in_it(tmp_path: Path) -> None:
    kept = DiskStates(Scratch(tmp_path, MIB), b"base")
    kept.put("text", states(7))
    assert list(tmp_path.iterdir()) == []
    written = os.fstat(file_of(kept).fileno())
    assert (written.st_nlink, stat.S_IMODE(written.st_mode)) == (0, 0o600)
    file_of(kept).seek(0)
    data = file_of(kept).read()
    assert len(data) == 4000 + 16
    assert states(7)[:4].numpy().tobytes() not in data


def test_a_process_that_is_killed_leaves_nothing(tmp_path: Path) -> None:
    program = (
        "import os, signal, sys, torch; from pathlib import Path\n"
        "from fedloop_tasks.models.on_disk import DiskStates; from fedloop_tasks.scratch import Scratch\n"
        "kept = DiskStates(Scratch(Path(sys.argv[1]), 10**6), b''); kept.put('text', torch.ones(1000))\n"
        "assert kept.get('text') is not None; os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=False).returncode == -signal.SIGKILL
    assert list(tmp_path.iterdir()) == []


def test_the_file_never_grows_beyond_its_bound_and_the_newest_are_kept(tmp_path: Path) -> None:
    kept = DiskStates(Scratch(tmp_path, 20_000), b"base")
    sizes = [100 + 37 * (n % 40) for n in range(400)]
    for n, size in enumerate(sizes):
        kept.put(n, states(n, size))
        assert os.fstat(file_of(kept).fileno()).st_size <= 20_000
        found = [number for number in range(n + 1) if kept.get(number) is not None]
        assert found == [*range(found[0], n + 1)]
        assert all(torch.equal(kept.get(number), states(number, sizes[number])) for number in found)  # type: ignore[arg-type]
        assert n < 30 or sum(4 * sizes[number] for number in found) > 8_000
    kept.put("large", states(0, 10_000))
    assert kept.get("large") is None


def test_a_damaged_entry_is_computed_again_and_others_are_not(folder: Path, tmp_path: Path) -> None:
    model = model_with(folder, Scratch(tmp_path, MIB))
    wanted = model.scores(model.encoded(EXAMPLES))
    beyond = model._kept._states._beyond
    assert beyond is not None
    place = list(beyond._places.values())[-1]
    file_of(beyond).seek(place.at + 5)
    file_of(beyond).write(b"damaged")
    counted = passes(model)
    assert model.scores(model.encoded(EXAMPLES)) == wanted
    assert len(counted) == 1
    assert model.scores(model.encoded(EXAMPLES)) == wanted
    assert len(counted) == 1


def test_an_entry_of_another_text_or_another_base_is_none(tmp_path: Path) -> None:
    kept = DiskStates(Scratch(tmp_path, MIB), b"base")
    kept.put("one", states(1))
    kept.put("two", states(2))
    one, two = kept._places.values()
    kept._places[kept._digest("one")] = two
    assert kept.get("one") is None
    kept._base = b"other"
    assert kept.get("two") is None
    kept._base = b"base"
    assert kept.get("two") is not None
    assert one.nonce != two.nonce


def test_a_disk_that_is_full_is_left_alone_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    kept = KeptStates(0, DiskStates(Scratch(tmp_path, MIB), b"base"))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
    try:
        for n in range(6):
            kept.put(n, states(n))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    kept.put("after", states(9))
    assert [kept.get(n) for n in (0, 5, "after")] == [None, None, None]
    assert [each.getMessage().partition(" (")[0] for each in caplog.records] == [
        f"nothing more of texts is kept in {tmp_path}",
    ]


def test_a_bound_of_nothing_makes_no_file_and_without_one_it_is_a_part_of_what_is_free(tmp_path: Path) -> None:
    kept = DiskStates(Scratch(tmp_path, 0), b"base")
    kept.put("text", states(1))
    assert (kept.get("text"), kept._file) == (None, None)
    assert 0 < Scratch(tmp_path).bound() <= MOST_BYTES


def test_other_types_and_views_come_back_as_they_were(tmp_path: Path) -> None:
    kept = DiskStates(Scratch(tmp_path, MIB), b"base")
    wide = torch.arange(24, dtype=torch.bfloat16).reshape(2, 3, 4)
    kept.put("view", wide.transpose(0, 2))
    found = kept.get("view")
    assert found is not None
    assert torch.equal(found, wide.transpose(0, 2))
    assert found.dtype == torch.bfloat16
