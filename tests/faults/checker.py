"""Whether a log kept its promises, judged from outside: by what was appended, what was acknowledged, and what readers saw.

Nothing here knows the log or its adapter. A key's events are appended by one producer, one call of `append` after another; a call
that failed is made again until it is acknowledged, so at most the last call of each producer is not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct


class Mark(Struct, frozen=True, array_like=True):
    """One event: where order holds (topic and key), its id, and a digest of everything it says."""

    key: str
    id: str
    digest: str


class Seen(Struct, frozen=True, array_like=True):
    """A reader met an event at a place of the log."""

    stream: str
    offset: int
    mark: Mark


class Call(Struct, frozen=True):
    """One batch, however often it had to be appended. Times are in seconds of one clock."""

    producer: str
    began_s: float
    ended_s: float
    attempts: int
    events: Sequence[Mark]
    acknowledged: bool = True


class Reading(Struct, frozen=True):
    """All that one reader saw, in its order. `folded`: it counts each id once, so none may stand here twice."""

    reader: str
    seen: Sequence[Seen]
    folded: bool = True


class Violation(Struct, frozen=True):
    """A promise that was broken; `kind` is lost, invented, doubled, reordered or differs."""

    kind: str
    reader: str
    what: str


def check(calls: Iterable[Call], readings: Sequence[Reading]) -> list[Violation]:
    """Every violation. `calls` are in order within each producer; each reading is of the whole log."""
    appended: dict[str, list[Mark]] = {}
    acknowledged: list[Mark] = []
    for call in calls:
        for mark in call.events:
            appended.setdefault(mark.key, []).append(mark)
        if call.acknowledged:
            acknowledged += call.events
    found = [violation for reading in readings for violation in _check_one(appended, acknowledged, reading)]
    return found + _compare(readings)


def duplicates(reading: Reading) -> int:
    """How many events were seen that had been seen before."""
    return len(reading.seen) - len({each.mark for each in reading.seen})


def _check_one(appended: Mapping[str, Sequence[Mark]], acknowledged: Sequence[Mark], reading: Reading) -> list[Violation]:
    def broken(kind: str, what: object) -> Violation:
        return Violation(kind, reading.reader, str(what))

    first = dict.fromkeys(each.mark for each in reading.seen)
    sent = {mark for marks in appended.values() for mark in marks}
    found = [broken("lost", mark) for mark in acknowledged if mark not in first]
    found += [broken("invented", mark) for mark in first if mark not in sent]
    if reading.folded:
        times = Counter(each.mark.id for each in reading.seen)
        found += [broken("doubled", identifier) for identifier, count in times.items() if count > 1]
    by_key: dict[str, list[Mark]] = {}
    for mark in first:
        by_key.setdefault(mark.key, []).append(mark)
    for key, marks in by_key.items():
        # A gap is disorder too: what was not acknowledged may be missing at the end, and nowhere else.
        wanted = appended.get(key, [])
        place = next((number for number, mark in enumerate(marks) if number >= len(wanted) or wanted[number] != mark), None)
        if place is not None:
            found.append(broken("reordered", f"{key} at its event {place}: {marks[place]}"))
    offsets: dict[str, int] = {}
    for each in reading.seen:
        if each.offset <= offsets.get(each.stream, 0):
            found.append(broken("reordered", f"{each.stream} went back to {each.offset}"))
        offsets[each.stream] = each.offset
    return found


def _compare(readings: Sequence[Reading]) -> list[Violation]:
    found: list[Violation] = []
    at: dict[tuple[str, int], Mark] = {}
    everything = {each.mark for reading in readings for each in reading.seen}
    for reading in readings:
        missing = everything.difference(each.mark for each in reading.seen)
        found += [Violation("differs", reading.reader, f"it did not see {mark}") for mark in missing]
        for each in reading.seen:
            if at.setdefault((each.stream, each.offset), each.mark) != each.mark:
                found.append(Violation("differs", reading.reader, f"{each.stream} holds another event at {each.offset}"))
    return found
