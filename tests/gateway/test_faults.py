"""What a client of a gateway meets: kills, absence, wrong certificates, forks, a log that is away."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import quote

import pytest
import samples
from fedloop_cli.provisioning.certificates import make_ca
from fedloop_events import topics
from fedloop_events.envelope import Event
from fedloop_events.errors import (
    InvalidEventError,
    LogError,
    NotAllowedError,
    UnreachableError,
    UsageError,
)
from fedloop_events.locations import open_log
from fedloop_events.logs.http import GatewayLog, transport
from fedloop_events.logs.port import START, Batch, Position, read_all
from fedloop_events.logs.sqlite import SqliteLog
from fedloop_server.gateway import Limits
from gateway.harness import Raw, Served, code, provision, serving


class Command:
    """`fedloop gateway` in a process of its own, at one address for good."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, 0
        ca = make_ca(folder / "tls")
        self.issued = ca.issue("gateway", ["localhost"], folder / "tls")
        self.ca = ca.certificate
        self.start()

    @property
    def address(self) -> str:
        return f"https://localhost:{self.port}"

    @property
    def url(self) -> str:
        return f"{self.address}?ca={quote(str(self.ca))}"

    def start(self) -> None:
        tls = ("--tls-cert", str(self.issued.certificate), "--tls-key", str(self.issued.key))
        arguments = ("gateway", str(self.folder / "deployment"), "--port", str(self.port), "--json", *tls)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "fedloop_cli.main", *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.port = int(line.partition('"address":"https://')[2].partition('"')[0].rpartition(":")[2])

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        status = self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status


@pytest.fixture
def command(tmp_path: Path) -> Iterator[Command]:
    log = open_log(tmp_path / "deployment", create=True)
    provision(log, *(f"device-{number}" for number in range(3)))
    log.close()
    running = Command(tmp_path)
    yield running
    with suppress(ProcessLookupError):
        running.end(signal.SIGKILL)


