"""One device of the demo, and its user.

The device is the agent of `fedloop_clients`, through its public interface. What its user writes comes on a channel, so that it
stands in no file but the agent's own encrypted store; how far things are is sent there too. It ends when the channel does.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from difflib import SequenceMatcher
from pathlib import Path
from typing import TYPE_CHECKING, Final

import msgspec
from fedloop_events.errors import FedloopError
from fedloop_events.files import write_whole
from fedloop_tasks.task import Message
from msgspec import Struct

if TYPE_CHECKING:
    from fedloop_clients.agent import Agent
    from fedloop_privacy.masking import Masker

REPORT_EVERY: Final = 10
SUMMARY_S: Final = 10.0
MAX_TOKENS: Final = 24
"""Of an answer: what the demo's bank says is shorter."""
DISLIKES, CHOOSES = 4, 5
"""Of six users who know a better answer, those who do not say it."""
WAIT_TIMEOUT_S: Final = 300.0


class DeviceSettings(Struct, frozen=True):
    """Who this device is."""

    log: str
    blobs: str | None
    store: str
    client_id: str
    epsilon: float | None
    delta: float
    every: int = 1
    """Of a model that writes its answers, every which message is asked now: an answer takes a second. The others are of earlier
    conversations, which the user brings along."""


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


def main(terms: DeviceSettings, channel: socket.socket, masker: Masker) -> None:
    from fedloop_clients.agent import Agent
    from fedloop_clients.device import Settings

    with Agent.enrol(
        terms.log,
        terms.store,
        blobs=terms.blobs,
        client_id=terms.client_id,
        epsilon=terms.epsilon,
        delta=terms.delta,
        key_from="file",
        masker=masker,
        settings=Settings(remember=False, summary_s=SUMMARY_S),  # what the model answers is to be seen, not what it was told
    ) as agent:
        stop = threading.Event()
        runner = threading.Thread(target=_guarded, args=(lambda: agent.run(stop),), name="agent")
        runner.start()
        _guarded(lambda: DemoUser(agent, terms, channel).live())
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


class DemoUser:
    """Writes messages, reads the answers, and judges whether they are right."""

    def __init__(self, agent: Agent, terms: DeviceSettings, channel: socket.socket) -> None:
        self._agent, self._channel, self._every = agent, channel, terms.every
        self._count = Path(terms.store) / "given"
        """How many messages were written, over all the device's processes."""

    def live(self) -> None:
        _until(lambda: self._agent.status().release is not None)
        self._report(Progress(self._given()))
        with self._channel.makefile("rb") as lines:
            for line in lines:
                self._write(msgspec.json.decode(line, type=Wave))

    def _write(self, wave: Wave) -> None:
        given = self._given()
        for number, message in enumerate(wave.messages, wave.first):
            if number >= given:
                self._react(number, message)
                if (number + 1) % REPORT_EVERY == 0:
                    self._report(Progress(number + 1))
        _until(lambda: self._agent.status().settled)
        self._report(Progress(self._given(), wave.number, sum(self._agent.status().failed.values())))

    def _react(self, number: int, message: Message) -> None:
        from fedloop_clients.feedback import ConflictingFeedbackError

        with suppress(ConflictingFeedbackError):  # killed after it was recorded and before that was counted
            (self._converse if self._agent.task.speaks else self._check)(f"message-{number}", number, message)
        write_whole(self._count, str(number + 1).encode())

    def _check(self, feedback_id: str, number: int, message: Message) -> None:
        """Read one of a closed set of answers, and say the right one where it is another."""
        response = self._agent.predict(message.text)
        right = response.answer == message.answer
        self._agent.feedback(
            response.response_id,
            thumb="up" if right else None,
            feedback_id=feedback_id,
            **({} if right else self._agent.task.remark(message.answer)),
        )

    def _converse(self, feedback_id: str, number: int, message: Message) -> None:
        """Read an answer in words of the model's own. A user who knows a better one mostly gives it; every sixth gives a thumb
        down, every sixth asks again and chooses. What a file says of two answers, or of one, is done about these."""
        from fedloop_clients import importing

        asks, rest = divmod(number, self._every)
        if rest or message.rejected is not None or message.good is not None:
            response, what = importing.told(self._agent, message)
            self._agent.feedback(response.response_id, feedback_id=feedback_id, **what)
            return
        asked = importing.turns_to(message)
        response = self._agent.chat(asked, max_tokens=MAX_TOKENS)
        if response.text.strip() == message.answer:
            what = {"thumb": "up"}
        elif asks % 6 == DISLIKES:
            what = {"thumb": "down"}
        elif asks % 6 == CHOOSES:
            second = self._agent.chat(asked, max_tokens=MAX_TOKENS, temperature=1.0, seed=number)
            response, other = sorted((response, second), key=lambda each: _alike(each.text, message.answer), reverse=True)
            what = {"preferred_over": other.response_id} if response.text != other.text else {"thumb": "down"}
        else:
            what = self._agent.task.remark(message.answer)
        self._agent.feedback(response.response_id, feedback_id=feedback_id, **what)

    def _given(self) -> int:
        return int(self._count.read_text()) if self._count.exists() else 0

    def _report(self, progress: Progress) -> None:
        self._channel.sendall(msgspec.json.encode(progress) + b"\n")


def _until(done: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_TIMEOUT_S
    while not done() and time.monotonic() < deadline:
        time.sleep(0.1)


def _alike(found: str, wanted: str) -> float:
    return SequenceMatcher(None, found, wanted, autojunk=False).ratio()
