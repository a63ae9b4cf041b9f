"""One device of the demo, and its user: `python -m fedloop_cli.demo.device` with its terms as JSON.

The device is the agent of `fedloop_clients`, through its public interface. What its user writes comes on standard input, so that
it stands in no file but the agent's own encrypted store; how far things are goes to standard output. It ends when its input does.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from fedloop_events.errors import FedloopError
from msgspec import Struct

from fedloop_cli.demo.users import Message

if TYPE_CHECKING:
    from fedloop_clients.agent import Agent

REPORT_EVERY: Final = 10
WAIT_TIMEOUT_S: Final = 300.0


class Terms(Struct, frozen=True):
    """Who this device is."""

    deployment: str
    store: str
    client_id: str
    epsilon: float | None
    delta: float


class Wave(Struct, frozen=True):
    """Messages to write now; the first of them is the device's number `first`."""

    number: int
    first: int
    messages: list[Message]


class Progress(Struct, frozen=True):
    """`given` pieces of feedback so far; `wave` is the last one that is published wholly. `unmasked` cannot be published."""

    given: int
    wave: int = 0
    unmasked: int = 0


def main(terms: Terms) -> None:
    from fedloop_clients.agent import Agent

    with Agent.enrol(
        terms.deployment, terms.store, client_id=terms.client_id, epsilon=terms.epsilon, delta=terms.delta, key_from="file"
    ) as agent:
        stop = threading.Event()
        runner = threading.Thread(target=_guarded, args=(lambda: agent.run(stop),), name="agent")
        runner.start()
        _guarded(lambda: _listen(agent, Path(terms.store)))
        stop.set()
        runner.join()


def _guarded(work: Callable[[], None]) -> None:
    """End the process if `work` fails, whatever its other thread waits for: the demo starts it again."""
    try:
        work()
    except Exception as error:
        if os.environ.get("FEDLOOP_TRACEBACK"):
            traceback.print_exc()
        # The text of an error of ours holds nothing of a user's; another one's may.
        message = error.message if isinstance(error, FedloopError) else f"an internal error ({type(error).__name__})"
        print(f"error: {message}", file=sys.stderr, flush=True)
        os._exit(1)


def _listen(agent: Agent, store: Path) -> None:
    _until(lambda: agent.status().release is not None)
    _report(Progress(_given(store)))
    for line in sys.stdin:
        _write(agent, store, msgspec.json.decode(line, type=Wave))


def _write(agent: Agent, store: Path, wave: Wave) -> None:
    """The user writes, reads the answer, and says whether it is right."""
    from fedloop_clients.capture import ConflictingFeedbackError

    given = _given(store)
    for number, message in enumerate(wave.messages, wave.first):
        if number < given:
            continue
        response = agent.predict(message.text)
        right = response.label == message.label
        with suppress(ConflictingFeedbackError):  # killed after it was recorded and before that was counted
            agent.feedback(
                response.response_id,
                thumb="up" if right else None,
                label=None if right else message.label,
                feedback_id=f"message-{number}",
            )
        _count(store, number + 1)
        if (number + 1) % REPORT_EVERY == 0:
            _report(Progress(number + 1))
    _until(lambda: agent.status().settled)
    _report(Progress(_given(store), wave.number, sum(agent.status().failed.values())))


def _until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_TIMEOUT_S
    while not done() and time.monotonic() < deadline:
        time.sleep(0.1)


def _given(store: Path) -> int:
    """How many messages this device's user has written, over all its processes."""
    path = store / "given"
    return int(path.read_text()) if path.exists() else 0


def _count(store: Path, given: int) -> None:
    temporary = store / ".given"
    temporary.write_text(str(given))
    temporary.replace(store / "given")


def _report(progress: Progress) -> None:
    print(msgspec.json.encode(progress).decode(), flush=True)


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Terms))
