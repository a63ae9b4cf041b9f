"""`python -m benchmarks [--quick] [NAMES...]`: a table for each benchmark; exit status 1 if a promise is not kept.

Each ratio is measured in at least three runs, and its worst has to keep the promise. `--quick` takes small sizes and few runs: it
shows that the benchmarks still work, its ratios say little.
"""

from __future__ import annotations

import argparse
import importlib
import os
import signal
import sys
from collections.abc import Iterable

from fedloop_events.errors import FedloopError

from benchmarks.harness import Row, table

TABLE = ("log", "kafka", "gateway", "rounds", "merging", "dp_step", "causal_step", "sidecar", "pipeline", "lake", "drift", "cli")
"""Modules with `rows(quick: bool) -> Iterable[Row]`."""
BY_NAME_ONLY = (
    "stragglers",
    "utility",
    "masking",
    "chat_utility",
    "chat_finance",
    "chat_preferences",
    "mixed_ranks",
    "remembered",
)
"""The same, but they take long or need data sets, and print tables of their own."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join((*TABLE, *BY_NAME_ONLY))}; all but the last {len(BY_NAME_ONLY)}"
    )
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {*TABLE, *BY_NAME_ONLY}
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    kept = True
    for name in arguments.names or TABLE:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        try:
            rows = list(_shown(importlib.import_module(f"benchmarks.{name}").rows(arguments.quick)))
        except FedloopError as error:
            print("\n".join(line for line in (f"error: {error.message}", error.cause, error.hint) if line), file=sys.stderr)
            return error.exit_status
        assert arguments.quick or all(row.enough_runs for row in rows), "a ratio of so few runs may be luck"
        print(table(rows), end="\n\n", flush=True)
        kept = kept and all(row.ok for row in rows)
    return 0 if arguments.quick or kept else 1


def _shown(rows: Iterable[Row]) -> Iterable[Row]:
    """The rows, each shown on standard error when it is there: a table takes minutes."""
    for row in rows:
        print(f"  {row.what}: {', '.join(f'{ratio:.2f}' for ratio in row.ratios)}", file=sys.stderr, flush=True)
        yield row


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # of whoever computes, ours or the peer, here or in a process of its own
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that brokers and other processes end with this one
    sys.exit(main())
