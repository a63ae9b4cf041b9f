"""Many connections at once: who holds them keeps nobody else out. 127.0.0.x are as many addresses."""

from __future__ import annotations

import contextlib
import ipaddress
import select
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
import samples
from fedloop_events.locations import open_log
from fedloop_events.logs.http import cloudevents
from fedloop_server.gateway import Limits, listening
from fedloop_server.gateway.connections import Connections, shared_address
from gateway.harness import Served, code, provision, serving
from hypothesis import given
from hypothesis import strategies as st

LIMITS = Limits(connections=24, connections_each=8)
HELLO = bytes.fromhex("1603010200010001fc0303") + bytes(32)
"""How a TLS handshake begins that does not go on."""

Opened = Callable[[str, int], list[socket.socket]]


def silent(served: Served, connection: socket.socket) -> socket.socket:
    return connection


def half_a_handshake(served: Served, connection: socket.socket) -> socket.socket:
    connection.sendall(HELLO)
    return connection


def a_handshake(served: Served, connection: socket.socket) -> socket.socket:
    return ssl.create_default_context(cafile=str(served.ca)).wrap_socket(connection, server_hostname="localhost")


def half_a_header(served: Served, connection: socket.socket) -> socket.socket:
    secure = a_handshake(served, connection)
    secure.sendall(b"GET /healthz HTTP/1.1\r\nhost: loc")
    return secure


def an_answer(served: Served, connection: socket.socket) -> socket.socket:
    secure = a_handshake(served, connection)
    secure.sendall(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n")
    assert secure.recv(2_000).startswith(b"HTTP/1.1 200 ")
    return secure


@contextlib.contextmanager
def opening(served: Served, prepare: Callable[[Served, socket.socket], socket.socket] = silent) -> Iterator[Opened]:
    """Connections from any address of this machine, which end with the test."""
    with contextlib.ExitStack() as stack:

        def opened(address: str, count: int) -> list[socket.socket]:
            made = []
            for _ in range(count):
                connection = socket.create_connection(("127.0.0.1", served.port), 20, source_address=(address, 0))
                made.append(stack.enter_context(prepare(served, connection)))
            return made

        yield opened


@pytest.mark.parametrize("prepare", [silent, half_a_handshake, a_handshake, half_a_header, an_answer])
def test_who_opens_more_than_its_bound_keeps_nobody_out(
    tmp_path: Path, prepare: Callable[[Served, socket.socket], socket.socket]
) -> None:
    with serving(tmp_path, "device-1", limits=LIMITS) as served, opening(served, prepare) as opened:
        attacking = opened("127.0.0.66", 60)
        assert _status(served, "127.0.0.2") == 200
        _until(lambda: len(ended(attacking)) == 60 - 8)
        assert _status(served, "127.0.0.66") == 200, "and not even its other programs"
        assert ended(attacking)[:52] == attacking[:52], "those that were idle for longest"


def test_when_the_whole_is_full_the_idle_ones_of_who_holds_most_give_way(tmp_path: Path) -> None:
    with serving(tmp_path, "device-1", limits=LIMITS) as served, opening(served, an_answer) as opened:
        few = [*opened("127.0.0.2", 1), *opened("127.0.0.3", 1)]
        many = [opened(f"127.0.0.{number}", 8) for number in (66, 67, 68)]
        assert len(served.connections) == 24
        for number in range(70, 80):
            opened(f"127.0.0.{number}", 1)
            assert _status(served, "127.0.0.4") == 200
        assert ended(few) == []
        assert all(ended(each) == each[: len(ended(each))] for each in many), "the oldest first"
        assert len(served.connections) <= 24


def test_a_connection_with_a_request_under_way_gives_way_to_nobody(tmp_path: Path) -> None:
    with serving(tmp_path, "device-1", limits=LIMITS) as served, opening(served) as opened:
        log, answers = served.as_client("device-1"), list[int]()
        after = log.read().position
        waiting = threading.Thread(target=lambda: answers.append(len(log.read(after=after, wait_s=20).records)))
        waiting.start()
        polls = served.app.state.gateway._polls
        _until(lambda: polls.get("device-1") == 1)
        opened("127.0.0.1", 100)
        for number in range(2, 12):
            opened(f"127.0.0.{number}", 8)
        assert _status(served, "127.0.0.99") == 200
        served.log.append([samples.signed(samples.feedback(1))])
        waiting.join(20)
        assert answers == [1]


def test_where_none_is_idle_a_new_one_is_refused_and_later_let_in(tmp_path: Path) -> None:
    limits = Limits(connections=6, connections_each=3)
    with serving(tmp_path, "device-1", limits=limits) as served, opening(served, a_handshake) as opened:
        position = cloudevents.encode_position(served.log.end())
        for secure in opened("127.0.0.5", 3):
            secure.sendall(_signed(served, f"/v1/events?wait_s=20&after={position}"))
        polls = served.app.state.gateway._polls
        _until(lambda: polls.get("device-1") == 3)
        with socket.create_connection(("127.0.0.1", served.port), 20, source_address=("127.0.0.5", 0)) as refused:
            assert refused.recv(1) == b""
        assert _status(served, "127.0.0.6") == 200
        served.log.append([samples.signed(samples.feedback(1))])
        _until(lambda: not polls)
        assert _status(served, "127.0.0.5") == 200


def test_a_handshake_that_never_ends_is_not_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert listening.HEADER_TIMEOUT_S <= 10
    monkeypatch.setattr(listening, "HEADER_TIMEOUT_S", 0.2)
    with serving(tmp_path) as served:
        for prepare in (silent, half_a_handshake):
            with opening(served, prepare) as opened:
                assert opened("127.0.0.1", 1)[0].recv(100) == b""
        _until(lambda: len(served.connections) == 0)


def test_an_answer_that_nobody_reads_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listening, "UNREAD_TIMEOUT_S", 0.2)
    with serving(tmp_path) as served, opening(served, a_handshake) as opened:
        large = served.blobs.put([bytes(1 << 20)] * 32)
        (secure,) = opened("127.0.0.1", 1)
        secure.sendall(_signed(served, f"/v1/blobs/{large.sha256}", "server"))
        assert secure.recv(100).startswith(b"HTTP/1.1 200 ")
        _until(lambda: len(served.connections) == 0)


