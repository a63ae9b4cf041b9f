"""The gateway: events from 64 devices against FastAPI answering an empty POST of the same size.

A request holds what an agent appends for one piece of feedback: the feedback, and the counts of what was masked in it.

Both are served by uvicorn, one process each, with the same TLS; the load comes from a third process, over 64 connections, and
its requests are signed before the clock starts.
"""

from __future__ import annotations

import asyncio
import hashlib
import multiprocessing
import socket
import ssl
import time
from collections.abc import Sequence
from contextlib import closing
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Final

import msgspec
from fastapi import FastAPI, Request, Response
from fedloop_events import envelope, ids, signatures, topics, types
from fedloop_events.blobs.store import BlobStore
from fedloop_events.locations import open_log
from fedloop_events.logs.http import cloudevents, signing
from fedloop_events.logs.port import read_all
from fedloop_events.masked import MaskedText
from fedloop_events.signatures import SigningKey

from benchmarks.harness import Pair, Row, in_turn, rates, scratch

DEVICES: Final = 64
EVENTS_EACH: Final = 2
"""Of one request."""
ORIGIN: Final = "bench"
_spawn = multiprocessing.get_context("spawn")
_Ports = tuple[int, int]


def rows(quick: bool) -> list[Row]:
    each, runs, warm = (3, 1, 1) if quick else (60, 7, 2)
    with scratch() as folder:
        keys = [SigningKey.generate() for _ in range(DEVICES)]
        _deploy(folder, keys)
        tls = _certificate(folder)
        ours, theirs = _Served(_gateway, folder, tls), _Served(_empty, folder, tls)
        with closing(ours), closing(theirs):
            bench = _Load(folder / "tls" / "ca.pem", [key.private_bytes() for key in keys])
            with closing(bench):
                measures = [lambda: bench.rate(ours.port, each), lambda: bench.rate(theirs.port, each)]
                pairs = [Pair(EVENTS_EACH * mine, peers) for mine, peers in in_turn(measures, runs=runs, warm=warm)]
        count = EVENTS_EACH * DEVICES * each * (runs + warm)
        held = _held(folder)
        assert held == count, f"{held} events of {count} are in the log"
    what = f"events through the gateway, {DEVICES} devices, two a request"
    return [rates(what, "FastAPI answering an empty POST of that size", pairs, "/s", 0.3)]


def _deploy(folder: Path, keys: Sequence[SigningKey]) -> None:
    log = open_log(folder / "deployment", create=True)
    server = SigningKey.generate()
    payloads: list[tuple[types.Payload, SigningKey]] = [(types.DeploymentCreated(ORIGIN, server.public_key), server)]
    payloads += [
        (types.ClientEnrolled(ORIGIN, f"device-{number}", 0, key.public_key, str(number + 1), 8.0, 1e-5), key)
        for number, key in enumerate(keys)
    ]
    log.append([signatures.sign(envelope.encode(payload, id=ids.new_id(), time_s=0), key) for payload, key in payloads])
    log.close()


def _held(folder: Path) -> int:
    log = open_log(folder / "deployment")
    with closing(log):
        return sum(1 for _ in read_all(log, (topics.FEEDBACK, topics.AUDIT)))


def _certificate(folder: Path) -> tuple[Path, Path]:
    from fedloop_cli.provisioning.certificates import make_ca

    issued = make_ca(folder / "tls").issue("bench", ["localhost"], folder / "tls")
    return issued.certificate, issued.key


# --- the two servers ---


class _Served:
    """A server in a process of its own."""

    def __init__(self, run: object, folder: Path, tls: tuple[Path, Path]) -> None:
        ours, theirs = _spawn.Pipe()
        self._process = _spawn.Process(target=run, args=(folder, tls, theirs), daemon=True)  # type: ignore[arg-type]
        self._process.start()
        self.port: int = ours.recv()

    def close(self) -> None:
        self._process.terminate()
        self._process.join(30)


def _gateway(folder: Path, tls: tuple[Path, Path], ready: Connection) -> None:
    from fedloop_server.gateway import Limits, create_app

    log, blobs = open_log(folder / "deployment"), BlobStore(folder / "deployment" / "blobs")
    _serve(create_app(log, blobs, limits=Limits(requests_per_s=1e6, burst=1e6, nonces=1_000_000)), tls, ready)


