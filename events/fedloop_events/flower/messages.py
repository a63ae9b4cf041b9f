"""Flower's messages and runs as events, for both sides: the server's Grid and the agent that serves a `ClientApp`.

Flower's private corners that are touched here, as read in flwr 1.41.0: `supercore.run.Run` (in `Grid`'s signature),
`supercore.task_identity.TaskIdentity` (global to the process; `Message` raises without it), `common.constant` (error codes, the
server's node id), `common.serde` (a `RecordDict` as protobuf), and the `metadata=` argument of `Message`, the only way to give a
message its id.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from typing import Final, NamedTuple

import msgspec
from flwr.app import ConfigRecord, Context, Error, Message, Metadata, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.supercore.run import Run as Run
from flwr.supercore.task_identity import TaskIdentity

from fedloop_events.blobs.reader import TensorReader
from fedloop_events.envelope import Record
from fedloop_events.errors import TensorError
from fedloop_events.flower.records import ContentError, Putter, from_content, to_content
from fedloop_events.types import Content, InstructionSent, RoundOpened

ClientAppCallable = Callable[[Message, Context], Message]


TERMS: Final = "terms"
"""Name of the configuration record, and of its one key, that hold a round's terms in the message that a `ClientApp` gets."""


def run_number(origin: str, run_id: str) -> int:
    """Flower's number of a run: 63 bits of a hash of its name."""
    return int.from_bytes(hashlib.sha256(f"{origin}/{run_id}".encode()).digest()[:8], "big") >> 1


def new_run(number: int) -> Run:
    return Run.create_empty(number)


def identify_process(number: int) -> None:
    """Make messages that this process creates those of a server in the run; the last call holds for the whole process."""
    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = number, SUPERLINK_NODE_ID, 1


def instruction(content: RecordDict, record: Record, sent: InstructionSent, *, number: int, node_id: int) -> Message:
    """The message of a recorded instruction, as a `ClientApp` gets it; it was created when it was appended."""
    metadata = _metadata(sent, record.id, "", number, SUPERLINK_NODE_ID, node_id)
    metadata.created_at = record.appended_ms / 1000
    return _message(metadata, content=content)


def reply(
    content: RecordDict, sent: InstructionSent, reply_id: str, instruction_id: str, *, number: int, node_id: int
) -> Message:
    """The message of an accepted reply, as a strategy gets it."""
    return _message(_metadata(sent, reply_id, instruction_id, number, node_id, SUPERLINK_NODE_ID), content=content)


def error_reply(reason: str, sent: InstructionSent, instruction_id: str, *, number: int, node_id: int) -> Message:
    """What a strategy gets for a client that does not count."""
    code = ErrorCode.NODE_UNAVAILABLE if reason == "silent" else ErrorCode.CLIENT_APP_RAISED_EXCEPTION
    metadata = _metadata(sent, f"{instruction_id}-error", instruction_id, number, node_id, SUPERLINK_NODE_ID)
    return _message(metadata, error=Error(code, reason))


def _message(metadata: Metadata, **what: RecordDict | Error) -> Message:
    message: Message = Message(metadata=metadata, **what)  # type: ignore[call-overload]  # a form that is not public
    return message


def _metadata(sent: InstructionSent, message_id: str, reply_to: str, number: int, source: int, destination: int) -> Metadata:
    # No clock is read: what a message holds is a function of the log.
    return Metadata(
        run_id=number,
        message_id=message_id,
        src_node_id=source,
        dst_node_id=destination,
        reply_to_message_id=reply_to,
        group_id=sent.group_id,
        created_at=0.0,
        ttl=sent.ttl_s,
        message_type=sent.message_type,
        src_task_id=1,
        dst_task_id=1,
    )


class Declined(NamedTuple):
    """Why an instruction is not answered: a stable code, and a detail that holds nobody's words."""

    reason: str
    detail: str = ""


def new_context(number: int, node_id: int, node_config: Mapping[str, bool | float | int | str] | None = None) -> Context:
    """An empty context: one for each run and node, kept between instructions and persisted with each reply."""
    return Context(number, node_id, dict(node_config or {}), RecordDict(), {})


def pack_state(context: Context) -> bytes:
    """A context's state as bytes. Mods keep secrets there: it never leaves the device."""
    packed: bytes = recorddict_to_proto(context.state).SerializeToString(deterministic=True)
    return packed


def unpack_state(context: Context, state: bytes) -> None:
    """Put back what `pack_state` gave."""
    context.state = recorddict_from_proto(RecordDictProto.FromString(state))


def serve_instruction(
    app: ClientAppCallable,
    record: Record,
    sent: InstructionSent,
    context: Context,
    reader: TensorReader,
    *,
    terms: RoundOpened | None = None,
    blobs: Putter | None = None,
) -> Content | Declined:
    """Call any Flower `ClientApp` with a recorded instruction; its arrays go into `blobs`, or the reader's blob store.

    `context.state` may change and is to be persisted together with the answer. `terms` go into the message as configuration
    record `TERMS`. An exception of the app becomes a code with the exception's type, never its text. Raises BlobError or
    TensorError if the instruction's own blobs cannot be read, UnreachableError if the answer's cannot be stored.
    """
    content = from_content(sent.content, reader)
    if terms is not None:
        content[TERMS] = ConfigRecord({TERMS: msgspec.json.encode(terms).decode()})
    message = instruction(content, record, sent, number=context.run_id, node_id=context.node_id)
    try:
        answer = app(message, context)
    except Exception as error:
        return Declined("app-failed", type(error).__name__[:80])
    if answer.has_error():
        return Declined("app-error", f"code {answer.error.code}")
    try:
        return to_content(answer.content, blobs or reader.blobs)
    except (ContentError, TensorError) as error:
        return Declined("unusable-answer", type(error).__name__)
