"""Requests that are replayed, late, changed, too many, too large or too slow."""

from __future__ import annotations

import hashlib
import socket
import ssl
import threading
import time
from pathlib import Path

import httpx
import msgspec
import pytest
import samples
from fedloop_events.logs.http import cloudevents, signing
from fedloop_events.logs.port import read_all
from fedloop_server.gateway import Limits
from fedloop_server.gateway.bodies import is_deeper
from fedloop_server.gateway.limits import Buckets, Nonces, Quota
from fedloop_server.gateway.listening import HEADER_TIMEOUT_S
from gateway import rounds
from gateway.harness import Served, code, serving

BATCH = {"content-type": cloudevents.BATCH_TYPE}


def feedback(number: int = 1, by: str = "device-1") -> bytes:
    return cloudevents.encode_batch([samples.signed(samples.feedback(number, by))])


# --- replay ---


def test_a_request_is_taken_once_and_an_honest_retry_counts_once(served: Served) -> None:
    body = feedback()
    request = httpx.Request("POST", f"{served.address}/v1/events")
    signed = {**served.raw.signature(request, "device-1", body), **BATCH}
    answers = [served.raw("POST", "/v1/events", None, body, headers=signed) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [204, 401, 401]
    assert code(answers[1]) == "replayed"
    assert served.raw("POST", "/v1/events", "device-1", body).status_code == 204
    assert len([record for record in read_all(served.log) if record.topic == "feedback"]) == 1


@pytest.mark.parametrize(("age_s", "expected"), [(-29, 200), (-40, 401), (55, 200), (70, 401), (10_000, 401)])
def test_a_request_is_good_for_a_minute(shared: Served, age_s: int, expected: int) -> None:
    answer = shared.raw("GET", "/v1/end", "device-1", age_s=age_s)
    assert answer.status_code == expected
    if expected == 401:
        assert code(answer) == "clock"


def test_nobody_can_say_that_a_request_is_good_for_longer(shared: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(signing, "VALID_S", 121)
    assert code(shared.raw("GET", "/v1/end", "device-1")) == "clock"
    monkeypatch.setattr(signing, "VALID_S", 0)
    assert code(shared.raw("GET", "/v1/end", "device-1")) == "clock"


def test_a_body_that_was_changed_is_refused_before_it_is_parsed(served: Served) -> None:
    assert code(served.raw("POST", "/v1/events", "device-1", b"\xff not JSON", signed_body=feedback())) == "digest"
    rounds.ask(served.log, "device-1")
    blob, before = b"a blob", served.log.end()
    name = hashlib.sha256(blob).hexdigest()
    assert code(served.raw("PUT", f"/v1/blobs/{name}", "device-1", b"b blob", signed_body=blob)) == "digest"
    assert code(served.raw("PUT", f"/v1/blobs/{name}", "device-1", b"b blob")) == "digest"
    assert served.blobs.size_bytes(name) is None
    assert served.log.end() == before


def test_the_key_of_another_is_not_mine(shared: Served) -> None:
    assert code(shared.raw("GET", "/v1/end", "device-1", key="device-2")) == "signature"
    assert code(shared.raw("GET", "/v1/end", "server", key="device-1")) == "signature"


def test_a_signature_for_one_request_is_none_for_another(shared: Served) -> None:
    request = httpx.Request("GET", f"{shared.address}/v1/events?limit=1")
    signed = shared.raw.signature(request, "device-1", b"")
    for method, target, host in (
        ("GET", "/v1/events?limit=2", None),
        ("GET", "/v1/end?limit=1", None),
        ("HEAD", "/v1/events?limit=1", None),
        ("GET", "/v1/events?limit=1", "elsewhere.example"),
    ):
        headers = signed if host is None else {**signed, "host": host}
        assert shared.raw(method, target, headers=headers).status_code in {401, 405}
    assert shared.raw("GET", "/v1/events?limit=1", headers=signed).status_code == 200


def test_two_signatures_or_two_lines_of_one_are_refused(shared: Served) -> None:
    request = httpx.Request("GET", f"{shared.address}/v1/end")
    signed = shared.raw.signature(request, "device-1", b"")
    both = [*signed.items(), ("signature", signed["signature"])]
    client = httpx.Client(verify=ssl.create_default_context(cafile=str(shared.ca)), trust_env=False)
    with client:
        assert code(client.get(f"{shared.address}/v1/end", headers=both)) == "malformed"


# --- what is too much ---


def test_too_much_of_anything_is_refused(tmp_path: Path) -> None:
    limits = Limits(body_bytes=20_000, batch_events=5, blob_bytes=5_000, depth=6, upload_bytes=9_000, target_bytes=500)
    with serving(tmp_path, "device-1", "device-2", limits=limits) as served:
        raw, before = served.raw, served.log.end()
        assert code(raw("POST", "/v1/events", "device-1", b"x" * 20_001)) == "too-large"
        assert code(raw.append("device-1", *[samples.signed(samples.seen("device-1", seq)) for seq in range(6)])) == "too-large"
        deep = msgspec.structs.replace(samples.event(samples.seen()), data=b'{"a":' + b"[" * 6 + b"]" * 6 + b"}")
        assert code(raw.append("device-1", deep)) == "too-large"
        assert code(raw("POST", "/v1/events", "device-1", b"[" * 19_000)) == "malformed"
        assert code(raw("GET", "/v1/events?topics=" + "x" * 500, "device-1")) == "uri-too-long"
        assert code(raw("GET", "/v1/end", "device-1", headers={"x-large": "x" * 9_000})) == "headers"
        assert code(raw("GET", "/v1/end", "device-1", headers={f"x-{number}": "x" * 90 for number in range(100)})) == "headers"
        assert served.log.end() == before
        for name in ("device-1", "device-1", "device-2"):
            rounds.ask(served.log, name)
        for number, expected in enumerate([204, 204, 429]):
            blob = bytes([number]) * 4_000
            answer = raw("PUT", f"/v1/blobs/{hashlib.sha256(blob).hexdigest()}", "device-1", blob)
            assert answer.status_code == expected
        assert code(answer) == "quota"
        assert 1 <= int(answer.headers["retry-after"]) <= 3600
        blob = b"x" * 5_001
        assert code(raw("PUT", f"/v1/blobs/{hashlib.sha256(blob).hexdigest()}", "device-2", blob)) == "too-large"


def test_an_event_that_is_too_large_is_refused(shared: Served) -> None:
    huge = msgspec.structs.replace(samples.event(samples.seen()), data=b'"' + b"x" * 62_000 + b'"')
    assert code(shared.raw.append("device-1", huge)) == "too-large"


def test_a_header_without_end_is_cut_off(shared: Served) -> None:
    with _connect(shared) as connection:
        connection.sendall(
            b"GET /v1/end HTTP/1.1\r\nhost: x\r\n" + b"x: " + b"y" * 20_000 + b"\r\n" + b"z: " + b"y" * 20_000 + b"\r\n\r\n"
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 431 ")
    with _connect(shared) as connection:
        connection.sendall(b"GET /" + b"y" * 40_000 + b" HTTP/1.1\r\n")
        assert connection.recv(100).startswith(b"HTTP/1.1 431 ")


def test_a_device_that_asks_too_often_is_told_when_to_come_again(tmp_path: Path) -> None:
    with serving(tmp_path, "device-1", "device-2", limits=Limits(requests_per_s=0.01, burst=3)) as served:
        answers = [served.raw("GET", "/v1/end", "device-1") for _ in range(4)]
        assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
        assert code(answers[-1]) == "rate"
        assert 90 <= int(answers[-1].headers["retry-after"]) <= 100
        assert served.raw("GET", "/v1/end", "device-2").status_code == 200
        assert served.raw("GET", "/v1/end", "server").status_code == 200


def test_a_flood_of_heartbeats_is_held_up_and_nothing_else_of_the_device(tmp_path: Path) -> None:
    limits = Limits(heartbeats_per_s=0.01, heartbeats_burst=3)
    with serving(tmp_path, "device-1", "device-2", limits=limits) as served:
        flood = [samples.signed(samples.seen("device-1", seq)) for seq in range(1, 5)]
        assert [served.raw.append("device-1", each).status_code for each in flood] == [204, 204, 204, 429]
        answer = served.raw.append("device-1", flood[3])
        assert code(answer) == "rate"
        assert 90 <= int(answer.headers["retry-after"]) <= 100
        assert served.raw.append("device-1", *flood[:3]).status_code == 204, "what is there already counts once"
        both = [samples.signed(samples.feedback(4)), samples.signed(samples.seen("device-1", 5))]
        assert code(served.raw.append("device-1", *both)) == "rate"
        assert served.raw.append("device-1", both[0]).status_code == 204
        assert served.raw.append("device-2", samples.signed(samples.seen("device-2", 1))).status_code == 204


def test_a_client_waits_for_as_long_as_it_is_told_to(tmp_path: Path) -> None:
    with serving(tmp_path, "device-1", limits=Limits(events_per_s=2, events_burst=2)) as served:
        log, begin = served.as_client("device-1"), time.monotonic()
        for first in (1, 3, 5):
            log.append([samples.signed(samples.feedback(first)), samples.signed(samples.feedback(first + 1))])
        assert time.monotonic() - begin >= 2
        assert len(log.read(("feedback",)).records) == 6


def test_requests_that_only_claim_to_be_of_a_device_cost_it_nothing(tmp_path: Path) -> None:
    with serving(tmp_path, "device-1", limits=Limits(requests_per_s=0.01, burst=2)) as served:
        for _ in range(5):
            assert code(served.raw("GET", "/v1/end", "device-1", key="thief")) == "signature"
        assert served.raw("GET", "/v1/end", "device-1").status_code == 200


def test_strangers_are_counted_by_address(tmp_path: Path) -> None:
    with serving(tmp_path, "device-1", limits=Limits(strangers_per_s=0.01, strangers_burst=2)) as served:
        codes = [code(served.raw("GET", "/v1/end", "stranger")) for _ in range(3)]
        assert codes == ["unknown-client", "unknown-client", "rate"]
        assert served.raw("GET", "/v1/end", "device-1").status_code == 200


def test_a_flood_of_nonces_is_refused_and_none_is_forgotten(tmp_path: Path) -> None:
    with serving(tmp_path, "device-1", limits=Limits(nonces=5)) as served:
        request = httpx.Request("GET", f"{served.address}/v1/end")
        first = served.raw.signature(request, "device-1", b"")
        assert served.raw("GET", "/v1/end", headers=first).status_code == 200
        codes = [served.raw("GET", "/v1/end", "device-1").status_code for _ in range(6)]
        assert codes == [200] * 4 + [429] * 2
        assert code(served.raw("GET", "/v1/end", headers=first)) == "replayed"


def test_only_so_many_requests_of_one_device_wait(tmp_path: Path) -> None:
    with serving(tmp_path, "device-1", "device-2", limits=Limits(polls=2)) as served:
        log = served.as_client("device-1")
        after = log.read().position
        position = cloudevents.encode_position(after)
        threads = [threading.Thread(target=log.read, kwargs={"after": after, "wait_s": 20}) for _ in range(2)]
        for thread in threads:
            thread.start()
        polls = served.app.state.gateway._polls
        _until(lambda: polls.get("device-1") == 2)
        assert code(served.raw("GET", f"/v1/events?wait_s=1&after={position}", "device-1")) == "polls"
        assert code(served.raw("GET", "/v1/events", "device-1", headers={"accept": "text/event-stream"})) == "polls"
        assert served.raw("GET", f"/v1/events?after={position}", "device-1").status_code == 200
        served.as_client("device-1").append([samples.signed(samples.feedback(1))])
        for thread in threads:
            thread.join(10)
        _until(lambda: not polls)


def test_a_body_that_comes_too_slowly_is_given_up(tmp_path: Path) -> None:
    with serving(tmp_path, "device-1", limits=Limits(body_timeout_s=0.3)) as served:
        body = feedback()
        request = httpx.Request("POST", f"{served.address}/v1/events")
        headers = {**served.raw.signature(request, "device-1", body), **BATCH, "host": request.headers["host"]}
        lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
        with _connect(served) as connection:
            connection.sendall(f"POST /v1/events HTTP/1.1\r\n{lines}content-length: {len(body)}\r\n\r\n".encode() + body[:10])
            assert connection.recv(100).startswith(b"HTTP/1.1 408 ")


def test_a_request_that_never_comes_is_not_waited_for(shared: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    from fedloop_server.gateway import listening as module

    assert HEADER_TIMEOUT_S < 30
    monkeypatch.setattr(module, "HEADER_TIMEOUT_S", 0.2)
    for start in (b"", b"GET /v1/end HTTP/1.1\r\nhost"):
        with _connect(shared) as connection:
            connection.sendall(start) if start else None
            assert connection.recv(100) == b""


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        ("?limit=0", "malformed"),
        ("?limit=x", "malformed"),
        ("?wait_s=-1", "malformed"),
        ("?wait_s=31", "malformed"),
        ("?wait_s=nan", "malformed"),
        ("?after=log", "malformed"),
        ("?after=log:-1", "malformed"),
        ("?after=log:99999999999999999999", "malformed"),
        ("?topics=secrets", "malformed"),
        ("?topics=", "malformed"),
        ("?other=1", "malformed"),
        ("?limit=1&limit=2", "malformed"),
        ("?%ff", "malformed"),
        ("?", ""),
        ("?after=", ""),
        ("?after=log:999999999999999999", ""),
        ("?after=unknown-stream:3", ""),
        ("?limit=100000", ""),
        ("?topics=rounds,rounds", ""),
    ],
)
def test_what_is_asked_for_must_make_sense(shared: Served, target: str, expected: str) -> None:
    answer = shared.raw("GET", f"/v1/events{target}", "device-1")
    assert (code(answer) if expected else answer.status_code) == (expected or 200)
    assert "secrets" not in answer.text


@pytest.mark.parametrize(
    "body",
    [b"", b"{}", b"[]", b"[1]", b"null", b'[{"id":"1"}]', b"\xff\xfe", b'[{"data":' + b"[" * 100_000, feedback() + b"x"],
)
def test_what_is_no_batch_is_refused(shared: Served, body: bytes) -> None:
    answer = shared.raw("POST", "/v1/events", "device-1", body, headers=BATCH)
    assert code(answer) in {"malformed", "too-large"}


@pytest.mark.parametrize("content_type", ["application/json", "application/cloudevents+json", "text/plain", None])
def test_events_come_as_a_batch_of_cloudevents(shared: Served, content_type: str | None) -> None:
    assert code(shared.raw("POST", "/v1/events", "device-1", feedback(), content_type=content_type)) == "media-type"


def test_a_get_takes_no_body(shared: Served) -> None:
    assert code(shared.raw("GET", "/v1/end", "device-1", b"x")) == "too-large"


def test_nothing_of_a_request_is_echoed(shared: Served) -> None:
    canary = "Wilhelmina"
    answers = [
        shared.raw("GET", f"/v1/{canary}", "device-1"),
        shared.raw("GET", f"/v1/events?{canary}=1", "device-1"),
        shared.raw("GET", "/v1/end", canary),
        shared.raw("POST", "/v1/events", "device-1", f'[{{"id":"{canary}"}}]'.encode()),
        shared.raw("GET", f"/v1/blobs/{canary}", "device-1"),
    ]
    for answer in answers:
        assert answer.status_code >= 400
        assert canary not in answer.text + str(answer.headers)


# --- streams ---


def test_server_sent_events_bring_what_is_there_and_what_comes(served: Served) -> None:
    log = served.as_client("device-1")
    request = httpx.Request("GET", f"{served.address}/v1/events?topics=feedback")
    headers = {**served.raw.signature(request, "device-1", b""), "accept": "text/event-stream"}
    log.append([samples.signed(samples.feedback(1))])
    tls = ssl.create_default_context(cafile=str(served.ca))
    with httpx.Client(verify=tls, trust_env=False) as client, client.stream("GET", str(request.url), headers=headers) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("id: log:")
        assert cloudevents.decode(next(lines).removeprefix("data: ").encode()).topic == "feedback"
        assert next(lines) == ""
        second = samples.signed(samples.feedback(2))
        log.append([second])
        assert next(lines).startswith("id: log:")
        assert cloudevents.decode(next(lines).removeprefix("data: ").encode()).id == second.id


# --- the books ---


def test_a_bucket_fills_again() -> None:
    buckets = Buckets(2.0, 3.0)
    assert [buckets.take("a", 0.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert buckets.take("b", 0.0) == 0.0
    assert buckets.take("a", 0.5) == 0.0
    assert [buckets.take("a", 100.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]


def test_more_than_a_bucket_holds_is_granted_when_it_is_full_and_then_owed() -> None:
    buckets = Buckets(2.0, 3.0)
    assert buckets.take("a", 0.0, 7) == 0.0
    assert buckets.take("a", 0.0) == 2.5
    assert buckets.take("a", 2.5) == 0.0
    assert buckets.take("a", 2.5, 100) == 1.5
    assert buckets.take("a", 4.0, 100) == 0.0


def test_a_quota_is_of_one_window() -> None:
    quota = Quota(10, 60.0)
    assert [quota.take("a", 6, 30.0), quota.take("a", 5, 30.0), quota.take("b", 5, 30.0)] == [0.0, 30.0, 0.0]
    assert quota.take("a", 5, 61.0) == 0.0


def test_nonces_are_kept_until_they_expire_and_no_longer() -> None:
    nonces = Nonces(2, 3)
    for name, nonce in (("a", "1"), ("a", "2"), ("b", "1")):
        assert not nonces.seen(name, nonce)
        nonces.add(name, nonce, 100)
    assert nonces.seen("a", "1")
    assert nonces.full("a", 100.9)
    assert nonces.full("b", 100.9)
    assert nonces.full("b", 100.9, bounded=False)
    assert not nonces.full("a", 101.0)
    assert len(nonces) == 0


@pytest.mark.parametrize(
    ("data", "deep"),
    [
        (b'{"a":[[[1]]]}', False),
        (b'{"a":[[[[1]]]]}', True),
        (b"[],[],[],[],[],[]", False),
        (b'["[[[[[[[", "\\"[[[[[["]', False),
        (b"[" * 60_000, True),
    ],
)
def test_depth_is_counted_outside_of_strings(data: bytes, deep: bool) -> None:
    assert is_deeper(data, 4) is deep


def _connect(served: Served) -> ssl.SSLSocket:
    tls = ssl.create_default_context(cafile=str(served.ca))
    return tls.wrap_socket(socket.create_connection(("127.0.0.1", served.port), 20), server_hostname="localhost")


def _until(condition: object, deadline_s: float = 10) -> None:
    assert callable(condition)
    end = time.monotonic() + deadline_s
    while not condition():
        assert time.monotonic() < end
        threading.Event().wait(0.005)