def _empty(folder: Path, tls: tuple[Path, Path], ready: Connection) -> None:
    app = FastAPI()

    @app.post("/v1/events")
    async def take(request: Request) -> Response:
        await request.body()
        return Response(status_code=204)

    _serve(app, tls, ready)


def _serve(app: object, tls: tuple[Path, Path], ready: Connection) -> None:
    import uvicorn
    from fedloop_server.gateway import listening as gateway_listening

    bound = gateway_listening.listen("127.0.0.1", 0)
    settings = gateway_listening.settings(tls)
    config = uvicorn.Config(app, **settings)  # type: ignore[arg-type]
    ready.send(bound.getsockname()[1])
    uvicorn.Server(config).run(sockets=[bound])


# --- the load ---


class _Load:
    """A process that sends what it has signed, and says how many requests a second were answered."""

    def __init__(self, ca: Path, keys: list[bytes]) -> None:
        self._pipe, theirs = _spawn.Pipe()
        self._process = _spawn.Process(target=_load, args=(ca, keys, theirs), daemon=True)
        self._process.start()

    def rate(self, port: int, each: int) -> float:
        self._pipe.send((port, each))
        answer: float = self._pipe.recv()
        return answer

    def close(self) -> None:
        self._pipe.send(None)
        self._process.join(30)


def _load(ca: Path, secrets: list[bytes], asked: Connection) -> None:
    keys = [SigningKey.from_private_bytes(secret) for secret in secrets]
    tls = ssl.create_default_context(cafile=str(ca))
    seq = 1
    while (job := asked.recv()) is not None:
        port, each = job
        requests = [
            [_request(port, f"device-{number}", key, seq + EVENTS_EACH * index) for index in range(each)]
            for number, key in enumerate(keys)
        ]
        seq += EVENTS_EACH * each
        asked.send(asyncio.run(_send(port, tls, requests)))


def _request(port: int, device: str, key: SigningKey, seq: int) -> bytes:
    """One piece of feedback, of about 2 KB, as one signed request."""
    text = msgspec.convert({"text": " ".join(["my card <CARD_1>"] * 18), "counts": {"CARD": 1}}, MaskedText)
    payload = types.FeedbackRecorded(
        ORIGIN, device, seq, f"f{seq}", f"r{seq}", "0001-0123456789ab", "default", text, predicted="card_arrival", thumb="up"
    )
    masked = types.TextMasked(ORIGIN, device, seq + 1, f"f{seq}", {"CARD": 18})
    events = [envelope.encode(each, id=ids.new_id(), time_s=1_800_000_000) for each in (payload, masked)]
    body = cloudevents.encode_batch([signatures.sign(each, key) for each in events])
    headers = {
        "host": f"localhost:{port}",
        "content-type": cloudevents.BATCH_TYPE,
        "content-length": str(len(body)),
        **signing.sign(
            "POST",
            f"localhost:{port}",
            "/v1/events",
            "",
            content_sha256=hashlib.sha256(body).digest(),
            client_id=device,
            key=key,
            now_s=int(time.time()),
        ),
    }
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"POST /v1/events HTTP/1.1\r\n{lines}\r\n".encode() + body


async def _send(port: int, tls: ssl.SSLContext, requests: Sequence[Sequence[bytes]]) -> float:
    """Each device's requests one after the other over a connection of its own; requests a second of all together."""
    connections = [await _connect(port, tls) for _ in requests]
    start = time.perf_counter()
    await asyncio.gather(*(_device(*pair, mine) for pair, mine in zip(connections, requests, strict=True)))
    taken_s = time.perf_counter() - start
    for _, writer in connections:
        writer.transport.abort()
    return sum(map(len, requests)) / taken_s


async def _connect(port: int, tls: ssl.SSLContext) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    for _ in range(100):
        try:
            return await asyncio.open_connection("127.0.0.1", port, ssl=tls, server_hostname="localhost", family=socket.AF_INET)
        except OSError:
            await asyncio.sleep(0.1)  # it listens only once its application has started
    raise TimeoutError("the server does not start")


async def _device(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, requests: Sequence[bytes]) -> None:
    for request in requests:
        writer.write(request)
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 204 "), answer
