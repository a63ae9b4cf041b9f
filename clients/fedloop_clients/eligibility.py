"""When the owner of a device lets it take part: checked on the device, before anything is spent."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import msgspec
from fedloop_events.errors import UsageError
from fedloop_events.hours import DayHours
from fedloop_events.types import RoundOpened
from msgspec import Struct

from fedloop_clients.store import Store

MAX_JOINED: Final = 1_000
"""Rounds that are kept for the owner's terms: the oldest give way."""
_JOINED: Final = "joined"
DAY_S: Final = 24 * 3600.0
_IDLE_LOAD: Final = 0.5
"""Share of the cores that may be busy, on average over the last minute, on a machine that counts as idle."""


class Conditions(NamedTuple):
    """What surrounds a device now; None is what nobody knows, and where it is required that is a no."""

    charging: bool | None = None
    unmetered: bool | None = None
    idle: bool | None = None


class Surroundings(NamedTuple):
    """What tells a device its conditions, and its wall clock, in seconds since 1970."""

    conditions: Callable[[], Conditions]
    clock: Callable[[], float] = time.time


class _Required(NamedTuple):
    """A condition that has to hold: whether it does, the code if it does not, and what it is in words."""

    holds: bool | None
    code: str
    what: str


class Eligibility(Struct, frozen=True, kw_only=True):
    """The owner's terms: a device that does not meet them declines every instruction, with a stable code.

    `hours` are those of the device's wall clock, in their own time zone. `min_gap_s` is the least time between two rounds and
    `rounds_per_day` their number in 24 hours, both by the times at which the server's instructions were logged.
    """

    only_charging: bool = False
    only_unmetered: bool = False
    only_idle: bool = False
    hours: DayHours | None = None
    min_gap_s: float = 0.0
    rounds_per_day: int = 48

    def __post_init__(self) -> None:
        if not self.min_gap_s >= 0:
            raise UsageError(f"the least time between rounds is {self.min_gap_s} seconds", hint="give 0 or more")
        if not 1 <= self.rounds_per_day <= MAX_JOINED:
            raise UsageError(
                f"the most rounds a day are {self.rounds_per_day}", hint=f"give 1 to {MAX_JOINED}; stop the agent for none"
            )

    def unmet(self, around: Surroundings) -> str | None:
        """The code of the first term that does not hold around the device now; None if all hold."""
        now = _known(around) if self.only_charging or self.only_unmetered or self.only_idle else Conditions()
        for required in self._required(now):
            if not required.holds:
                return required.code
        return None if self.hours is None or self.hours.contain(around.clock()) else "outside-hours"

    def too_often(self, rounds: Mapping[str, int], asked_ms: int) -> str | None:
        """The code if a round asked at `asked_ms` comes too early after those `rounds`, which were asked at these times.

        All steps of a round are one: what they make the device spend in a day `Gate._over_budget` bounds. A round that was asked
        later than this one, by a clock that was wrong for a while, holds nothing up.
        """
        ages_s = [(asked_ms - each_ms) / 1000 for each_ms in rounds.values() if each_ms <= asked_ms]
        if any(age_s < self.min_gap_s for age_s in ages_s):
            return "too-soon"
        return "too-many-rounds" if sum(age_s < DAY_S for age_s in ages_s) >= self.rounds_per_day else None

    def check_known(self, conditions: Conditions) -> None:
        """Raise `UsageError` if a term rests on what the device cannot tell: it would never take part."""
        for required in self._required(conditions):
            if required.holds is None:
                raise UsageError(
                    f"this machine does not tell {required.what}, so it would never take part",
                    hint="leave that option out, or run the agent in an application that knows: Agent(conditions=...)",
                )

    def _required(self, now: Conditions) -> list[_Required]:
        """The terms of the owner that rest on what surrounds the device."""
        terms = (
            (self.only_charging, _Required(now.charging, "not-charging", "whether it is charging")),
            (self.only_unmetered, _Required(now.unmetered, "metered-network", "whether its network is metered")),
            (self.only_idle, _Required(now.idle, "not-idle", "whether it is idle")),
        )
        return [term for required, term in terms if required]


class Joined:
    """The rounds that the device in `store` has taken part in, with the times at which the server asked.

    They stand in the store, for not every log shows a device its own updates.
    """

    def __init__(self, store: Store) -> None:
        self._store = store

    def others(self, opened: RoundOpened) -> Mapping[str, int]:
        """All but this one."""
        return {key: asked_ms for key, asked_ms in self._read().items() if key != _key(opened)}

    def add(self, opened: RoundOpened, asked_ms: int) -> None:
        """It counts from now on, whatever comes of it; the time of its first instruction is the one that stays."""
        kept = {**self._read()}
        if kept.setdefault(_key(opened), asked_ms) != asked_ms:
            return
        if len(kept) > MAX_JOINED:
            del kept[next(iter(kept))]
        self._store.keep(_JOINED, msgspec.json.encode(kept))

    def _read(self) -> dict[str, int]:
        kept = self._store.kept(_JOINED)
        return msgspec.json.decode(kept, type=dict[str, int]) if kept else {}


def _key(opened: RoundOpened) -> str:
    return f"{opened.run_id}/{opened.round_id}"


def of_platform() -> Conditions:
    """What the platform tells: charging where there is a battery, idle where there is a load average."""
    import psutil

    try:
        battery = psutil.sensors_battery()
        load = psutil.getloadavg()[0]
    except (OSError, RuntimeError, AttributeError):  # AttributeError: psutil leaves out what a platform lacks
        return Conditions()
    return Conditions(
        charging=None if battery is None else battery.power_plugged,
        idle=load < _IDLE_LOAD * (psutil.cpu_count() or 1),
    )


def _known(around: Surroundings) -> Conditions:
    try:
        return around.conditions()
    except Exception:  # an application's own code may raise anything, and what it would have said is unknown
        return Conditions()


HERE: Final = Surroundings(of_platform)
