"""What keeps a deployment from working, or stands open: this machine, the folders, the log, the blobs. Nothing is changed.

Each check has a bound and none raises: what cannot be checked is a finding. No finding shows a secret.
"""

from __future__ import annotations

import platform
import shutil
import ssl
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from email.utils import parsedate_to_datetime
from importlib.metadata import version
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, urlsplit

from fedloop_events import locations
from fedloop_events.errors import FedloopError
from fedloop_events.locations import DeploymentLocation
from fedloop_events.types import BlobRef

from fedloop_cli.doctor import findings
from fedloop_cli.doctor.findings import Finding, Level

GIVE_UP_S: Final = 60.0
"""How long one check may take with all its questions."""
FULL_BYTES: Final = 100 << 20
SCARCE_BYTES: Final = 2 << 30


def diagnose(directory: Path | None, log: str | None, blobs: str | None, store: Path | None) -> Iterator[Finding]:
    """Check this machine, and of a deployment and of a device what is given; a device's store names its deployment."""
    yield from _within("versions", _versions)
    folders = [each for each in (directory, store) if each is not None]
    places: list[DeploymentLocation] = []
    if store is not None:
        yield from _within("store", _store, store, places)
    if directory is not None:
        yield from _within("server", _server, directory)
    if log is not None or (directory is not None and directory.is_dir()):
        yield from _within("place", _located, directory, log, blobs, places)
    for place in places[-1:]:
        folders += [Path(each) for each in (place.log, place.blobs) if each is not None and not locations.is_url(each)]
        found = list(_within("log", _log, place.log))
        yield from found
        if directory is not None and all(each.level != "fail" for each in found):
            yield from _within("rounds", _rounds, directory, place)
        if place.blobs is not None and place.blobs != place.log:
            yield from _within("blobs", _blobs, place.blobs)
    yield from _within("disk", _disks, folders or [Path()])


def _located(directory: Path | None, log: str | None, blobs: str | None, places: list[DeploymentLocation]) -> Iterator[Finding]:
    places.append(locations.locate(directory, log, blobs))
    yield from ()


def _within(subject: str, check: Callable[..., Iterator[Finding]], *arguments: object) -> Iterator[Finding]:
    """What `check` finds in time. Libraries below it wait as long as they like, so it runs in a thread of its own."""
    found: list[Finding] = []

    def collect() -> None:
        try:
            found.extend(check(*arguments))
        except FedloopError as error:
            what = f"{error.message}: {error.cause}" if error.cause else error.message
            found.append(Finding(subject, "fail", what, error.hint or "name another one, or restore this one from a backup"))
        except ModuleNotFoundError as error:
            found.append(Finding(subject, "fail", f"it needs the package {error.name}", "pip install 'fedloop[all]'"))
        except Exception as error:
            # Its text may quote what a library was given.
            hint = "check what it names and who may read that; if both are right, report this as a defect"
            found.append(Finding(subject, "fail", f"it cannot be checked ({type(error).__name__})", hint))

    thread = threading.Thread(target=collect, daemon=True)
    thread.start()
    thread.join(GIVE_UP_S)
    if thread.is_alive():
        found = [*found, Finding(subject, "fail", f"no answer within {GIVE_UP_S:.0f} s", "is it started, and the address right?")]
    yield from found


def _versions() -> Iterator[Finding]:
    import apsw

    program = f"fedloop {version('fedloop')}, Python {platform.python_version()}, {platform.system()} {platform.release()}"
    yield Finding("versions", "ok", program)
    yield findings.sqlite("versions", apsw.sqlite_lib_version())


def _server(directory: Path) -> Iterator[Finding]:
    from fedloop_server.deployment import KEY_FILE, SERVER_FOLDER

    if not directory.is_dir():
        yield Finding(
            "server", "fail", f"there is no folder {directory}", f"{locations.how_to_make(str(directory))} makes a deployment"
        )
    folder = directory / SERVER_FOLDER
    yield from findings.modes("server", [folder, folder / KEY_FILE])
    others = sorted(path for path in folder.glob("*") if path.name != KEY_FILE)
    yield from (found for found in findings.modes("server", others) if found.level != "ok")


def _rounds(directory: Path, place: DeploymentLocation) -> Iterator[Finding]:
    from fedloop_server.deployment import read_config
    from fedloop_server.operations import awaiting, opening
    from fedloop_server.operations.followed import Followed

    with closing(opening.open_log(place, directory)) as log:
        found = awaiting.now(Followed(log), read_config(directory))
    yield Finding("rounds", "warn" if found.hint else "ok", found.line, found.hint)


def _store(store: Path, places: list[DeploymentLocation]) -> Iterator[Finding]:
    from fedloop_clients.enrolment import open_store
    from fedloop_clients.keys import KEY_FILE
    from fedloop_clients.store import FILE_NAME

    yield from findings.modes("store", [store, store / FILE_NAME, store / KEY_FILE])
    opened, identity = open_store(store)
    opened.close()
    yield Finding("store", "ok", f"{store} is the device {identity.client_id}, and its key opens it")
    places.append(identity.place)


def _disks(folders: Iterable[Path]) -> Iterator[Finding]:
    seen = set()
    for folder in folders:
        there = next(each for each in (folder.absolute(), *folder.absolute().parents) if each.exists())
        device = there.stat().st_dev
        if device not in seen:
            seen.add(device)
            free = shutil.disk_usage(there).free
            level: Level = "fail" if free < FULL_BYTES else "warn" if free < SCARCE_BYTES else "ok"
            hint = "make room: on a full disk nothing is appended" if level != "ok" else ""
            yield Finding("disk", level, f"{free / 1e9:,.1f} GB free at {there}", hint)


def _log(location: str) -> Iterator[Finding]:
    scheme = location.partition("://")[0] if locations.is_url(location) else ""
    if scheme == "kafka":
        from fedloop_cli.doctor.cluster import cluster

        yield from cluster(location)
    elif scheme:
        yield from _gateway(location)
    else:
        path = Path(location) / locations.LOG_FILE
        with closing(locations.open_log(location)) as log:
            yield Finding("log", "ok", f"{path} opens")
            yield from findings.log_clock(log)
            yield from findings.stamps(log)
        yield from findings.modes("log", [path, *(path.with_name(path.name + end) for end in ("-wal", "-shm"))])


def _gateway(location: str) -> Iterator[Finding]:
    from fedloop_events.logs.http.transport import Transport

    transport = Transport(location, timeout_s=findings.ANSWER_S)
    url = urlsplit(location)
    if url.scheme == "https":
        files = parse_qs(url.query).get("ca", [None])
        tls = ssl.create_default_context(cafile=files[0])
        with findings.connected(url.hostname or "", url.port or 443, tls) as connection:
            yield from findings.served("gateway", url.netloc, connection)
    with closing(transport):
        answer = transport.call("GET", "/v1/deployment")
    yield Finding("gateway", "ok", f"{url.scheme}://{url.netloc} answers for a deployment")
    if "date" in answer.headers:
        yield findings.clock("the gateway", parsedate_to_datetime(answer.headers["date"]).timestamp() - time.time())


def _blobs(location: str) -> Iterator[Finding]:
    if not locations.is_url(location) and not Path(location).is_dir():
        yield Finding("blobs", "fail", f"there is no folder {location}", "restore it: the log names what was in it")
        return
    locations.open_blobs(location).exists(BlobRef("0" * 64, 0))
    yield Finding("blobs", "ok", f"{location} answers")