@pytest.mark.slow
def test_kills_of_the_gateway_lose_nothing_that_was_acknowledged_and_double_nothing(command: Command, tmp_path: Path) -> None:
    acknowledged: list[str] = []
    stop = threading.Event()

    def append(name: str) -> None:
        log = GatewayLog(command.url, identity=(name, samples.key(name)))
        number = 1
        while not stop.is_set():
            events = [samples.signed(samples.feedback(number + part, name)) for part in range(3)]
            log.append(events)
            acknowledged.extend(event.id for event in events)
            number += 3
        log.close()

    threads = [threading.Thread(target=append, args=(f"device-{number}",)) for number in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(3):
        _more(acknowledged, 60)
        assert command.end(signal.SIGKILL) == -signal.SIGKILL
        command.start()
    _more(acknowledged, 60)
    stop.set()
    for thread in threads:
        thread.join(60)
    log = open_log(tmp_path / "deployment")
    held = Counter(record.id for record in read_all(log, (topics.FEEDBACK,)))
    log.close()
    assert set(acknowledged) <= set(held)
    assert set(held.values()) == {1}
    assert len(held) <= len(acknowledged) + 9


def test_sigterm_answers_who_waits_and_ends_with_status_0(command: Command) -> None:
    raw, answers = Raw(command.address, command.ca), list[int]()
    waiting = threading.Thread(
        target=lambda: answers.append(raw("GET", "/v1/events?after=log:999&wait_s=25", "device-0").status_code)
    )
    waiting.start()
    quick = Raw(command.address, command.ca)
    begin = time.monotonic()
    while quick("GET", "/v1/end", "device-0").status_code == 200 and time.monotonic() < begin + 0.3:
        pass  # until the other one waits
    assert command.end(signal.SIGTERM) == 0
    waiting.join(20)
    assert answers == [200]
    assert time.monotonic() - begin < 15
    raw.close()
    quick.close()


def test_who_is_not_the_gateway_is_not_believed(command: Command, tmp_path: Path) -> None:
    other = make_ca(tmp_path / "other").certificate
    for url in (
        f"https://localhost:{command.port}",
        f"https://localhost:{command.port}?ca={quote(str(other))}",
        f"https://127.0.0.1:{command.port}?ca={quote(str(command.ca))}",
    ):
        begin = time.monotonic()
        with pytest.raises(UnreachableError, match="no certificate that can be trusted"):
            GatewayLog(url, timeout_s=20).end()
        assert time.monotonic() - begin < 5


@pytest.mark.parametrize(
    "url",
    [
        "http://example.org",
        "http://10.0.0.1:8443",
        "https://",
        "https://user:secret@example.org",
        "https://example.org/path",
        "https://example.org?other=1",
        "https://example.org:0",
        "https://example.org:99999999",
        "https://example.org#x",
        "https://example.org?ca=/does/not/exist",
    ],
)
def test_a_location_that_is_none_is_refused_without_its_secrets(url: str) -> None:
    with pytest.raises(UsageError) as refused:
        GatewayLog(url)
    assert "secret" not in f"{refused.value.message} {refused.value.cause} {refused.value.hint}"


def test_a_gateway_that_is_away_is_unreachable_in_time() -> None:
    begin = time.monotonic()
    log = GatewayLog("http://127.0.0.1:9", identity=("a", samples.key("a")), timeout_s=0.5)
    for call in (log.end, log.read, lambda: log.append([samples.signed(samples.feedback(1))])):
        with pytest.raises(UnreachableError, match="does not answer"):
            call()
    assert time.monotonic() - begin < 5
    log.close()
    with pytest.raises(LogError, match="closed"):
        log.end()


def test_a_clock_that_is_wrong_is_set_right(shared: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    real = time.time
    wrong = SimpleNamespace(time=lambda: real() - 5_000, monotonic=time.monotonic, sleep=time.sleep)
    monkeypatch.setattr(transport, "time", wrong)
    log = shared.as_client("device-1")
    assert log.end().offsets
    assert 4_990 < log._transport._skew_s < 5_010


def test_a_stranger_reads_the_deployment_and_nothing_else(shared: Served) -> None:
    log = GatewayLog(shared.url)
    batch = log.read()
    assert [record.type for record in batch.records] == ["io.fedloop.deployment.created.v1"]
    assert log.read(after=batch.position).records == []
    assert log.read((topics.ROUNDS,)).records == []
    assert log.end() == batch.position
    with pytest.raises(NotAllowedError, match="may not append to the topic feedback"):
        log.append([samples.signed(samples.feedback(1))])


def test_what_no_log_may_hold_is_refused_before_it_is_sent(shared: Served) -> None:
    import msgspec

    good = samples.signed(samples.feedback(1))
    log = shared.as_client("device-1")
    for change in ({"id": "0"}, {"data": b""}, {"topic": "x"}, {"time_s": -1}):
        with pytest.raises(InvalidEventError):
            log.append([msgspec.structs.replace(good, **change)])
    with pytest.raises(InvalidEventError, match="not validly signed"):
        log.append([samples.event(samples.feedback())])
    with pytest.raises(UsageError, match="batch holds 1 to 2,000"):
        shared.as_client("device-1").append([good] * 2_001)


def test_data_that_is_not_json_or_not_bare_survives(tmp_path: Path) -> None:
    """Anything may stand in a log; what is signed is its bytes."""
    import msgspec

    odd = [b'{"a": 1}', b' {"a":1} ', b"\xff\xfe", b'{"a":"\xff"}', b"[" * 5_000, b"nul", b'"\\ud800"', b'{"a":1}\n']
    with serving(tmp_path, "device-1") as served:
        base = samples.signed(samples.epoch())
        events = [msgspec.structs.replace(base, id=f"{number:032x}", data=data) for number, data in enumerate(odd)]
        served.log.append(events)
        read = list(read_all(served.as_client("server"), (topics.ROUNDS,)))
        assert [record.data for record in read] == odd
        assert list(read_all(served.as_client("device-1"), (topics.ROUNDS,))) == []


class AwayLog(SqliteLog):
    """A log that takes no appends, or takes its time over them."""

    away = False
    gate: threading.Event | None = None
    appends = 0

    def append(self, events: Sequence[Event]) -> None:
        if self.gate is not None:
            self.gate.wait(20)
        if self.away:
            raise UnreachableError("away")
        self.appends += 1
        super().append(events)

    def read(
        self, topics: Collection[str] = topics.ALL, after: Position = START, *, limit: int = 1000, wait_s: float = 0.0
    ) -> Batch:
        if self.away:
            raise UnreachableError("away")
        return super().read(topics, after, limit=limit, wait_s=wait_s)


@contextmanager
def before(log: AwayLog, folder: Path, limits: Limits | None = None) -> Iterator[Served]:
    with serving(folder, "device-1", "device-2", log=log, limits=limits) as served:
        yield served
    log.close()


def test_a_log_that_is_away_is_waited_for(tmp_path: Path) -> None:
    log = AwayLog(tmp_path / "log.sqlite")
    with before(log, tmp_path) as served:
        log.away = True
        assert code(served.raw.append("device-1", samples.signed(samples.feedback(1)))) == "log-away"
        _until(lambda: served.raw("GET", "/healthz").status_code == 503)
        assert code(served.raw("GET", "/healthz")) == "log-away"
        threading.Timer(0.5, setattr, (log, "away", False)).start()
        served.as_client("device-1").append([samples.signed(samples.feedback(1))])
        _until(lambda: served.raw("GET", "/healthz").status_code == 200)
        assert [record.topic for record in served.as_client("device-1").read((topics.FEEDBACK,)).records] == [topics.FEEDBACK]


def test_appends_that_wait_together_are_one_and_too_many_are_refused(tmp_path: Path) -> None:
    log = AwayLog(tmp_path / "log.sqlite")
    with before(log, tmp_path, Limits(queued_events=12)) as served:
        log.gate, log.appends = threading.Event(), 0
        committer = served.app.state.gateway._committer
        threads = [
            threading.Thread(target=served.as_client("server").append, args=([samples.signed(samples.feedback(number))],))
            for number in range(12)
        ]
        for thread in threads:
            thread.start()
        _until(lambda: committer._queued == 12)
        assert code(served.raw.append("device-2", samples.signed(samples.feedback(1, "device-2")))) == "busy"
        log.gate.set()
        for thread in threads:
            thread.join(20)
        assert len(list(read_all(log, (topics.FEEDBACK,)))) == 12
        assert log.appends <= 3


def test_a_forked_child_connects_anew(command: Command, in_child: Callable[[Callable[[], object]], int]) -> None:
    log = GatewayLog(command.url, identity=("device-0", samples.key("device-0")))
    log.append([samples.signed(samples.feedback(1, "device-0"))])
    assert in_child(lambda: log.append([samples.signed(samples.feedback(2, "device-0"))])) == 0
    log.append([samples.signed(samples.feedback(3, "device-0"))])
    assert len(log.read((topics.FEEDBACK,)).records) == 3
    log.close()


def _more(items: Sequence[object], count: int) -> None:
    """Wait until there are so many more."""
    least = len(items) + count
    _until(lambda: len(items) >= least)


def _until(condition: Callable[[], object], deadline_s: float = 60) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.005)
