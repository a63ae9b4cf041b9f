"""Where a lake is: a folder, or `s3://BUCKET/PREFIX`; and the lock that its one writer holds."""

from __future__ import annotations

import fcntl
import hashlib
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from fedloop_events import locations
from fedloop_events.errors import UnreachableError, UsageError
from msgspec import Struct

FOLDER: Final = "lake"
"""Within a deployment's folder."""
_LOCK_FILE: Final = ".lock"
_NOT_IN_A_FOLDER: Final = "%[]*?\\"


class LakePlace(Struct, frozen=True):
    """`options` are deltalake's for the store; it takes keys, region and endpoint from the same variables as the blob store."""

    location: str
    options: dict[str, str]

    @property
    def scheme(self) -> str:
        return locations.scheme_of(self.location)

    def of(self, table: str) -> str:
        """Where a table is."""
        return f"{self.location}/{table}"

    def make(self, table: str) -> None:
        """Make the folder of a table, the operator's alone; a bucket needs none."""
        if not self.scheme:
            Path(self.of(table)).mkdir(parents=True, exist_ok=True, mode=0o700)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Be the one writer until the end, or the end of the process.

        The lock of a folder holds for whoever sees the folder, that of a bucket for this machine and user. Raises
        `UnreachableError`, which says who holds it.
        """
        path = self._lock_file()
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                holder = os.read(descriptor, 200).decode(errors="replace").strip()
                raise UnreachableError(
                    f"the lake in {self.location} is being written by another sync ({holder or 'which has just begun'})",
                    hint="a lake has one writer: wait until it ends, or end it",
                ) from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, f"process {os.getpid()} on {os.uname().nodename}\n".encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def _lock_file(self) -> Path:
        if self.scheme:
            name = hashlib.sha256(self.location.encode()).hexdigest()[:16]
            return Path(tempfile.gettempdir()) / f"fedloop-lake-{os.getuid()}-{name}.lock"
        folder = Path(self.location)
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise UsageError(f"the folder {folder} cannot be made", cause=error.strerror or "") from None
        return folder / _LOCK_FILE


def locate(directory: Path | None, location: str | None) -> LakePlace:
    """The lake that is named, by default the one in the deployment's folder. Raises `UsageError`, also without the extra."""
    _require()
    if location is None:
        if directory is None:
            raise UsageError("nothing says where the lake is", hint="name its folder or s3://BUCKET/PREFIX with --lake")
        location = str(directory / FOLDER)
    if not locations.is_url(location):
        return LakePlace(_folder(location), {})
    location = locations.check_blobs(location).rstrip("/")
    if locations.scheme_of(location) != "s3":
        raise UsageError("a lake's location is a folder or s3://BUCKET/PREFIX", hint="other stores can be mounted as a folder")
    return LakePlace(location, _s3_options())


def _folder(location: str) -> str:
    folder = str(Path(location).absolute())
    wrong = sorted({each for each in folder if each in _NOT_IN_A_FOLDER or not each.isprintable()})
    if wrong:
        raise UsageError(
            f"the lake's folder {folder!r} has {wrong[0]!r} in its name, which deltalake or DuckDB takes for something else",
            hint="name another folder with --lake",
        )
    return folder


def _s3_options() -> dict[str, str]:
    """What deltalake does not take from the environment by itself: whether the endpoint that is named there is without TLS."""
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    if not endpoint:
        return {}
    return {"aws_endpoint": endpoint, "allow_http": str(endpoint.startswith("http://")).lower()}


def _require() -> None:
    try:
        import deltalake  # noqa: F401
        import duckdb  # noqa: F401
    except ImportError as error:
        raise UsageError(
            f"the lake needs the package {error.name}, which is not installed", hint="pip install 'fedloop[lake]'"
        ) from None
