"""`fedloop feedback stats`: how content users are, how often answers were right, and how fast they came."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal

import typer

from fedloop_cli import console, options

if TYPE_CHECKING:
    from fedloop_server.operations.metrics import Measured

_BARS: Final = "▁▂▃▄▅▆▇█"
_SHOWN: Final = 24


def stats(
    where: options.DeploymentFolder,
    use_case: Annotated[str | None, typer.Option(metavar="NAME", help="Only this use case.")] = None,
    window: Annotated[Literal["1m", "1h", "1d"], typer.Option(help="How long a window is.")] = "1h",
    json: options.Json = False,
) -> None:
    """Show the latest windows of what the pipeline measures, by use case, release and language.

    Windows that are open hold what is known so far. Devices publish once an hour how often and how fast they answered: windows of
    a minute lack that.
    """
    from fedloop_server.operations import metrics

    found = metrics.current(where.open_log(), use_case, (window,))
    console.show({"windows": [document(each) for each in found]}, lambda: _text(found), as_json=json)


def document(measured: Measured) -> dict[str, Any]:
    """A window as every `--json` has it."""
    window, times = measured.window, measured.window.latency
    return {
        "use_case": window.use_case,
        "release": window.release,
        "language": window.language,
        "window": window.width,
        "start": console.moment(window.start_ms),
        "open": measured.open,
        "satisfaction": window.satisfaction,
        "accuracy": window.accuracy,
        "p50": times and times.p50,
        "p95": times and times.p95,
        "p99": times and times.p99,
        "feedback": window.feedback,
        "answers": window.answers,
        "masked": window.masked,
        "quarantined": window.quarantined,
        "late": window.late,
    }


_HEADS: Final = (
    "use case", "release", "language", "start", "satisfied", "accuracy", "p50 s", "p95 s", "p99 s",
    "feedback", "answers", "masked", "quarantined", "late",
)  # fmt: skip


def _text(found: Sequence[Measured]) -> str:
    shown = found[-_SHOWN:]
    table = console.table(_HEADS, [_row(each) for each in shown], empty="nothing was measured yet")
    more = [f"the latest {len(shown)} of {len(found)} (all of them: --json)"] if len(shown) < len(found) else []
    return "\n".join([*more, table, *_lines(found)])


def _row(measured: Measured) -> list[object]:
    window, times = measured.window, measured.window.latency
    seconds = [f"{each:.3g}" for each in (times.p50, times.p95, times.p99)] if times else [None] * 3
    start = f"{console.moment(window.start_ms)}{' (open)' if measured.open else ''}"
    return [
        window.use_case, window.release, window.language, start, _share(window.satisfaction), _share(window.accuracy), *seconds,
        window.feedback, window.answers, window.masked, window.quarantined, window.late,
    ]  # fmt: skip


def _share(share: float | None) -> str | None:
    return None if share is None else f"{share:.2f}"


def _lines(found: Sequence[Measured]) -> list[str]:
    """Satisfaction over time, a line for each use case; of all its releases and languages together."""
    sums: dict[str, dict[int, tuple[float, int]]] = {}
    for window in (each.window for each in found):
        satisfied, of = sums.setdefault(window.use_case, {}).get(window.start_ms, (0.0, 0))
        sums[window.use_case][window.start_ms] = satisfied + window.satisfied, of + window.satisfied_of
    shares = {name: [satisfied / of for _, (satisfied, of) in sorted(each.items()) if of] for name, each in sums.items()}
    return [f"satisfied, {name}: {sparkline(each)} {each[-1]:.2f}" for name, each in shares.items() if each]


def sparkline(shares: Sequence[float]) -> str:
    """Shares from 0 to 1 as bars."""
    return "".join(_BARS[min(int(share * len(_BARS)), len(_BARS) - 1)] for share in shares)
