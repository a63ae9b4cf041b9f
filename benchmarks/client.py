"""The client of the rounds: it answers from the log, as a device does but without a store, what a trivial app makes of it."""

from __future__ import annotations

from fedloop_events import envelope, topics
from fedloop_events.blobs.reader import TensorReader
from fedloop_events.blobs.store import BlobStore
from fedloop_events.envelope import Record
from fedloop_events.flower.messages import Declined, new_context, run_number, serve_instruction
from fedloop_events.folds.identities import Identities
from fedloop_events.folds.reader import Reader
from fedloop_events.logs.port import START, EventLog
from fedloop_events.signatures import SigningKey
from fedloop_events.types import ClientEnrolled, InstructionSent, UpdateSubmitted
from fedloop_events.writer import EventWriter

from benchmarks.trivial import trivial_app


def serve(log: EventLog, blobs: BlobStore, number: int) -> None:
    """Enrol client `number`; answer each instruction to it that the server has signed, for ever."""
    writer, identities = EventWriter(log, SigningKey.generate()), Identities()
    people = Reader(log, identities)
    people.catch_up()
    client_id, node_id = f"client-{number}", 1000 + number
    enrolled = ClientEnrolled(
        origin=identities.origin,
        client_id=client_id,
        seq=0,
        public_key=writer.key.public_key,
        node_id=str(node_id),
        epsilon=None,
        delta=1e-5,
    )
    writer.append(enrolled)
    app, reader = trivial_app(), TensorReader(blobs)
    position, seq = START, 1

    def answer(record: Record, sent: InstructionSent) -> UpdateSubmitted:
        context = new_context(run_number(sent.origin, sent.run_id), node_id, {"partition-id": number})
        content = serve_instruction(app, record, sent, context, reader)
        assert not isinstance(content, Declined), content
        return UpdateSubmitted(
            origin=sent.origin, client_id=client_id, seq=seq, run_id=sent.run_id, instruction_id=record.id, content=content
        )

    while True:
        batch = log.read((topics.ROUNDS,), position, wait_s=0.1)
        position = batch.position
        for record in batch.records:
            if record.type == InstructionSent.type_name:
                sent = envelope.expect(record, InstructionSent)
                if sent.client_id == client_id:
                    identities.authenticate(record, sent)
                    writer.append(answer(record, sent))
                    seq += 1
