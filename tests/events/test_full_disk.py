"""The log on a disk that is full: a sentence that says so, readers that go on, and writers as soon as there is room."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("full_disk.py")


@pytest.mark.parametrize("how", ["closed", "killed", "open"])
def test_on_a_full_disk_readers_go_on_and_writers_are_told_how_much_is_free(tmp_path: Path, how: str) -> None:
    """Whether the log was closed, its process was killed, or another process has it open."""
    own_mounts = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    mounted = f'mount -t tmpfs -o size=1m tmpfs "{tmp_path}" && exec "$@"'
    done = subprocess.run(
        [*own_mounts, "sh", "-c", mounted, "sh", sys.executable, SCRIPT, tmp_path, how],
        capture_output=True,
        text=True,
        timeout=120,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert done.returncode == 0, done.stderr
