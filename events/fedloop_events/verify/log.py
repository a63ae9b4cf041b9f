"""Whether a log is whole, and everything in it authentic: its events, and every blob that they name.

The log may come from anybody: it is opened for reading alone, and nothing in it is obeyed. What the check cannot see is in the
report, by adapter (`UNSEEN`).
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Final

from fedloop_events import locations, topics
from fedloop_events.blobs.store import BlobStore
from fedloop_events.locations import DeploymentLocation
from fedloop_events.logs.port import EventLog, read_all
from fedloop_events.verify import sqlite_file
from fedloop_events.verify.checks import LogCheck, VerifyReport

_ALWAYS: Final = (
    "events cut off at the end of the log, and a history written anew by whoever holds the server's key and every client's: "
    "both need signed checkpoints kept elsewhere, which this version does not make"
)
UNSEEN: Final = {
    "": _ALWAYS,
    "kafka": f"what retention has removed; decisions of the server that an administrator of the brokers removed; {_ALWAYS}",
    "https": f"what the gateway holds back; {_ALWAYS}",
    "http": f"what the gateway holds back; {_ALWAYS}",
}
"""By the scheme of the log's location."""
NO_BLOBS: Final = "the blobs, for nothing says where they are (--blobs); "


def verify(place: DeploymentLocation, open_log: Callable[[], EventLog], open_blobs: Callable[[], BlobStore]) -> VerifyReport:
    """Read the whole log at `place` and every blob that it names. The embedded log's file is read as it is, any other log through
    `open_log`; the blobs through `open_blobs`, if there are any to read.

    Raises `UsageError` if there is no log, `LogError` if what is there is none, or cannot be read at all, and UnreachableError.
    """
    scheme = locations.scheme_of(place.log)
    report = VerifyReport(place.log, not_seen=UNSEEN[scheme] if place.blobs is not None else NO_BLOBS + UNSEEN[scheme])
    check = LogCheck(report, unique_ids=not scheme, held_back=scheme in {"http", "https"})
    if not scheme:
        sqlite_file.read(Path(place.log) / locations.LOG_FILE, check)
    else:
        log = open_log()
        # Who is enrolled comes first: across topics a log has no order that could be relied on.
        for record in chain(
            read_all(log, (topics.CLIENTS,)), read_all(log, [each for each in topics.ALL if each != topics.CLIENTS])
        ):
            check.event(record)
    check.end()
    if place.blobs is not None and check.blobs:
        if not locations.is_url(place.blobs) and not Path(place.blobs).is_dir():
            check.wrong(f"the folder of blobs is absent: {place.blobs}")
        else:
            check.read_blobs(open_blobs())
    report.verified = report.wrong == 0
    return report
