"""Where each client stands: the number its next event must have, the end of its chain of spends, the instructions it was sent.

What a device appends must continue that. Several gateways may stand before one log, so what another one has just let pass may
slip through: the folds over the log refuse it then.
"""

from __future__ import annotations

import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from fedloop_events import types
from fedloop_events.envelope import Event
from fedloop_privacy.dp.ledger import spend_sha256

from fedloop_server.gateway.problems import Problem

RETRIED: Final = 2_000
"""How many of its newest events a client may send again: as many as one append holds."""
_INSTRUCTIONS: Final = 1_000_000

Pairs = Sequence[tuple[Event, types.ClientEvent]]


class _Client:
    """`due` is the number after the highest that has come; `recent` has a mark of each event's id before it, the newest last."""

    __slots__ = ("due", "last_spend", "recent", "spends")

    def __init__(self) -> None:
        self.due = 0
        self.recent = array("q")
        self.spends, self.last_spend = 0, ""

    def take(self, seq: int, mark: int) -> None:
        if seq - self.due >= RETRIED:
            self.recent = array("q", [mark])
            self.due = seq + 1
            return
        while self.due <= seq:  # streams of one log are read in no order
            self.recent.append(0)
            self.due += 1
        place = len(self.recent) - (self.due - seq)
        if place >= 0:
            self.recent[place] = self.recent[place] or mark
        if len(self.recent) > 2 * RETRIED:
            del self.recent[:-RETRIED]

    def has(self, seq: int, mark: int) -> bool:
        """Whether this event has come under this number."""
        place = len(self.recent) - (self.due - seq)
        return 0 <= place < len(self.recent) and self.recent[place] == mark


class Standing:
    """What the log has of every client. Its methods may be called in different threads."""

    def __init__(self) -> None:
        self._clients: dict[str, _Client] = {}
        self._instructions: OrderedDict[str, str] = OrderedDict()
        self._forgotten = False
        self._lock = threading.Lock()

    def __contains__(self, client_id: str) -> bool:
        return client_id in self._clients

    def instructed(self, event_id: str, client_id: str) -> None:
        """The server has sent an instruction to this client. The oldest give way: about answers to those the fold decides."""
        with self._lock:
            self._instructions[event_id] = client_id
            if len(self._instructions) > _INSTRUCTIONS:
                self._instructions.popitem(last=False)
                self._forgotten = True

    def has(self, client_id: str, seq: int, event_id: str) -> bool:
        """Whether this event has been taken in."""
        with self._lock:
            client = self._clients.get(client_id)
            return client is not None and client.has(seq, hash(event_id))

    def learn(self, client_id: str, seq: int, event_id: str) -> None:
        """An event stands in the log; whether it is authentic is for the caller to know."""
        with self._lock:
            self._clients.setdefault(client_id, _Client()).take(seq, hash(event_id))

    def spent(self, payload: types.BudgetSpent) -> None:
        """The same, for what a spend adds."""
        with self._lock:
            client = self._clients.setdefault(payload.client_id, _Client())
            if payload.spend_seq >= client.spends:
                client.spends, client.last_spend = payload.spend_seq + 1, spend_sha256(payload)

    def check(self, pairs: Pairs) -> None:
        """Raises `Problem` unless the events, all of one client, continue what the log has of it, or stand there already."""
        with self._lock:
            client = self._clients.get(pairs[0][1].client_id) or _Client()
            due, chain = client.due, (client.spends, client.last_spend)
            for number, (event, payload) in enumerate(pairs):
                if client.has(payload.seq, hash(event.id)):
                    continue  # it is sent again
                if payload.seq != due:
                    wrong = "is used already" if payload.seq < due else "leaves others out"
                    raise Problem("sequence", f"the sequence number of event {number} of the batch {wrong}: {due:,} is next")
                due += 1
                self._check_instruction(number, payload)
                if isinstance(payload, types.BudgetSpent):
                    if (payload.spend_seq, payload.previous) != chain:
                        raise Problem("sequence", f"event {number} of the batch does not continue the client's chain of spends")
                    chain = payload.spend_seq + 1, spend_sha256(payload)

    def _check_instruction(self, number: int, payload: types.ClientEvent) -> None:
        instruction_id: str | None = getattr(payload, "instruction_id", None)
        if instruction_id is None:
            return
        receiver = self._instructions.get(instruction_id)
        if receiver != payload.client_id and not (receiver is None and self._forgotten):
            raise Problem("instruction", f"event {number} of the batch answers an instruction that this client was never sent")
