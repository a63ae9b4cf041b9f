"""Where a deployment is: from a folder to its log and its blobs."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from fedloop_events.blobs import BlobStore
from fedloop_events.errors import UsageError
from fedloop_events.log import EventLog
from fedloop_events.sqlite import SqliteLog

LOG_FILE: Final = "log.sqlite"
BLOB_FOLDER: Final = "blobs"


def open_log(location: str | Path, *, create: bool = False) -> EventLog:
    """The log of the deployment in the folder `location`; only with `create` is one made.

    Raises `UsageError` if there is none, `LogError` if the file is something else.
    """
    path = _folder(location) / LOG_FILE
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
    elif not path.is_file():
        raise UsageError(f"there is no deployment in {location}", hint=f"fedloop server init {location} makes one")
    return SqliteLog(path)


def open_blobs(location: str | Path) -> BlobStore:
    """The blob store of the deployment in the folder `location`."""
    return BlobStore(_folder(location) / BLOB_FOLDER)


def _folder(location: str | Path) -> Path:
    if "://" in str(location):
        raise UsageError(f"{location} is no folder", hint="this version keeps its log in a folder")
    return Path(location)
