"""What a round asks of its cohort, as Flower's messages."""

from __future__ import annotations

from fedloop_events.blobs.reader import TensorReader
from fedloop_events.blobs.store import BlobStore
from fedloop_events.blobs.tensors import specs
from fedloop_events.flower.records import array_record
from fedloop_events.types import RoundOpened
from flwr.app import Message, MessageType, RecordDict

from fedloop_server.flower.grid import LogGrid
from fedloop_server.flower.strategies import ARRAYS


def instructions(grid: LogGrid, opened: RoundOpened, blobs: BlobStore) -> list[Message]:
    """One message for each client of the cohort: to train on the base release, which it carries by the name of its blob.

    Agents take the terms from the `RoundOpened` that they have read in the log. Raises UsageError for a client that is not
    enrolled.
    """
    reader = TensorReader(blobs)
    base = array_record(reader, opened.base, specs(reader.tensors(opened.base)))
    content = RecordDict({ARRAYS: base})
    return [Message(content, grid.node_id(client_id), MessageType.TRAIN) for client_id in opened.cohort]
