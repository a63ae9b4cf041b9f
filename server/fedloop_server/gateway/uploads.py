"""What a device may send to the blob store: the tensors of its answers to what it was asked, and nothing else."""

from __future__ import annotations

import threading
from collections import OrderedDict, defaultdict
from typing import Final

from fedloop_events import types

from fedloop_server.gateway.limits import Limits
from fedloop_server.gateway.problems import Problem

_ROUNDS: Final = 10_000
_ANSWERED: Final = 100_000


class _Asked:
    """An instruction that is not answered: how large a blob may be, and which were sent for it."""

    __slots__ = ("max_bytes", "sent")

    def __init__(self, max_bytes: int) -> None:
        self.max_bytes = max_bytes
        self.sent: set[str] = set()


class Uploads:
    """The instructions that each device has not answered in the log yet. Its methods may be called in different threads.

    Each lets it send `uploads` blobs (a device that crashes before it has signed its answer trains once more), none larger than
    the round's terms allow; what belongs to no round has no terms but the gateway's own. It does not matter that a round has
    ended: a device that was away still has to send what its answer names. The newest `open_instructions` of a device count.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._max_bytes: OrderedDict[tuple[str, str], int] = OrderedDict()
        self._asked: defaultdict[str, OrderedDict[str, _Asked]] = defaultdict(OrderedDict)
        self._answered: OrderedDict[str, None] = OrderedDict()
        self._lock = threading.Lock()

    def opened(self, payload: types.RoundOpened) -> None:
        with self._lock:
            self._max_bytes[payload.run_id, payload.round_id] = min(payload.max_upload_bytes, self._limits.blob_bytes)
            if len(self._max_bytes) > _ROUNDS:
                self._max_bytes.popitem(last=False)

    def instructed(self, event_id: str, payload: types.InstructionSent) -> None:
        """The server has sent it. One for a round that was never opened asks for nothing."""
        with self._lock:
            asked, max_bytes = self._asked[payload.client_id], self._limits.blob_bytes
            if payload.round_id is not None:
                max_bytes = self._max_bytes.get((payload.run_id, payload.round_id), 0)
            if max_bytes and event_id not in self._answered and event_id not in asked:  # streams of one log are read in no order
                asked[event_id] = _Asked(max_bytes)
            if len(asked) > self._limits.open_instructions:
                asked.popitem(last=False)

    def answered(self, client_id: str, instruction_id: str) -> None:
        """The answer stands in the log; whether it is authentic is for the caller to know."""
        with self._lock:
            self._asked.get(client_id, OrderedDict()).pop(instruction_id, None)
            self._answered[instruction_id] = None
            if len(self._answered) > _ANSWERED:
                self._answered.popitem(last=False)

    def take(self, client_id: str, sha256: str, size_bytes: int) -> None:
        """Count a blob that the client is about to send; the same once more costs nothing. Raises `Problem`."""
        with self._lock:
            asked = list(self._asked.get(client_id, OrderedDict()).values())
            if not asked:
                raise Problem("not-asked", "a device sends blobs to answer instructions, and has answered all that it was sent")
            most = max(each.max_bytes for each in asked)
            if size_bytes > most:
                raise Problem("too-large", f"the instructions to this device ask for blobs of at most {most:,} bytes")
            if any(sha256 in each.sent for each in asked):
                return
            free = [each for each in asked if size_bytes <= each.max_bytes and len(each.sent) < self._limits.uploads]
            if not free:
                raise Problem("not-asked", f"a device sends at most {self._limits.uploads} blobs for one instruction")
            min(free, key=lambda each: each.max_bytes).sent.add(sha256)
