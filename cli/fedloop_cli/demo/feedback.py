"""The demo's feedback pipeline: `fedloop feedback run`, but it ends when its channel does, whatever became of the demo."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

from fedloop_events import locations
from fedloop_server.feedback import running


def main(directory: Path, channel: socket.socket) -> None:
    stop = threading.Event()

    def watch() -> None:
        channel.recv(1)
        stop.set()

    threading.Thread(target=watch, daemon=True).start()
    place = locations.locate(directory)
    running.run(directory, place, stop)
    running.run(directory, place, threading.Event(), until_idle=True)  # what was published last
