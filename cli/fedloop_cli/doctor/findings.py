"""What a check can find, and the checks that many things share: file modes, certificates, clocks, versions of SQLite."""

from __future__ import annotations

import socket
import ssl
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Final, Literal

from cryptography import x509
from fedloop_events import topics
from fedloop_events.envelope import Record
from fedloop_events.errors import UnreachableError, UsageError
from fedloop_events.files import quoted
from fedloop_events.logs.port import EventLog, Position
from msgspec import Struct

Level = Literal["ok", "warn", "fail"]

ANSWER_S: Final = 10.0
"""How long a broker, a gateway or a blob store may take for one answer."""
SKEW_S: Final = 5.0
"""More than clocks differ that are set over the network."""
_LOOKED_BACK: Final = 20_000
"""Events of a stream whose stamps are compared: a second's reading."""
RENEW: Final = timedelta(days=30)
_READ_BY_ALL: Final = (topics.CLIENTS, topics.ROUNDS, topics.RELEASES)

# The race of a WAL reset that loses commits: https://sqlite.org/wal.html#walresetbug, fixed in 3.51.3 and back-ported.
_FIXED: Final = (3, 51, 3)
_BACKPORTS: Final = ((3, 50, 7), (3, 44, 6))


class Finding(Struct, frozen=True):
    """What was found about `subject`, and what to do. A `fail` breaks a promise; a `warn` may, or soon will."""

    subject: str
    level: Level
    what: str
    hint: str = ""


def modes(subject: str, paths: Iterable[Path]) -> Iterator[Finding]:
    """Whether files and folders that hold secrets are their owner's alone. One that is absent is not looked at."""
    for path in paths:
        try:
            mode = stat.S_IMODE(path.stat().st_mode)
        except FileNotFoundError:
            continue
        if mode & (stat.S_IRWXG | stat.S_IRWXO):
            right = "700" if path.is_dir() else "600"
            yield Finding(subject, "fail", f"{path} is open to others (mode {mode:04o})", f"chmod {right} {quoted(path)}")
        else:
            yield Finding(subject, "ok", f"{path} is its owner's alone")


def expiry(subject: str, what: str, end: datetime) -> Finding:
    """Whether a certificate holds, and for long enough."""
    left, day = end - datetime.now(UTC), end.strftime("%Y-%m-%d")
    if left <= timedelta(0):
        return Finding(subject, "fail", f"{what} expired on {day}", "issue a new one, and restart who serves with it")
    if left < RENEW:
        return Finding(subject, "warn", f"{what} expires on {day}", "issue a new one before that")
    return Finding(subject, "ok", f"{what} holds until {day}")


def valid_until(path: Path) -> datetime:
    """When the first certificate in a PEM file ends (UTC). Raises `UsageError` if there is none."""
    try:
        return x509.load_pem_x509_certificate(path.read_bytes()).not_valid_after_utc
    except OSError as error:
        raise UsageError(f"the certificate {path} cannot be read", cause=error.strerror or "") from error
    except ValueError:
        raise UsageError(f"{path} holds no certificate") from None


def clock(of: str, ahead_s: float) -> Finding:
    """`ahead_s`: by how much the clock of `of` is ahead of this machine's."""
    if abs(ahead_s) <= SKEW_S:
        return Finding("clock", "ok", f"this machine's agrees with {of}")
    direction = "behind" if ahead_s > 0 else "ahead of"
    return Finding(
        "clock", "warn", f"this machine's is {abs(ahead_s):,.0f} s {direction} {of}", "set both over the network (NTP)"
    )


def log_clock(log: EventLog) -> Iterator[Finding]:
    """This machine's clock against the log's: the newest event is of the past, so only a clock that is behind shows."""
    before = Position({stream: max(0, offset - 1) for stream, offset in log.end().offsets.items()})
    stamps = [record.appended_ms for record in log.read(_READ_BY_ALL, before).records]
    if stamps:
        yield clock("the log", max(0.0, max(stamps) / 1000 - time.time()))


def stamps(log: EventLog) -> Iterator[Finding]:
    """Whether the last events of each stream are stamped in the order in which they stand: an embedded log has its writers'."""
    at = Position({stream: max(0, offset - _LOOKED_BACK) for stream, offset in log.end().offsets.items()})
    newest: dict[str, Record] = {}
    worst: tuple[int, Record, Record] | None = None
    while (batch := log.read(after=at)).records:
        at = batch.position
        for record in batch.records:
            before = newest.setdefault(record.stream, record)
            ahead_ms = before.appended_ms - record.appended_ms
            if ahead_ms <= 0:
                newest[record.stream] = record
            elif ahead_ms > SKEW_S * 1000 and (worst is None or ahead_ms > worst[0]):
                worst = ahead_ms, before, record
    if worst is not None:
        ahead_ms, early, late = worst
        yield Finding(
            "clock",
            "warn",
            f"event {early.id} by {_author(early)} at {early.offset} of {early.stream} is stamped {ahead_ms / 1000:,.0f} s "
            f"later than event {late.id} by {_author(late)} at {late.offset}, which was appended after it",
            "set the clocks of both machines over the network (NTP)",
        )


def _author(record: Record) -> str:
    return repr(record.source.rpartition("/")[2])


def sqlite(subject: str, found: str) -> Finding:
    """Whether a build of SQLite keeps what it has committed."""
    number = tuple(map(int, found.split(".")[:3]))
    if number >= _FIXED or any(number[:2] == each[:2] and number >= each for each in _BACKPORTS):
        return Finding(subject, "ok", f"SQLite {found}, with the fix of the WAL reset")
    return Finding(subject, "fail", f"SQLite {found} can lose commits (the WAL reset)", "pip install --upgrade apsw")


@contextmanager
def connected(host: str, port: int, tls: ssl.SSLContext | None) -> Iterator[socket.socket]:
    """A connection whose every wait is bounded. Raises `UnreachableError`, which names what is wrong with a certificate."""
    where = f"{host}:{port}"
    try:
        with socket.create_connection((host, port), timeout=ANSWER_S) as plain:
            if tls is None:
                yield plain
                return
            with tls.wrap_socket(plain, server_hostname=host) as secured:
                yield secured
    except ssl.SSLCertVerificationError as error:
        raise UnreachableError(
            f"the certificate of {where} does not hold",
            cause=error.verify_message,
            hint="issue it anew with the host's name and a date to come, or name the authority that issued it",
        ) from None
    except ssl.SSLError as error:
        raise UnreachableError(f"{where} does not speak TLS as it should", cause=error.reason or "") from None
    except OSError as error:
        raise UnreachableError(
            f"{where} does not answer", cause=error.strerror or type(error).__name__, hint="is it started, and the address right?"
        ) from None


def served(subject: str, where: str, connection: socket.socket) -> Iterator[Finding]:
    """How long the certificate at the other end holds, if it has shown one."""
    if isinstance(connection, ssl.SSLSocket):
        found = connection.getpeercert()
        assert found is not None
        end = datetime.fromtimestamp(ssl.cert_time_to_seconds(str(found["notAfter"])), UTC)
        yield expiry(subject, f"the certificate of {where}", end)
