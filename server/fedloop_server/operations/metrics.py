"""What the feedback pipeline has measured: windows that are closed, and what is known so far of those that are not."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Final

from fedloop_events import topics
from fedloop_events.envelope import Record
from fedloop_events.errors import UsageError
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.logs.port import EventLog
from fedloop_events.types import MetricsWindowed, Payload, Width
from msgspec import Struct

from fedloop_server.feedback.operators.measuring import Measuring, Windows
from fedloop_server.feedback.operators.sums import WIDTHS_MS, split

LATEST: Final[Mapping[Width, int]] = MappingProxyType({"1m": 60, "1h": 48, "1d": 30})
"""How many windows of each width are kept of a use case: the latest that hold anything."""

_Place = tuple[str, Width]
_Group = tuple[str, str | None]


class Measured(Struct, frozen=True):
    """A window of one use case, release and language; one that is `open` holds what is known of it so far."""

    window: MetricsWindowed
    open: bool


class MetricsView:
    """The latest windows of each use case, by the events of the pipeline: open ones are added up of what it has scored, as its
    own operator does it. Bounded as that is."""

    topics = (topics.SCORED, topics.METRICS)

    def __init__(self) -> None:
        self._closed: dict[_Place, dict[int, dict[_Group, MetricsWindowed]]] = {}
        self._open: dict[str, Windows] = {}
        self._measuring = Measuring()

    def apply(self, record: Record, payload: Payload) -> None:
        if isinstance(payload, MetricsWindowed):
            self._close(payload)
        elif (use_case := self._measuring.key(record, payload)) is not None:
            state = self._open.setdefault(use_case, Windows())
            for _ in self._measuring.apply(state, record, payload):
                pass  # the pipeline emits it

    def _close(self, window: MetricsWindowed) -> None:
        windows = self._closed.setdefault((window.use_case, window.width), {})
        windows.setdefault(window.start_ms, {})[window.release, window.language] = window
        if len(windows) > LATEST[window.width]:
            del windows[min(windows)]
        if (state := self._open.get(window.use_case)) is not None:
            state.forget(window.width, window.start_ms)

    @property
    def use_cases(self) -> list[str]:
        return sorted({*self._open, *(use_case for use_case, _ in self._closed)})

    def windows(self, use_case: str, width: Width) -> list[Measured]:
        """Oldest first. A window that began before the last closed one is not open, whatever came of it since."""
        closed = self._closed.get((use_case, width), {})
        state, last_ms = self._open.get(use_case, Windows()), max(closed, default=-1)
        found = {start_ms: [Measured(each, open=False) for each in groups.values()] for start_ms, groups in closed.items()}
        for start_ms, sums in state.open.get(width, {}).items():
            if start_ms > last_ms:
                found[start_ms] = [
                    Measured(each.windowed(state.origin, use_case, *split(name), width, start_ms), open=True)
                    for name, each in sums.items()
                ]
        latest = sorted(found)[-LATEST[width] :]
        return [each for start_ms in latest for each in sorted(found[start_ms], key=_group)]


def follow(log: EventLog) -> Reader[MetricsView]:
    """The view of a log, for who asks again and again: `current` reads on where it was."""
    return Reader(log, MetricsView(), identities=Identities())


def current(
    found: EventLog | Reader[MetricsView], use_case: str | None = None, widths: Collection[Width] = tuple(WIDTHS_MS)
) -> list[Measured]:
    """The latest windows, of one use case or of all, oldest first within each and each width.

    Raises `UsageError` for a use case of which nothing was measured.
    """
    reader = found if isinstance(found, Reader) else follow(found)
    reader.catch_up()
    view = reader.fold
    if use_case is not None and use_case not in view.use_cases:
        there = ", ".join(view.use_cases)
        raise UsageError(
            f"nothing was measured of use case {use_case!r}",
            hint=f"there is {there}" if there else "nothing was measured at all: run the pipeline (`fedloop feedback run`)",
        )
    chosen = view.use_cases if use_case is None else [use_case]
    return [each for name in chosen for width in WIDTHS_MS if width in widths for each in view.windows(name, width)]


def _group(measured: Measured) -> tuple[str, str]:
    return measured.window.release, measured.window.language or ""
