"""The demo's nursery: a process that has loaded what a device and a server need, once, and forks them: `python -m` this module,
with the name of the deployment's task.

Loading takes fifteen seconds of a core, so eight devices one by one would take minutes. It has a single thread and opens nothing
before it forks. Its standard input is a socket: each order comes with the channel of the new process, and is answered
with the process's id.
"""

from __future__ import annotations

import importlib
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Final, Literal, NoReturn

import msgspec
from fedloop_events.errors import FedloopError
from msgspec import Struct

if TYPE_CHECKING:
    from fedloop_privacy.masking import Masker

MAX_ORDER_BYTES: Final = 65_536
LOADED: Final = (
    "fedloop_clients.instructions",
    "fedloop_server.rounds.loop",
    "fedloop_privacy.dp.dpsgd",
    "opacus.accountants.analysis.prv",
    "scipy.optimize",
    "scipy.special",
)


class Order(Struct, frozen=True):
    """A process to start: what it is, its terms as JSON, and where it prints."""

    role: Literal["device", "feedback", "gateway", "server"]
    terms: str
    output: str
    errors: str


def main() -> None:
    control = socket.socket(fileno=0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the demo alone: it ends its processes in order
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # the kernel buries the dead; the demo sees their channels close
    masker = _preload(sys.argv[1])
    while True:
        data, channels, _, _ = socket.recv_fds(control, MAX_ORDER_BYTES, 1)
        if not data or not channels:
            return
        order = msgspec.json.decode(data, type=Order)
        process = os.fork()
        if process == 0:
            control.close()
            _become(order, channels[0], masker)
        os.close(channels[0])
        control.sendall(b"%d\n" % process)


def _preload(task_name: str) -> Masker:
    """Everything that a device or a server imports, also where its libraries do so late; and a masker, which is never changed."""
    from fedloop_privacy.masking import Masker
    from fedloop_tasks.table import task_named
    from fedloop_tasks.task import Material

    for name in LOADED:
        importlib.import_module(name)
    task = task_named(task_name)
    task.make(Material(["no", "yes"], [], {}), task.base_model, None, 0)
    masker = Masker()
    masker.mask("warm")
    return masker


def _become(order: Order, channel: int, masker: Masker) -> NoReturn:
    """The new process's life: it ends with it."""
    status = 1
    try:
        os.setsid()
        for path, descriptor in ((order.output, 1), (order.errors, 2)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600), descriptor)
        if order.role == "device":
            from fedloop_cli.demo import device

            terms = msgspec.json.decode(order.terms, type=device.DeviceSettings)
            device.main(terms, socket.socket(fileno=channel), masker)
        elif order.role == "gateway":
            from fedloop_cli.demo import gateway

            gateway.main(msgspec.json.decode(order.terms, type=gateway.GatewaySettings), socket.socket(fileno=channel))
        elif order.role == "feedback":
            from fedloop_cli.demo import feedback

            feedback.main(Path(order.terms), socket.socket(fileno=channel))
        else:
            from fedloop_cli.demo import server

            server.main(Path(order.terms), socket.socket(fileno=channel))
        status = 0
    except FedloopError as error:
        print(f"error: {error.message}", file=sys.stderr, flush=True)
    except BaseException as error:
        # The text of an error that is not ours may hold what a user wrote.
        print(f"error: an internal error ({type(error).__name__})", file=sys.stderr, flush=True)
        if os.environ.get("FEDLOOP_TRACEBACK"):
            traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    main()
