"""Where a deployment is: one location for its log, one for its blobs.

A log is a folder (its file is `log.sqlite`), `kafka://HOST:PORT[,HOST:PORT…][/PREFIX][?config=FILE]`, or a gateway,
`https://HOST[:PORT][?ca=FILE]` (`http://` only to this machine). Blobs are a folder, any fsspec URL, or the gateway. A folder can
name other places in its `deployment.toml`. No location holds a secret: one that does is refused, and never printed.
"""

from __future__ import annotations

import json
import re
import tomllib
from importlib.util import find_spec
from pathlib import Path
from typing import Final, NoReturn
from urllib.parse import parse_qsl, quote

import msgspec
from msgspec import Struct

from fedloop_events.blobs.store import BlobStore
from fedloop_events.errors import UsageError
from fedloop_events.files import quoted
from fedloop_events.logs.port import EventLog
from fedloop_events.logs.sqlite import SqliteLog

LOG_FILE: Final = "log.sqlite"
BLOB_FOLDER: Final = "blobs"
PLACE_FILE: Final = "deployment.toml"
SERVER_FOLDER: Final = "server"
"""Within a deployment's folder: what is the server's alone."""

_FORMS: Final = {
    "kafka": ("config", "kafka://HOST:PORT[,HOST:PORT…][/PREFIX][?config=FILE]"),
    "https": ("ca", "https://HOST[:PORT][?ca=FILE]"),
    "http": ("", "http://HOST[:PORT]"),
}
"""By scheme: the key that the query may have, which names a file, and the form in words. Each adapter checks the rest."""

_GATEWAY: Final = ("https", "http")
_EXTRAS: Final = {
    "kafka": ("confluent_kafka", "kafka"),
    "https": ("httpx", "gateway"),
    "http": ("httpx", "gateway"),
    "s3": ("s3fs", "s3"),
}
"""By scheme: the module that it takes, and the extra of the distribution that brings it."""


class DeploymentLocation(Struct, frozen=True):
    """A deployment's log and blobs. `blobs` None: nothing says where they are, so only the log can be read."""

    log: str
    blobs: str | None


class _Stored(Struct, frozen=True, forbid_unknown_fields=True):
    """A folder's `deployment.toml`. Paths in it that are relative are relative to the folder."""

    log: str | None = None
    blobs: str | None = None


def locate(directory: Path | None, log: str | Path | None = None, blobs: str | Path | None = None) -> DeploymentLocation:
    """Where the deployment is that the folder `directory`, or the location of its log, names.

    A location that is given outweighs the folder's `deployment.toml`, which outweighs the folder itself; a folder given as `log`
    is looked into in the same way, and a gateway brings its own blobs. Files that a location names become absolute.

    Raises `UsageError` if neither is given, for a location that is malformed or holds a secret, and if the folder holds a log of
    its own and `log` is another.
    """
    given = None if log is None else str(log)
    home = directory if given is None else None if is_url(given) else Path(given)
    if home is None and given is None:
        raise UsageError("nothing says which deployment", hint="name its folder, or its log with --log")
    gateway = given is not None and scheme_of(given) in _GATEWAY
    if directory is not None and not gateway and not _same(directory, home) and (directory / LOG_FILE).exists():
        raise UsageError(f"{directory} holds a log of its own, and another one is named", hint="name one of them")
    beside = home if home is not None else directory
    stored = _read(beside) if beside is not None and not gateway else _Stored()
    found = given if home is None else stored.log or str(home)
    assert found is not None
    found = check_log(found)
    found_blobs = str(blobs) if blobs is not None else stored.blobs or _default_blobs(found)
    return DeploymentLocation(found, None if found_blobs is None else check_blobs(found_blobs))


def remembered(directory: Path, place: DeploymentLocation) -> str:
    """The text of the `deployment.toml` with which `directory` alone names `place`; "" if it needs none."""
    lines = []
    if place.log != str(directory):
        lines.append(f"log = {_quoted(_portable(directory, place.log))}\n")
    if place.blobs is not None and place.blobs != _default_blobs(place.log):
        lines.append(f"blobs = {_quoted(_portable(directory, place.blobs))}\n")
    return "".join(lines)


def open_log(location: str | Path, *, create: bool = False) -> EventLog:
    """The log at `location`; only with `create` is one made (a file, or the topics that are missing).

    Raises `UsageError` if there is none or the location is malformed, `LogError` if what is there is something else,
    `UnreachableError` if it does not answer in time.
    """
    location = check_log(str(location))
    scheme = scheme_of(location)
    _require(scheme)
    if scheme == "kafka":
        from fedloop_events.logs.kafka import KafkaLog

        return KafkaLog(location, create=create)
    if scheme:
        if create:
            raise UsageError("a gateway serves a log that is there already", hint="name the log itself")
        from fedloop_events.logs.http import GatewayLog

        return GatewayLog(location)
    path = Path(location) / LOG_FILE
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
    elif not path.is_file():
        _refuse_absent(Path(location))
    return SqliteLog(path)


