"""What the benchmarks share: candidates that are measured in turn, run by run, and rows of what came of it.

A pair is fair when both start alike: before each measurement the garbage is collected and every dirty page is on disk, warm-up
runs are dropped for both, and they take turns at going first, so that neither has the warmer cache or the quieter minute.
"""

from __future__ import annotations

import gc
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple, TypeVar

from fedloop_events.errors import UsageError

MIN_RUNS: Final = 3
"""Of whatever can come out otherwise the next time."""
T = TypeVar("T")


class Pair(NamedTuple):
    """Ours and the peer's figure of one run."""

    ours: float
    theirs: float


@dataclass(frozen=True)
class Row:
    """One comparison, run by run. A ratio is how much better ours is (2.0: twice as good); the worst one has to reach `at_least`.

    `counted` figures are the same in every run, so one run is enough.
    """

    what: str
    peer: str
    pairs: tuple[Pair, ...]
    unit: str
    at_least: float | None = None
    less_is_better: bool = False
    counted: bool = False

    @property
    def ratios(self) -> list[float]:
        return [self._ratio(pair) for pair in self.pairs]

    @property
    def median(self) -> float:
        return statistics.median(self.ratios)

    @property
    def worst(self) -> float:
        return min(self.ratios)

    @property
    def worst_pair(self) -> Pair:
        """The figures of the run with the worst ratio."""
        return min(self.pairs, key=self._ratio)

    @property
    def ok(self) -> bool:
        return self.at_least is None or self.worst >= self.at_least

    @property
    def enough_runs(self) -> bool:
        return self.counted or len(self.pairs) >= MIN_RUNS

    def _ratio(self, pair: Pair) -> float:
        return pair.theirs / pair.ours if self.less_is_better else pair.ours / pair.theirs


def rates(what: str, peer: str, pairs: Iterable[tuple[float, float]], unit: str, at_least: float | None = None) -> Row:
    """A row of rates, ours and the peer's of each run: more is better."""
    return Row(what, peer, tuple(Pair(*pair) for pair in pairs), unit, at_least)


def costs(what: str, peer: str, pairs: Iterable[tuple[float, float]], unit: str, at_least: float | None = None) -> Row:
    """A row of costs (seconds, bytes), ours and the peer's of each run: less is better."""
    return Row(what, peer, tuple(Pair(*pair) for pair in pairs), unit, at_least, less_is_better=True)


def counted(what: str, peer: str, ours: float, theirs: float, unit: str, at_least: float | None = None) -> Row:
    """A row of what is counted and not timed: more is better, and another run would count the same."""
    return Row(what, peer, (Pair(ours, theirs),), unit, at_least, counted=True)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call, with no garbage left from before."""
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def in_turn(measures: Sequence[Callable[[], T]], *, runs: int, warm: int = 0) -> list[tuple[T, ...]]:
    """What `measures` give in each of `runs`, in their order; the first one to be measured is another one in each run.

    The results of `warm` runs before are dropped.
    """
    results = []
    for run in range(warm + runs):
        found: dict[int, T] = {}
        for index in range(len(measures)):
            number = (run + index) % len(measures)
            os.sync()
            found[number] = measures[number]()
        results.append(tuple(found[number] for number in range(len(measures))))
    return results[warm:]


def timed_in_turn(ours: Callable[[], object], theirs: Callable[[], object], *, runs: int, warm: int = 1) -> list[Pair]:
    """The wall times of both in each run."""
    return [Pair(*times) for times in in_turn([lambda: seconds(ours), lambda: seconds(theirs)], runs=runs, warm=warm)]


def per_second(amount: float, times: Iterable[tuple[float, float]]) -> list[Pair]:
    """Rates at which `amount` was done in each run."""
    return [Pair(amount / ours_s, amount / theirs_s) for ours_s, theirs_s in times]


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is removed afterwards; FEDLOOP_BENCH_DIR says where. On a RAM disk every fsync would be free."""
    with tempfile.TemporaryDirectory(prefix="fedloop-bench-", dir=os.environ.get("FEDLOOP_BENCH_DIR")) as folder:
        yield Path(folder)


def data_set(name: str) -> Path:
    """A file below FEDLOOP_DATA, else below `shared/data` beside the project. Raises UsageError if it is not there."""
    folder = Path(os.environ.get("FEDLOOP_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / name).is_file():
        raise UsageError(f"{folder / name} is missing", hint=f"set FEDLOOP_DATA to the folder that holds {name}")
    return folder / name


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far (Linux)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def table(rows: Sequence[Row]) -> str:
    """`rows` as a Markdown table. The figures are those of the run with the worst ratio, so that they give that ratio."""
    cells = [("what", "peer, same runs", "ours", "peer's", "worst", "median", "runs", "promised", "kept")]
    for row in rows:
        promised, kept = ("", "") if row.at_least is None else (f"{row.at_least:g}", "yes" if row.ok else "NO")
        ours, theirs = (f"{figure:,.{_digits(figure)}f} {row.unit}".rstrip() for figure in row.worst_pair)
        worst, median = (_rounded_down(ratio) for ratio in (row.worst, row.median))
        runs = "counted" if row.counted else str(len(row.pairs))
        cells.append((row.what, row.peer, ours, theirs, worst, median, runs, promised, kept))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def _rounded_down(ratio: float) -> str:
    """Down, so that a promise that was missed does not look kept."""
    return f"{math.floor(ratio):,}" if ratio >= 100 else f"{math.floor(100 * ratio) / 100:.2f}"


def _digits(figure: float) -> int:
    return 0 if abs(figure) >= 100 else 2 if abs(figure) >= 1 else 4