def test_who_asks_on_without_waiting_for_answers_is_cut_off(tmp_path: Path) -> None:
    with serving(tmp_path) as served, opening(served, a_handshake) as opened:
        few, many = opened("127.0.0.1", 2)
        request = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n"
        few.sendall(request * listening.MOST_PIPELINED)
        answers = b""
        while answers.count(b"HTTP/1.1 200 ") < listening.MOST_PIPELINED:
            answers += few.recv(10_000)
        many.sendall(request * 300)
        _until(lambda: ended([many]))


# --- behind a proxy ---


def test_a_proxy_holds_as_many_as_there_are_and_who_is_behind_it_is_counted(tmp_path: Path) -> None:
    proxies = [ipaddress.ip_network("127.0.0.64/28")]
    limits = Limits(connections=24, connections_each=4, strangers_per_s=0.01, strangers_burst=2)
    with serving(tmp_path, "device-1", limits=limits, proxies=proxies) as served, opening(served) as opened:
        assert ended(opened("127.0.0.66", 20)) == []
        for behind in ("192.0.2.7", "192.0.2.8"):
            codes = [_stranger(served, "127.0.0.66", behind) for _ in range(3)]
            assert codes == ["unknown-client", "unknown-client", "rate"]
        assert [_stranger(served, "127.0.0.3", f"192.0.2.{number}") for number in range(3)][-1] == "rate", "it is no proxy"


def test_of_ipv6_a_whole_network_is_one_address() -> None:
    assert shared_address("2001:db8:1:2:3:4:5:6") == shared_address("2001:db8:1:2:f::1%eth0") != shared_address("2001:db8:1:3::1")
    assert shared_address("::ffff:192.0.2.7") == shared_address("192.0.2.7") != shared_address("192.0.2.8")
    assert shared_address("testclient") == "testclient"


