"""Windows of what users did and of what devices count, by use case, release and language."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from types import MappingProxyType
from typing import ClassVar, Final

from fedloop_events import topics
from fedloop_events.envelope import Record
from fedloop_events.types import FeedbackScored, Payload, UsageCounted, Width
from msgspec import Struct

from fedloop_server.feedback.operator import Emit
from fedloop_server.feedback.operators.sums import OTHER, WIDTHS_MS, Sums, group, split

GRACE_MS: Final[Mapping[Width, int]] = MappingProxyType({"1m": 2 * 60_000, "1h": 30 * 60_000, "1d": 6 * 3_600_000})
"""How long after its end a window takes in what was given in it: a minute is for who watches, and a day for devices that are away
for an afternoon. What comes later is counted as late."""
MAX_GROUPS: Final = 64
"""Releases and languages that a window tells apart."""
MAX_OPEN: Final = 4096
"""Windows, releases and languages that are open at once."""


class Windows(Struct):
    """The open windows of one use case, by width, start and group (release and language), and up to when each width is closed.

    At most `MAX_OPEN` groups, at most `MAX_GROUPS` and one a window. Only a runner that does not call `advance` comes near it:
    then the window that ends first is closed early.
    """

    origin: str = ""
    open: dict[Width, dict[int, dict[str, Sums]]] = {}
    groups: int = 0
    closed_ms: dict[Width, int] = {}
    """Of each width: no window is opened any more that would have been closed before."""

    def forget(self, width: Width, start_ms: int) -> dict[str, Sums]:
        """A window that is open no more: what was in it."""
        groups = self.open.get(width, {}).pop(start_ms, {})
        self.groups -= len(groups)
        return groups


class Measuring:
    """Emits a `MetricsWindowed` for each window, release and language, once its end and a grace have passed by the log's clock.

    An event belongs to the window of each width in which it was given, by the clock of its device. One that was recorded more
    than the grace after that window's end is late: it counts in `late` of the window in which it was recorded, and nowhere else.
    Both follow from the event alone. Nothing is given after it was recorded: a device's clock that is ahead is taken for the
    log's, so that it opens no window of the future; one that is behind by more than the grace makes what it says late. A summary
    counts in windows that are at least as long as its time.

    Feedback that is taken back later stays counted: a metric says what was so at its time, and stays as it was published.
    A release and language that comes to a window when it has `MAX_GROUPS` is counted as release "other" without a language: there
    alone the order in which feedback comes makes a difference.
    """

    name: ClassVar[str] = "measure"
    version: ClassVar[int] = 1
    topics: ClassVar[tuple[str, ...]] = (topics.SCORED,)
    state_type: type[Windows] = Windows

    def __init__(self, grace_ms: Mapping[Width, int] = GRACE_MS) -> None:
        self._grace_ms = grace_ms

    def key(self, record: Record, payload: Payload) -> str | None:
        return payload.key if isinstance(payload, FeedbackScored | UsageCounted) else None

    def apply(self, state: Windows, record: Record, payload: Payload) -> Iterator[Emit]:
        state.origin = payload.origin
        if isinstance(payload, FeedbackScored):
            for width in WIDTHS_MS:
                sums = self._sums(state, width, payload.given_ms, payload.recorded_ms, payload.release, payload.language)
                if sums is not None:
                    sums.add_feedback(payload)
        elif isinstance(payload, UsageCounted):
            for width, width_ms in WIDTHS_MS.items():
                if payload.to_ms - payload.from_ms <= width_ms:
                    sums = self._sums(state, width, payload.from_ms, payload.recorded_ms, payload.release, None)
                    if sums is not None:
                        sums.add_usage(payload)
        while state.groups > MAX_OPEN:
            yield from self._close_first(state, payload.key)

    def advance(self, key: str, state: Windows, now_ms: int) -> Iterator[Emit]:
        for width, windows in state.open.items():
            lasts_ms = WIDTHS_MS[width] + self._grace_ms[width]
            for start_ms in sorted(start_ms for start_ms in windows if start_ms + lasts_ms < now_ms):
                yield from self._close(state, key, width, start_ms)

    def _sums(
        self, state: Windows, width: Width, given_ms: int, recorded_ms: int, release: str, language: str | None
    ) -> Sums | None:
        """What an event is to be added to; None if it is late, and is counted as that."""
        width_ms, grace_ms = WIDTHS_MS[width], self._grace_ms[width]
        given_ms = min(given_ms, recorded_ms)
        start_ms = given_ms - given_ms % width_ms
        closes_ms, closed_ms = start_ms + width_ms + grace_ms, state.closed_ms.get(width, 0)
        if late := recorded_ms > closes_ms or closes_ms <= closed_ms:
            at_ms = max(recorded_ms, closed_ms - grace_ms)  # a runner that keeps its promise has not closed this one
            start_ms = at_ms - at_ms % width_ms
        groups = state.open.setdefault(width, {}).setdefault(start_ms, {})
        name = group(release, language)
        if name not in groups and len(groups) >= MAX_GROUPS:
            name = group(OTHER, None)
        if (sums := groups.get(name)) is None:
            sums = groups[name] = Sums()
            state.groups += 1
        sums.late += late
        return None if late else sums

    def _close_first(self, state: Windows, key: str) -> Iterator[Emit]:
        ends_ms, width = min((min(windows) + WIDTHS_MS[width], width) for width, windows in state.open.items() if windows)
        return self._close(state, key, width, ends_ms - WIDTHS_MS[width])

    def _close(self, state: Windows, key: str, width: Width, start_ms: int) -> Iterator[Emit]:
        end_ms = start_ms + WIDTHS_MS[width]
        state.closed_ms[width] = max(state.closed_ms.get(width, 0), end_ms + self._grace_ms[width])
        for name, sums in sorted(state.forget(width, start_ms).items()):
            release, language = split(name)
            windowed = sums.windowed(state.origin, key, release, language, width, start_ms)
            yield Emit(windowed, of=(key, release, language or "", width, start_ms), time_ms=end_ms)
