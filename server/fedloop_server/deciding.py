"""Deciding: an event under an id that is a function of what it decides, appended and then read back.

So a decision happens once, whoever makes it, and however often (docs/decisions/0001).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fedloop_events import ids
from fedloop_events.errors import LogError
from fedloop_events.logs.port import EventLog
from fedloop_events.types import EpochStarted, Payload
from fedloop_events.writer import EventWriter


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
    """Append `drafts`, all in one, and see to it that each is decided: `missing` reads on, and gives those that are not.

    The id of a decision may be taken by a fenced server's event, which counts for nothing: then it is made under an id of this
    `epoch`'s own. Raises LogError if the log does not show even that.
    """
    for own in ((), (epoch,)):
        if not drafts:
            return
        log.append([writer.event(each.payload, id=ids.derived_id(*each.what, *own)) for each in drafts])
        drafts = missing(drafts)
    if drafts:
        raise LogError(
            f"the log does not show the {drafts[0].payload.type_name} that this server has just decided",
            hint="is it a copy, or being restored?",
        )


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
