"""A network that can be cut: TCP from a port of its own to another one on this machine."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Final, Self

_CHUNK_BYTES: Final = 1 << 16
_ANSWER_S: Final = 10.0


class Proxy:
    """Forwards what comes to `port`. A context manager; safe to call from any thread."""

    def __init__(self, target: int) -> None:
        self.port = 0
        self.late_bytes = 0
        """What was held back until its sender had given up, and was delivered all the same."""
        self._target = target
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._writers: set[asyncio.StreamWriter] = set()
        self._pumps: set[asyncio.Task[None]] = set()
        self._refusing = False

    def __enter__(self) -> Self:
        self._thread.start()
        self._call(self._listen())
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._call(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def hold(self) -> None:
        """As a cut cable or a full switch: nothing passes, nothing is lost, nobody is told. `heal` delivers it late."""
        self._call(self._set(refusing=False, flowing=False))

    def refuse(self) -> None:
        """As a firewall that resets: connections end at once, what was under way is lost, new ones end when they begin."""
        self._call(self._set(refusing=True, flowing=True))

    def heal(self) -> None:
        self._call(self._set(refusing=False, flowing=True))

    def _call(self, coroutine: Coroutine[None, None, None]) -> None:
        asyncio.run_coroutine_threadsafe(coroutine, self._loop).result(_ANSWER_S)

    async def _listen(self) -> None:
        self._flowing = asyncio.Event()
        self._flowing.set()
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]

    async def _set(self, *, refusing: bool, flowing: bool) -> None:
        self._refusing = refusing
        if refusing:
            for writer in self._writers:
                writer.transport.abort()
        if flowing:
            self._flowing.set()
        else:
            self._flowing.clear()

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if self._refusing:
                raise ConnectionRefusedError
            far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self._target)
        except OSError:
            writer.transport.abort()
            return
        self._pump(reader, far_writer)
        self._pump(far_reader, writer)

    def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        # Read on while nothing may pass: what a sender has got rid of stays under way when it gives up.
        waiting: asyncio.Queue[bytes] = asyncio.Queue()
        for work in (self._take(reader, waiting), self._give(waiting, reader, writer)):
            task = self._loop.create_task(work)
            self._pumps.add(task)
            task.add_done_callback(self._pumps.discard)

    async def _take(self, reader: asyncio.StreamReader, waiting: asyncio.Queue[bytes]) -> None:
        data = b"-"
        while data:
            try:
                data = await reader.read(_CHUNK_BYTES)
            except OSError:
                data = b""
            waiting.put_nowait(data)

    async def _give(self, waiting: asyncio.Queue[bytes], reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await waiting.get():
                if not self._flowing.is_set():
                    await self._flowing.wait()
                    self.late_bytes += len(data) if reader.at_eof() else 0
                writer.write(data)
                await writer.drain()
        self._writers.discard(writer)
        writer.close()

    async def _close(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        pumps = list(self._pumps)
        for task in pumps:
            task.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)
