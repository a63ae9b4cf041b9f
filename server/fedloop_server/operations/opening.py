"""Opening a deployment's log and blobs to read them."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from fedloop_events import locations
from fedloop_events.blobs.store import BlobStore, Identifiable
from fedloop_events.errors import UsageError
from fedloop_events.locations import DeploymentLocation
from fedloop_events.logs.port import EventLog

T = TypeVar("T")


def open_log(place: DeploymentLocation, directory: Path | None) -> EventLog:
    """The log at `place`. A gateway shows the whole log to the server alone, whose key is in the deployment's folder `directory`.

    Raises `UsageError` if there is none, or the server's key is needed and not at hand; UnreachableError if it does not answer.
    """
    return _identified(locations.open_log(place.log), directory)


def open_blobs(place: DeploymentLocation, directory: Path | None) -> BlobStore:
    """The blobs, in the same way."""
    blobs = locations.open_blobs(place.blobs)
    return _identified(blobs, directory) if locations.scheme_of(blobs.url) in {"http", "https"} else blobs


def _identified(opened: T, directory: Path | None) -> T:
    if isinstance(opened, Identifiable):
        from fedloop_events.signatures import SigningKey

        from fedloop_server.deployment import KEY_FILE, SERVER_FOLDER

        key_file = None if directory is None else directory / SERVER_FOLDER / KEY_FILE
        if key_file is None or not key_file.is_file():
            raise UsageError("a gateway shows the log to the server alone", hint="name DIR, the folder with the server's key")
        opened.identify("server", SigningKey.load(key_file))
    return opened
