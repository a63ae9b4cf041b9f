"""What the benchmarks share: rows of one table, and medians of candidates that are measured in turn."""

from __future__ import annotations

import gc
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Row:
    """One comparison. `ratio` is how much better ours is than the peer's (2.0: twice as good); `at_least` what it must reach."""

    what: str
    peer: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    at_least: float | None = None

    @property
    def ok(self) -> bool:
        return self.at_least is None or self.ratio >= self.at_least


def rates(what: str, peer: str, ours: float, theirs: float, unit: str, at_least: float | None = None) -> Row:
    """A row of two rates: more is better."""
    return Row(what, peer, ours, theirs, unit, ours / theirs, at_least)


def costs(what: str, peer: str, ours: float, theirs: float, unit: str, at_least: float | None = None) -> Row:
    """A row of two costs (seconds, bytes): less is better."""
    return Row(what, peer, ours, theirs, unit, theirs / ours, at_least)


def seconds(work: Callable[[], object]) -> float:
    """Wall time of one call, with no garbage left from before."""
    gc.collect()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def interleaved_s(works: Sequence[Callable[[], object]], *, runs: int = 5, warm: int = 1) -> list[float]:
    """The median wall time of each of `works`, which are run in turn so that a noisy minute hits all of them."""
    times = [[seconds(work) for work in works] for _ in range(warm + runs)][warm:]
    return [statistics.median(column) for column in zip(*times, strict=True)]


@contextmanager
def scratch() -> Iterator[Path]:
    """A folder that is removed afterwards; FEDLOOP_BENCH_DIR says where. On a RAM disk every fsync would be free."""
    with tempfile.TemporaryDirectory(prefix="fedloop-bench-", dir=os.environ.get("FEDLOOP_BENCH_DIR")) as folder:
        yield Path(folder)


def peak_rss_bytes() -> int:
    """The most memory that this process has held so far (Linux)."""
    status = Path("/proc/self/status").read_text()
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("VmHWM"))


def table(rows: Sequence[Row]) -> str:
    """`rows` as a Markdown table."""
    cells = [("what", "peer, same run", "ours", "peer's", "ratio", "at least", "ok")]
    for row in rows:
        floor = "" if row.at_least is None else f"{row.at_least:g}"
        ours, theirs = (f"{figure:,.{_digits(figure)}f} {row.unit}" for figure in (row.ours, row.theirs))
        cells.append((row.what, row.peer, ours, theirs, f"{row.ratio:.2f}", floor, "yes" if row.ok else "NO"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + " |" for line in cells]
    lines.insert(1, "| " + " | ".join("-" * width for width in widths) + " |")
    return "\n".join(lines)


def _digits(figure: float) -> int:
    return 0 if abs(figure) >= 100 else 2 if abs(figure) >= 1 else 4
