"""Hours of the day, by the wall clock of a time zone: when a device takes part, or when a server opens rounds."""

from __future__ import annotations

import re
from datetime import datetime, tzinfo
from typing import Final, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from fedloop_events.errors import UsageError

_WINDOW: Final = re.compile(r"\s*(\d{1,2})(?::(\d{2}))?\s*-\s*(\d{1,2})(?::(\d{2}))?\s*")
_DAY_MIN: Final = 24 * 60


class _Window(NamedTuple):
    """From one minute of the day until before another; over midnight where it ends earlier than it starts."""

    start: int
    end: int

    def contains(self, minute: int) -> bool:
        if self.start < self.end:
            return self.start <= minute < self.end
        return minute >= self.start or minute < self.end


class DayHours(NamedTuple):
    """Windows of the day, as "22-06" or "12:30-13:15, 22-6" say them; `zone` None is the machine's own time zone."""

    windows: tuple[_Window, ...]
    zone: ZoneInfo | None

    @classmethod
    def parse(cls, text: str, time_zone: str | None = None) -> DayHours:
        """Raises `UsageError` that names the part that is wrong."""
        return cls(tuple(_window(part) for part in text.split(",")), None if time_zone is None else zone(time_zone))

    def contain(self, time_s: float) -> bool:
        """Whether the moment, in seconds since 1970, lies in one of the windows, as the clock on the wall shows it then."""
        shown = wall(time_s, self.zone)
        return any(window.contains(shown.hour * 60 + shown.minute) for window in self.windows)

    def opened_within(self, last_s: float, time_s: float) -> bool:
        """Whether the windows were closed at some minute of the `last_s` seconds before the moment."""
        return any(not self.contain(time_s - back_s) for back_s in range(0, min(int(last_s), _DAY_MIN * 60) + 1, 60))

    def next_start(self, time_s: float) -> datetime:
        """The next whole minute, of the two days after the moment, at which a window is open."""
        whole = int(time_s) // 60 * 60
        minutes = range(whole + 60, whole + 2 * _DAY_MIN * 60, 60)
        return wall(next(each for each in minutes if self.contain(each)), self.zone)


def wall(time_s: float, where: tzinfo | None) -> datetime:
    """What the clock on the wall shows; None is the machine's own time zone."""
    return datetime.fromtimestamp(time_s, where).astimezone(where)


def zone(name: str) -> ZoneInfo:
    """The time zone of that name. Raises `UsageError` if this machine knows none."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):  # the last two: names that are no file's
        raise UsageError(
            f"{name!r} is no time zone that this machine knows", hint='name one as in "Europe/Berlin" or "UTC"'
        ) from None


def _window(text: str) -> _Window:
    found = _WINDOW.fullmatch(text)
    if found is not None:
        hours_minutes = [int(each or 0) for each in found.groups()]
        start, end = hours_minutes[0] * 60 + hours_minutes[1], hours_minutes[2] * 60 + hours_minutes[3]
        if start < _DAY_MIN and end <= _DAY_MIN and start != end and max(hours_minutes[1], hours_minutes[3]) < 60:
            return _Window(start, end)
    raise UsageError(f"{text.strip()!r} is no part of a day", hint='give hours as in "22-06" or "12:30-13:15"')
