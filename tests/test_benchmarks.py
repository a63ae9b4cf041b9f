"""The benchmarks still run, and their tables say what was measured; the ratios are for `make bench` to say."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import __main__ as command
from benchmarks.harness import Row, costs, counted, in_turn, rates, table

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


@pytest.mark.slow
def test_the_drift_benchmark_compares_with_rivers_own() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "--quick", "drift"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    for row in ("quiet streams of 4,000 at 85%", "gradual falls of 20 points: delay", "forecast 15 windows ahead: error"):
        assert row in done.stdout


@pytest.mark.slow
def test_the_lake_benchmark_compares_writing_and_asking() -> None:
    found = list(importlib.import_module("benchmarks.lake").rows(quick=True))
    assert [(row.peer, row.at_least) for row in found] == [("DuckDB writing Parquet", 0.3), ("DuckDB on Parquet", 0.7)]


def test_an_unknown_benchmark_is_refused() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "nonsense"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    assert done.returncode == 2
    assert "nonsense" in done.stderr


def cells(row: Row) -> dict[str, str]:
    """The row as its table shows it, by column."""
    names, _, values = ([cell.strip() for cell in line.strip("|").split("|")] for line in table([row]).splitlines())
    return dict(zip(names, values, strict=True))


def test_a_ratio_says_how_much_better_ours_is() -> None:
    assert rates("rate", "peer", [(10.0, 5.0)], "/s").ratios == [2.0]
    assert costs("cost", "peer", [(10.0, 5.0)], "s").ratios == [0.5]


def test_a_row_shows_the_median_and_the_worst_ratio_of_its_runs_and_the_figures_of_the_worst_run() -> None:
    rate = cells(rates("rate", "peer", [(30.0, 10.0), (8.0, 10.0), (20.0, 10.0)], "/s"))
    assert (rate["worst"], rate["median"], rate["runs"]) == ("0.80", "2.00", "3")
    assert (rate["ours"], rate["peer's"]) == ("8.00 /s", "10.00 /s")
    cost = cells(costs("cost", "peer", [(1.0, 4.0), (5.0, 10.0), (2.0, 6.0)], "s"))
    assert (cost["worst"], cost["median"], cost["runs"]) == ("2.00", "3.00", "3")
    assert (cost["ours"], cost["peer's"]) == ("5.00 s", "10.00 s")


def test_a_promise_is_kept_only_if_the_worst_run_keeps_it() -> None:
    assert cells(rates("what", "peer", [(9.0, 1.0), (9.0, 1.0), (0.5, 1.0)], "/s", 0.5))["kept"] == "yes"
    missed = cells(rates("what", "peer", [(9.0, 1.0), (9.0, 1.0), (0.4999, 1.0)], "/s", 0.5))
    assert (missed["worst"], missed["kept"]) == ("0.49", "NO")


def test_candidates_take_turns_at_going_first_and_each_run_keeps_their_results_together() -> None:
    order: list[str] = []

    def measure(name: str) -> str:
        order.append(name)
        return f"{name}{order.count(name)}"

    found = in_turn([lambda: measure("ours"), lambda: measure("theirs")], runs=2, warm=1)
    assert order == ["ours", "theirs", "theirs", "ours", "ours", "theirs"]
    assert found == [("ours2", "theirs2"), ("ours3", "theirs3")]


def run_with(rows: list[Row], monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    """The exit status of a run in which the log's benchmark has measured `rows`."""
    monkeypatch.setattr("benchmarks.log.rows", lambda quick: rows)
    monkeypatch.setattr("sys.argv", ["benchmarks", *arguments, "log"])
    return command.main()


def test_a_missed_promise_fails_the_run_and_a_kept_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    kept, missed = ([(1.0, 1.0), (1.0, 1.0), (ours, 1.0)] for ours in (1.0, 0.4))
    assert run_with([rates("what", "peer", kept, "/s", 0.5)], monkeypatch) == 0
    assert run_with([rates("what", "peer", kept, "/s", 0.5), rates("what", "peer", missed, "/s", 0.5)], monkeypatch) == 1


def test_a_figure_that_can_come_out_otherwise_is_measured_three_times(monkeypatch: pytest.MonkeyPatch) -> None:
    twice = [rates("what", "peer", [(1.0, 1.0), (1.0, 1.0)], "/s")]
    with pytest.raises(AssertionError, match="luck"):
        run_with(twice, monkeypatch)
    assert run_with(twice, monkeypatch, "--quick") == 0
    assert run_with([counted("what", "peer", 1.0, 1.0, "")], monkeypatch) == 0
