"""Deciding: an event under an id that is a function of what it decides, appended and then read back.

So a decision happens once, whoever makes it, and however often (docs/decisions/0001).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Final, NamedTuple

from fedloop_events import ids
from fedloop_events.envelope import Event
from fedloop_events.errors import LogError
from fedloop_events.logs.port import EventLog
from fedloop_events.parts import split
from fedloop_events.types import EpochStarted, Payload
from fedloop_events.writer import EventWriter

APPEND_EVENTS: Final = 1_000
APPEND_BYTES: Final = 4 << 20
"""Of one append: every log takes as much."""


class Draft(NamedTuple):
    """An event that would decide something, and what that is: its id is a function of `what`."""

    payload: Payload
    what: tuple[str | int, ...]


def decide(
    log: EventLog,
    writer: EventWriter,
    drafts: Sequence[Draft],
    *,
    epoch: int,
    missing: Callable[[Sequence[Draft]], Sequence[Draft]],
) -> None:
    """Append `drafts`, and see to it that each is decided: `missing` reads on, and gives those that are not.

    They are appended in one, unless they are more than `APPEND_EVENTS` events or `APPEND_BYTES` bytes; the parts of one that is
    too large for an event come before it.
    The id of a decision may be taken by a fenced server's event, which counts for nothing: then it is made under an id of this
    `epoch`'s own. Raises LogError if the log does not show even that.
    """
    for own in ((), (epoch,)):
        if not drafts:
            return
        for events in batches(event for each in drafts for event in _events(writer, each, own)):
            log.append(events)
        drafts = missing(drafts)
    if drafts:
        raise LogError(
            f"the log does not show the {drafts[0].payload.type_name} that this server has just decided",
            hint="is it a copy, or being restored?",
        )


def _events(writer: EventWriter, draft: Draft, own: tuple[int, ...]) -> Iterator[Event]:
    *parts, whole = split(draft.payload)
    for number, part in enumerate(parts):
        yield writer.event(part, id=ids.derived_id(*draft.what, *own, "part", number))
    yield writer.event(whole, id=ids.derived_id(*draft.what, *own))


def batches(events: Iterable[Event]) -> Iterator[list[Event]]:
    """As many at a time as one append takes."""
    batch: list[Event] = []
    left = APPEND_BYTES
    for event in events:
        if batch and (len(batch) == APPEND_EVENTS or len(event.data) > left):
            yield batch
            batch, left = [], APPEND_BYTES
        batch.append(event)
        left -= len(event.data)
    if batch:
        yield batch


def begin_epoch(
    log: EventLog, writer: EventWriter, *, origin: str, run_id: str, server_id: str, read: Callable[[], tuple[int, str]]
) -> int:
    """Take over a run: every server of an earlier epoch is fenced from here on. The new epoch.

    `read` reads on, and gives the run's latest epoch and whose it is. Two servers that start at once get an epoch each, and the
    later one goes on. `server_id` is one process's own.
    """
    while True:
        epoch = read()[0] + 1
        started = EpochStarted(origin=origin, epoch=epoch, run_id=run_id, server_id=server_id)
        log.append([writer.event(started, id=ids.derived_id(origin, run_id, "epoch", epoch))])
        if read() == (epoch, server_id):
            return epoch