# --- the book, and the process's files ---


@given(st.lists(st.tuples(st.sampled_from(["open", "busy", "idle", "gone"]), st.integers(0, 4), st.integers(0, 30))))
def test_the_book_keeps_its_bounds_whatever_comes(steps: Sequence[tuple[str, int, int]]) -> None:
    book, closed = Connections(6, 3, [ipaddress.ip_network("10.0.0.0/32")]), list[int]()
    made: dict[int, Any] = {}
    busy: set[int] = set()
    for number, (what, host, chosen) in enumerate(steps):
        known = sorted(set(made) - set(closed))
        if what == "open":
            made[number] = book.admit(f"10.0.0.{host}", lambda number=number: closed.append(number))  # type: ignore[misc]
            if made[number] is None:
                del made[number]
        elif known:
            one = known[chosen % len(known)]
            getattr(made[one], what)()
            (busy.add if what == "busy" else busy.discard)(one)
            if what == "gone":
                del made[one]
        held = [made[one].address for one in set(made) - set(closed)]
        assert len(book) == len(held) <= 6
        assert all(held.count(f"10.0.0.{each}") <= 3 for each in range(1, 5))
        assert not busy & set(closed)


@pytest.mark.parametrize(("bound", "says"), [("-Sn 400", ""), ("-n 400", "holds 72 connections at once and not 4096")])
def test_the_bound_on_open_files_is_raised_or_what_is_left_is_said(tmp_path: Path, bound: str, says: str) -> None:
    log = open_log(tmp_path / "deployment", create=True)
    provision(log, "device-1")
    log.close()
    command = f"ulimit {bound}; exec {sys.executable} -m fedloop_cli.main gateway {tmp_path / 'deployment'} --port 0 --json"
    with subprocess.Popen(["bash", "-c", command], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        port = int(process.stdout.readline().partition("http://127.0.0.1:")[2].partition('"')[0])
        with contextlib.ExitStack() as stack:
            for number in range(600):
                source = (f"127.0.0.{2 + number % 100}", 0)
                stack.enter_context(socket.create_connection(("127.0.0.1", port), 20, source_address=source))
            assert httpx.get(f"http://127.0.0.1:{port}/healthz", trust_env=False, timeout=20).status_code == 200
        process.terminate()
        printed = process.stderr.read()
        assert says in printed
        assert ("WARNING" in printed) is bool(says)
        assert process.wait(30) == 0


def ended(connections: Sequence[socket.socket]) -> list[socket.socket]:
    """Those of the connections that the gateway has ended."""
    found = []
    for each in connections:
        if select.select([each], [], [], 0)[0]:
            each.settimeout(0)
            try:
                while each.recv(4_000):
                    pass
                found.append(each)
            except (BlockingIOError, ssl.SSLWantReadError):
                pass
            except OSError:
                found.append(each)
    return found


def _client(served: Served, address: str) -> httpx.Client:
    tls = ssl.create_default_context(cafile=str(served.ca))
    return httpx.Client(transport=httpx.HTTPTransport(verify=tls, local_address=address), timeout=20)


def _status(served: Served, address: str) -> int:
    """What a device is answered that asks from this address."""
    request = httpx.Request("GET", f"{served.address}/v1/end")
    with _client(served, address) as client:
        return client.get(request.url, headers=served.raw.signature(request, "device-1", b"")).status_code


def _stranger(served: Served, address: str, behind: str) -> str:
    request = httpx.Request("GET", f"{served.address}/v1/end")
    headers = {**served.raw.signature(request, "stranger", b""), "x-forwarded-for": behind}
    with _client(served, address) as client:
        return code(client.get(request.url, headers=headers))


def _signed(served: Served, target: str, by: str = "device-1") -> bytes:
    request = httpx.Request("GET", f"{served.address}{target}")
    headers = {"host": request.headers["host"], **served.raw.signature(request, by, b"")}
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"GET {target} HTTP/1.1\r\n{lines}\r\n".encode()


def _until(condition: Callable[[], object], deadline_s: float = 20) -> None:
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.005)
