"""A device sends the blobs that an instruction to it asks for, and no other."""

from __future__ import annotations

import hashlib
import os
import socket
import ssl
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import samples
from fedloop_events import types
from fedloop_events.errors import UsageError
from fedloop_events.types import BlobRef
from fedloop_server.gateway import Limits
from gateway import rounds
from gateway.harness import Served, code, serving

MOST = rounds.opened().max_upload_bytes
LIMITS = Limits(blob_bytes=3 * MOST, open_instructions=3)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    with serving(tmp_path, "device-1", "device-2", limits=LIMITS) as served:
        yield served


def put(served: Served, content: bytes, by: str = "device-1") -> httpx.Response:
    return served.raw("PUT", f"/v1/blobs/{hashlib.sha256(content).hexdigest()}", by, content)


def answered(instruction_id: str, seq: int, client_id: str = "device-1", content: bytes | None = None) -> types.UpdateSubmitted:
    arrays = {} if content is None else {"arrays": BlobRef(hashlib.sha256(content).hexdigest(), len(content))}
    return types.UpdateSubmitted(samples.ORIGIN, client_id, seq, "main", instruction_id, types.Content(arrays=arrays))


def declined(instruction_id: str, seq: int) -> types.RoundDeclined:
    return types.RoundDeclined(samples.ORIGIN, "device-1", seq, "main", instruction_id, "no-app")


def test_what_nobody_asked_for_is_refused_before_it_is_sent(served: Served) -> None:
    content = bytes(MOST)
    request = httpx.Request("PUT", f"{served.address}/v1/blobs/{hashlib.sha256(content).hexdigest()}")
    lines = {"host": request.headers["host"], "content-length": str(MOST), **served.raw.signature(request, "device-1", content)}
    header = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    tls = ssl.create_default_context(cafile=str(served.ca))
    with tls.wrap_socket(socket.create_connection(("127.0.0.1", served.port), 20), server_hostname="localhost") as connection:
        connection.sendall(f"PUT {request.url.path} HTTP/1.1\r\n{header}\r\n".encode())
        assert connection.recv(100).startswith(b"HTTP/1.1 409 ")
    assert code(put(served, content)) == "not-asked"
    with pytest.raises(UsageError, match="a device sends blobs to answer instructions, and has answered all"):
        served.blobs_of("device-1").put([content])
    assert list(served.blobs.all()) == []


def test_a_blob_is_as_large_as_the_rounds_terms_allow(served: Served) -> None:
    rounds.ask(served.log, "device-1", "r0001")
    assert code(put(served, bytes(MOST + 1))) == "too-large"
    assert put(served, bytes(MOST)).status_code == 204
    assert code(put(served, bytes(MOST), "device-2")) == "not-asked", "it was not asked"


def test_what_belongs_to_no_round_has_the_gateways_own_bound(served: Served) -> None:
    rounds.ask(served.log, "device-1", "r0001")
    rounds.ask(served.log, "device-1")
    assert put(served, bytes(3 * MOST)).status_code == 204
    assert [put(served, bytes([number]) * (MOST + 1)).status_code for number in range(1, 4)] == [204, 409, 409]
    assert [put(served, bytes([number])).status_code for number in range(1, 4)] == [204, 204, 409], "those of the round"


def test_two_blobs_are_sent_for_an_instruction_and_each_of_them_again(served: Served) -> None:
    rounds.ask(served.log, "device-1", "r0001")
    assert [put(served, each).status_code for each in (b"one", b"one", b"two", b"one", b"two", b"three")] == [204] * 5 + [409]
    rounds.ask(served.log, "device-1", "r0002")
    assert put(served, b"three").status_code == 204


def test_an_answer_ends_it(served: Served) -> None:
    first, second = rounds.ask(served.log, "device-1", "r0001"), rounds.ask(served.log, "device-1", "r0002")
    assert put(served, b"one").status_code == 204
    assert served.raw.append("device-1", samples.signed(answered(first, 1, content=b"one"))).status_code == 204
    assert put(served, b"two").status_code == 204
    assert served.raw.append("device-1", samples.signed(declined(second, 2))).status_code == 204
    assert code(put(served, b"two")) == "not-asked"


def test_a_round_that_has_ended_still_takes_what_a_late_answer_names(served: Served) -> None:
    sent = rounds.ask(served.log, "device-1", "r0001")
    served.log.append([samples.signed(rounds.closed("device-2"))])
    assert put(served, b"late").status_code == 204
    assert served.raw.append("device-1", samples.signed(answered(sent, 1, content=b"late"))).status_code == 204


def test_of_many_that_were_never_answered_the_newest_count(served: Served) -> None:
    for number in range(10):
        rounds.ask(served.log, "device-1", f"r{number:04}")
    statuses = [put(served, bytes([number])).status_code for number in range(10)]
    assert statuses == [204] * 6 + [409] * 4


def test_an_event_makes_what_it_names_young_before_it_is_taken(served: Served, tmp_path: Path) -> None:
    sent = rounds.ask(served.log, "device-1", "r0001")
    assert put(served, b"one").status_code == 204
    name = hashlib.sha256(b"one").hexdigest()
    path = tmp_path / "blobs" / name[:2] / name[2:]
    os.utime(path, (1, 1))
    assert served.raw.append("device-1", samples.signed(answered(sent, 1, content=b"one"))).status_code == 204
    assert path.stat().st_mtime > 1


def test_a_gateway_that_starts_or_stands_beside_another_knows_what_is_asked(served: Served, tmp_path: Path) -> None:
    first, second = rounds.ask(served.log, "device-1", "r0001"), rounds.ask(served.log, "device-2", "r0001")
    assert put(served, b"one").status_code == 204
    assert served.raw.append("device-1", samples.signed(answered(first, 1, content=b"one"))).status_code == 204
    other = Served(served.log, served.blobs, tmp_path / "other", LIMITS)
    other.start()
    try:
        assert code(put(other, b"two")) == "not-asked"
        assert put(other, b"two", "device-2").status_code == 204
        assert other.raw.append("device-2", samples.signed(answered(second, 1, "device-2"))).status_code == 204
        assert served.as_client("device-2").read().records
        assert code(put(served, b"three", "device-2")) == "not-asked"
        rounds.ask(served.log, "device-1", "r0002")
        assert put(other, b"four").status_code == 204
    finally:
        other.stop()


def test_a_forged_instruction_or_one_of_no_round_asks_for_nothing(served: Served) -> None:
    served.log.append([samples.signed(samples.epoch()), samples.signed(rounds.opened("device-1"))])
    served.log.append([samples.signed(rounds.instruction("device-1"), by="device-1")])
    served.log.append([samples.signed(rounds.instruction("device-1", round_id="never-opened"))])
    assert code(put(served, b"one")) == "not-asked"


def test_the_server_sends_what_it_likes(served: Served) -> None:
    assert put(served, bytes(3 * MOST), "server").status_code == 204
