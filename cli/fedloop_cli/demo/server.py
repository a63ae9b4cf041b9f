"""The demo's server: `fedloop server run`, but it ends when its channel does, whatever became of the demo."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

from fedloop_events import locations
from fedloop_events.envelope import Record
from fedloop_events.types import Payload
from fedloop_server import serving

from fedloop_cli import documents


def main(directory: Path, channel: socket.socket) -> None:
    stop = threading.Event()

    def watch() -> None:
        channel.recv(1)
        stop.set()

    threading.Thread(target=watch, daemon=True).start()
    serving.serve(directory, locations.locate(directory), stop, on_event=_note)


def _note(record: Record, payload: Payload) -> None:
    line = documents.event_line(payload)
    if line:
        print(line, flush=True)
