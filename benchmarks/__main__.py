"""`python -m benchmarks [--quick] [NAMES...]`: one table of what was asked for, exit status 1 if a row is not reached.

`--quick` takes small sizes and few runs: it shows that the benchmarks still work, its ratios say little.
"""

from __future__ import annotations

import argparse
import importlib
import sys

from benchmarks.harness import Row, table

TABLE = ("log", "kafka", "gateway", "rounds", "merging", "dp_step", "cli")
"""Modules with `rows(quick: bool) -> list[Row]`."""
BY_NAME_ONLY = ("utility", "masking")
"""The same, but they take long or need data sets, and print tables of their own."""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join((*TABLE, *BY_NAME_ONLY))}; all but the last two")
    arguments = parser.parse_args()
    unknown = set(arguments.names) - {*TABLE, *BY_NAME_ONLY}
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    rows: list[Row] = []
    for name in arguments.names or TABLE:
        print(f"measuring {name} ...", file=sys.stderr, flush=True)
        rows += importlib.import_module(f"benchmarks.{name}").rows(arguments.quick)
    if rows:
        print(table(rows))
    return 0 if arguments.quick or all(row.ok for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
