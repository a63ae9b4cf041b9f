"""Rounds at set times: a cron expression in a time zone, and the hours in which rounds may open.

Everything here is a function of the configuration, of what the log says, and of the wall clock's time, which is passed in.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from datetime import UTC, datetime
from functools import lru_cache
from itertools import takewhile
from typing import Final, NamedTuple
from zoneinfo import ZoneInfo

from cronsim import CronSim, CronSimError
from fedloop_events.errors import UsageError
from fedloop_events.folds.rounds import RoundsView
from fedloop_events.hours import zone

REQUEST: Final = "at-"
"""How the id of a scheduled request begins."""
_FIELDS: Final = 5
_MARGIN_S: Final = 6 * 3600
"""More than any clock is put forward or back."""


class Due(NamedTuple):
    """The request of a scheduled time: the same one, whichever server makes it, and however often."""

    request_id: str
    reason: str


def check(schedule: str, time_zone: str) -> None:
    """Raise `UsageError` if it is no cron expression of five fields, or names no time that ever comes."""
    try:
        if len(schedule.split()) != _FIELDS:
            raise CronSimError("it needs five fields")
        next(CronSim(schedule, datetime.now(zone(time_zone))))
    except CronSimError as error:
        raise UsageError(f"{schedule!r} is no cron expression: {error}", hint='give one as in "30 2 * * *"') from None
    except StopIteration:
        raise UsageError(f"{schedule!r} names no time that ever comes", hint='give one as in "30 2 * * *"') from None


def due(rounds: RoundsView, schedule: str, time_zone: str, wall_s: float) -> Due | None:
    """The request that is due at `wall_s` (seconds since 1970) and is not in the log; None if there is none.

    Of times that were missed only the last one is made up, and only if this schedule was in force before: a new schedule
    begins with the first time after the server's start. While a scheduled request waits for its round no other is made.
    """
    last = last_before(schedule, zone(time_zone), int(wall_s) // 60)
    if last is None:
        return None
    named = f"{REQUEST}{hashlib.sha256(f'{schedule} {time_zone}'.encode()).hexdigest()[:8]}-"
    request_id = f"{named}{last.astimezone(UTC):%Y%m%dT%H%MZ}"
    if request_id in rounds.requests or any(each.request_id.startswith(REQUEST) for each in rounds.queued):
        return None
    if last.timestamp() * 1000 < rounds.epoch_ms and not any(each.startswith(named) for each in reversed(rounds.requests)):
        return None
    return Due(request_id, f"scheduled for {last.isoformat(timespec='minutes')}")


@lru_cache(maxsize=64)  # asked again each second, for the same minute, of each schedule
def last_before(schedule: str, where: ZoneInfo, minute: int) -> datetime | None:
    """The last time of the schedule up to the end of this minute (since 1970); where clocks change, as Debian's cron has it."""
    now = datetime.fromtimestamp(minute * 60 + 59, where)
    try:
        earlier = next(CronSim(schedule, now, reverse=True))
    except StopIteration:
        return None
    # Backwards alone it would miss a time in the hour that the end of summer time repeats, so it looks forwards once more.
    start = datetime.fromtimestamp(earlier.timestamp() - _MARGIN_S, where)
    found = deque(takewhile(lambda each: each.timestamp() <= now.timestamp(), CronSim(schedule, start)), maxlen=1)
    return found[0] if found else None


def first_after(schedule: str, where: ZoneInfo, after_s: float) -> float:
    """The next time of the schedule, in seconds since 1970; infinity if none comes any more."""
    found = next(CronSim(schedule, datetime.fromtimestamp(after_s, where)), None)
    return math.inf if found is None else found.timestamp()