def open_blobs(location: str | Path | None) -> BlobStore:
    """The blob store at `location`, as `DeploymentLocation.blobs` names it.

    Raises `UsageError` if nothing names it or the location is malformed.
    """
    if location is None:
        raise UsageError("nothing says where the blobs are", hint="name their folder or URL with --blobs")
    location = check_blobs(str(location))
    _require(scheme_of(location))
    return BlobStore(location)


def how_to_make(location: str) -> str:
    """The command with which an operator makes a deployment whose log is at `location`."""
    if not is_url(location):
        return f"`fedloop server init {quoted(location)} --test CSV`"
    if scheme_of(location) in _GATEWAY:
        return "`fedloop server init`, where its gateway is"
    return f"`fedloop server init DIR --log {location} --blobs BLOBS --test CSV`"


def is_url(location: str) -> bool:
    return "://" in location


def scheme_of(location: str) -> str:
    """ "" for a folder."""
    return location.partition("://")[0] if is_url(location) else ""


def check_log(location: str) -> str:
    """The location of a log, as it is kept: files that it names are absolute. Raises `UsageError` if it is malformed."""
    if not is_url(location):
        return location
    _check_text(location, "log")
    scheme = scheme_of(location)
    if scheme not in _FORMS:
        raise UsageError("the log's location is neither a folder nor a URL that a log can have", hint=_forms())
    return _with_absolute_file(location, scheme)


def check_blobs(location: str) -> str:
    """The same for the location of blobs."""
    if "::" in location or location.startswith("reference:"):
        raise UsageError("a blob store's URL must name one place, without chaining (`::`) or `reference:`")
    if not is_url(location):
        return location
    _check_text(location, "blob store")
    scheme = scheme_of(location)
    if scheme in _GATEWAY:
        return _with_absolute_file(location, scheme)
    if scheme == "kafka" or not re.fullmatch(r"[a-z][a-z0-9+]*", scheme):
        raise UsageError(
            "the blobs' location is neither a folder nor a URL that fsspec knows", hint="for example s3://BUCKET/PREFIX"
        )
    if "?" in location:
        raise UsageError("a blob store's URL has no query", hint="settings belong into the environment")
    return location


def _read(directory: Path) -> _Stored:
    path = directory / PLACE_FILE
    try:
        stored = msgspec.convert(tomllib.loads(path.read_text(encoding="utf-8")), _Stored)
    except (FileNotFoundError, NotADirectoryError):
        return _Stored()
    except (OSError, ValueError, msgspec.ValidationError):
        raise UsageError(f"{path} cannot be read", hint='it holds log = "…" and blobs = "…", or one of them') from None
    return _Stored(*(each if each is None or is_url(each) else str(directory / each) for each in (stored.log, stored.blobs)))


def _refuse_absent(folder: Path) -> NoReturn:
    """Another deployment in its place would look like it, and have another history."""
    if (folder / SERVER_FOLDER).is_dir():
        raise UsageError(
            f"the log of the deployment in {folder} is gone",
            hint=f"restore {folder / LOG_FILE} from a copy, or begin in another folder",
        )
    raise UsageError(
        f"there is no deployment in {folder}", hint=f"check the path; an operator makes one with {how_to_make(str(folder))}"
    )


def _same(folder: Path, other: Path | None) -> bool:
    return other is not None and folder.absolute() == other.absolute()


def _default_blobs(log: str) -> str | None:
    scheme = scheme_of(log)
    return str(Path(log) / BLOB_FOLDER) if not scheme else None if scheme == "kafka" else log


def _portable(directory: Path, location: str) -> str:
    """A folder within `directory` as seen from there, so that the two can move together; any other one absolute."""
    if is_url(location):
        return location
    path, root = Path(location).absolute(), directory.absolute()
    return str(path.relative_to(root) if path.is_relative_to(root) else path)


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _check_text(location: str, what: str) -> None:
    """Before anything else of a URL is looked at, or shown."""
    rest = location.partition("://")[2]
    if "@" in re.split(r"[/?#]", rest, maxsplit=1)[0]:
        raise UsageError(
            f"the {what}'s location names a user or a password",
            hint="secrets belong into a file (kafka://…?config=FILE) or the environment, and this one should be changed now",
        )
    if not location.isascii() or not location.isprintable() or set(' "#<>\\^`{|}') & set(location):
        raise UsageError(f"the {what}'s location holds a character that it cannot hold, or a fragment")


def _with_absolute_file(location: str, scheme: str) -> str:
    key, form = _FORMS[scheme]
    before, mark, query = location.partition("?")
    if not mark:
        return before
    try:
        ((name, file),) = parse_qsl(query, keep_blank_values=True, strict_parsing=True, errors="strict")
    except ValueError:
        name, file = "", ""
    if not key or name != key or not file or "\0" in file:
        raise UsageError(f"the {scheme} location has a setting that it cannot have", hint=f"its form is {form}")
    return f"{before}?{key}={quote(str(Path(file).expanduser().absolute()), safe='/')}"


def _require(scheme: str) -> None:
    module, extra = _EXTRAS.get(scheme, ("", ""))
    if module and find_spec(module) is None:
        raise UsageError(
            f"{scheme}:// needs the package {module}, which is not installed", hint=f"pip install 'fedloop[{extra}]'"
        )


def _forms() -> str:
    return f"it is a folder, or {', '.join(form for _, form in _FORMS.values())}"
