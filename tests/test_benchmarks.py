"""The benchmarks still run; their ratios are for `make bench` to say."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.harness import Row, costs, rates, table

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_the_log_benchmark_prints_a_table_of_ratios() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "log"], cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("| what")
    assert "bare apsw" in done.stdout
    assert "msgspec" in done.stdout


def test_an_unknown_benchmark_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nonsense"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "nonsense" in done.stderr


def test_a_ratio_says_how_much_better_ours_is() -> None:
    assert rates("rate", "peer", 10.0, 5.0, "/s").ratio == 2.0
    assert costs("cost", "peer", 10.0, 5.0, "s").ratio == 0.5


def test_a_row_below_its_floor_is_shown_as_not_reached() -> None:
    assert "NO" in table([Row("what", "peer", 1.0, 2.0, "/s", 0.4, 0.5)])
    assert "yes" in table([Row("what", "peer", 1.0, 2.0, "/s", 0.5, 0.5)])
