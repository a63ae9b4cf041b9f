"""A device whose disk is full: a sentence that says so, answers from what it has, and everything once there is room again."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("full_disk.py")


@pytest.mark.parametrize("how", ["closed", "killed", "open"])
def test_on_a_full_disk_a_device_answers_and_says_what_it_cannot_keep_and_goes_on_once_there_is_room(
    tmp_path: Path, how: str
) -> None:
    """Whether its store was closed, its process was killed, or another process has it open."""
    own_mounts = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    disk, beside = tmp_path / "disk", tmp_path / "beside"
    disk.mkdir()
    beside.mkdir()
    mounted = f'mount -t tmpfs -o size=4m tmpfs "{disk}" && exec "$@"'
    done = subprocess.run(
        [*own_mounts, "sh", "-c", mounted, "sh", sys.executable, SCRIPT, disk, beside, how],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
