"""The demo's server: `fedloop server run`, but it ends when its standard input does, whatever became of the demo."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from fedloop_events.envelope import Record
from fedloop_events.errors import FedloopError
from fedloop_events.types import Payload

from fedloop_cli import serving


def main(directory: Path) -> int:
    stop = threading.Event()

    def watch() -> None:
        sys.stdin.read()
        stop.set()

    threading.Thread(target=watch, daemon=True).start()
    try:
        serving.serve(directory, stop, on_event=_say)
    except FedloopError as error:
        print(f"error: {error.message}", file=sys.stderr, flush=True)
        return error.exit_status
    return 0


def _say(record: Record, payload: Payload) -> None:
    line = serving.describe(payload)
    if line:
        print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
