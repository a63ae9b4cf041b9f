"""A simulated client: serves any Flower `ClientApp` from the log, with neither store nor ledger, to try strategies on."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from typing import TypedDict

from fedloop_events import topics
from fedloop_events.blobs.reader import TensorReader
from fedloop_events.blobs.store import BlobStore
from fedloop_events.envelope import Record
from fedloop_events.flower.messages import ClientAppCallable, Declined, new_context, run_number, serve_instruction
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.logs.port import EventLog
from fedloop_events.signatures import SigningKey
from fedloop_events.types import ClientEnrolled, InstructionSent, Payload, RoundDeclined, UpdateSubmitted
from fedloop_events.writer import EventWriter
from flwr.app import Context


class _About(TypedDict):
    origin: str
    client_id: str
    seq: int
    run_id: str
    instruction_id: str
    round_id: str | None


class SimulatedClient:
    """Client `client_id`, as node `node_id`, answers each instruction that the server of the latest epoch sends it, once.

    What it keeps (contexts, its sequence number) lives as long as the object. Rounds under differential privacy are for real
    agents: it spends nothing, so the server would refuse its updates.
    """

    topics = (topics.ROUNDS,)

    def __init__(
        self,
        log: EventLog,
        blobs: BlobStore,
        client_id: str,
        app: ClientAppCallable,
        *,
        node_id: int,
        node_config: Mapping[str, bool | float | int | str] | None = None,
        key: SigningKey | None = None,
    ) -> None:
        self.client_id, self.node_id = client_id, node_id
        self._blobs, self._app, self._node_config = blobs, app, node_config
        self._writer = EventWriter(log, key or SigningKey.generate())
        self._identities = Identities()
        self._who = Reader(log, self._identities)
        self._instructions = Reader(log, self, identities=self._who)
        self._contexts: dict[str, Context] = {}
        self._seq = 0

    def enrol(self) -> None:
        """Say who this is. Raises UnreachableError if the log is away."""
        self._who.catch_up()
        self._writer.append(
            ClientEnrolled(
                origin=self._identities.origin,
                client_id=self.client_id,
                seq=self._next_seq(),
                public_key=self._writer.key.public_key,
                node_id=str(self.node_id),
                epsilon=None,
                delta=1e-5,
            )
        )

    def run(self, stop: threading.Event) -> None:
        """Serve until `stop` is set."""
        while not stop.is_set():
            self.step(wait_s=0.1)

    def step(self, wait_s: float = 0.0) -> None:
        """Answer the instructions that are new, waiting up to `wait_s` for the first event."""
        self._instructions.wait(wait_s)

    def apply(self, record: Record, payload: Payload) -> None:
        if isinstance(payload, InstructionSent) and payload.client_id == self.client_id:
            self._answer(record, payload)

    def _answer(self, record: Record, sent: InstructionSent) -> None:
        number = run_number(sent.origin, sent.run_id)
        context = self._contexts.setdefault(sent.run_id, new_context(number, self.node_id, self._node_config))
        answer = serve_instruction(self._app, record, sent, context, TensorReader(self._blobs))
        about = _About(
            origin=sent.origin,
            client_id=self.client_id,
            seq=self._next_seq(),
            run_id=sent.run_id,
            instruction_id=record.id,
            round_id=sent.round_id,
        )
        if isinstance(answer, Declined):
            self._writer.append(RoundDeclined(**about, reason=answer.reason, detail=answer.detail))
        else:
            self._writer.append(UpdateSubmitted(**about, content=answer))

    def _next_seq(self) -> int:
        self._seq += 1
        return self._seq - 1
