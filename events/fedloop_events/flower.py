"""Flower's records and messages as events, for both sides: the server's Grid and the agent that serves a `ClientApp`.

All of Flower's private corners that Fedloop touches are here, as read in flwr 1.41.0: `supercore.run.Run` (in `Grid`'s
signature), `supercore.task_identity.TaskIdentity` (global to the process; `Message` raises without it), `common.constant`
(error codes, the server's node id, the name of the numpy serialisation), `common.serde` (a `RecordDict` as protobuf), and the
`metadata=` argument of `Message`, the only way to give a message its id.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any, Final, NamedTuple, Protocol

import msgspec
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Error, Message, Metadata, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode, SType
from flwr.common.serde import recorddict_from_proto, recorddict_to_proto
from flwr.proto.recorddict_pb2 import RecordDict as RecordDictProto
from flwr.supercore.run import Run as Run
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

from fedloop_events import tensors
from fedloop_events.blobs import BlobStore
from fedloop_events.envelope import Record
from fedloop_events.errors import FedloopError, TensorError
from fedloop_events.tensors import TensorSpec
from fedloop_events.types import BlobRef, Content, InstructionSent, Metric, RoundOpened, Scalar

ClientAppCallable = Callable[[Message, Context], Message]
TERMS: Final = "terms"
"""Name of the configuration record, and of its one key, that hold a round's terms in the message that a `ClientApp` gets."""
_NUMPY_DTYPES: Final = {"F16": "float16", "F32": "float32", "F64": "float64", "BOOL": "bool"} | {
    f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}


class ContentError(FedloopError):
    """A `RecordDict` that no event can hold: bytes, numbers that are not finite, arrays that are not numpy's."""


# --- arrays ----------------------------------------------------------------------------------------------------------


class TensorReader:
    """Reads tensor blobs, hash checked, each whole in one read.

    Keeps the last blob, and the first ones that fit into `keep_bytes` together: a strategy that goes through the replies again
    does not hash them again, and memory stays flat.
    """

    def __init__(self, blobs: BlobStore, *, keep_bytes: int = 64 << 20) -> None:
        self.blobs, self.keep_bytes = blobs, keep_bytes
        self._kept: dict[str, dict[str, NDArray[Any]]] = {}
        self._kept_bytes = 0
        self._last: tuple[str, dict[str, NDArray[Any]]] = ("", {})
        self._lock = threading.Lock()

    def tensors(self, ref: BlobRef) -> Mapping[str, NDArray[Any]]:
        """Read-only arrays by name, in the order of the blob. Raises BlobError or TensorError."""
        with self._lock:
            if (kept := self._kept.get(ref.sha256)) is not None:
                return kept
            if self._last[0] != ref.sha256:
                self._last = ("", {})  # let go of it before the next one is read
                arrays = tensors.decode(self.blobs.get(ref, max_bytes=ref.size_bytes))
                if self._kept_bytes + ref.size_bytes <= self.keep_bytes:
                    self._kept[ref.sha256] = arrays
                    self._kept_bytes += ref.size_bytes
                self._last = (ref.sha256, arrays)
            return self._last[1]

    def forget(self) -> None:
        """Let go of what is kept; what is asked for later is read again."""
        with self._lock:
            self._kept, self._kept_bytes, self._last = {}, 0, ("", {})


class BlobArray(Array):
    """One tensor of a blob, read when asked.

    As with Flower's own `Array`, each `numpy()` gives memory of the caller's own. `names` are all tensors of the blob `ref`.
    """

    def __init__(self, reader: TensorReader, ref: BlobRef, spec: TensorSpec, names: tuple[str, ...]) -> None:
        self.dtype, self.shape, self.stype = _NUMPY_DTYPES[spec.dtype], tuple(spec.shape), SType.NUMPY
        self.reader, self.ref, self.spec, self.names = reader, ref, spec, names

    @property
    def data(self) -> bytes:  # type: ignore[override]  # read-only here
        stream = BytesIO()
        np.save(stream, self.view(), allow_pickle=False)
        return stream.getvalue()

    def view(self) -> NDArray[Any]:
        """The tensor, read-only, without a copy."""
        return self.reader.tensors(self.ref)[self.spec.name]

    def numpy(self) -> NDArray[Any]:
        return self.view().copy()


def array_record(reader: TensorReader, ref: BlobRef, specs: Sequence[TensorSpec]) -> ArrayRecord:
    """The tensors of a blob as a record that reads them when asked."""
    record, names = ArrayRecord(), tuple(spec.name for spec in specs)
    for spec in specs:
        record[spec.name] = BlobArray(reader, ref, spec, names)
    return record


def view(array: Array) -> NDArray[Any]:
    """An array's values, read-only and without a copy where its serialisation allows it. Raises TensorError."""
    if isinstance(array, BlobArray):
        return array.view()
    if array.stype != SType.NUMPY:
        raise TensorError("an array is not serialised by numpy", hint="make it from a numpy array or a torch tensor")
    stream = BytesIO(array.data)
    if np.lib.format.read_magic(stream) != (1, 0):
        return array.numpy()
    shape, fortran_order, dtype = np.lib.format.read_array_header_1_0(stream)
    if dtype.hasobject:
        raise TensorError("an array holds Python objects")
    values = np.frombuffer(array.data, dtype, count=math.prod(shape), offset=stream.tell())
    return values.reshape(shape, order="F" if fortran_order else "C")


# --- records ---------------------------------------------------------------------------------------------------------


class Putter(Protocol):
    """Where the blobs of a content go."""

    def put(self, chunks: Iterable[bytes | memoryview]) -> BlobRef: ...


class Unstored:
    """Names blobs and stores none: for comparing with what was stored before."""

    def put(self, chunks: Iterable[bytes | memoryview]) -> BlobRef:
        digest, size = hashlib.sha256(), 0
        for chunk in chunks:
            digest.update(chunk)
            size += len(chunk)
        return BlobRef(digest.hexdigest(), size)


class ContentWriter:
    """Turns `RecordDict`s into contents; the arrays of consecutive ones that are the same objects are written once."""

    def __init__(self, blobs: Putter) -> None:
        self.blobs = blobs
        self.specs: dict[str, list[TensorSpec]] = {}
        """What the blobs written last hold, by hash."""
        self._written: tuple[list[object], BlobRef] | None = None

    def content(self, record: RecordDict) -> Content:
        """Raises ContentError or TensorError for what no event or blob can hold; UnreachableError from the blob store."""
        return Content(
            arrays={name: self._put(arrays) for name, arrays in record.array_records.items()},
            metrics={
                name: {key: _metric(value) for key, value in metrics.items()} for name, metrics in record.metric_records.items()
            },
            configs={
                name: {key: _setting(value) for key, value in config.items()} for name, config in record.config_records.items()
            },
        )

    def _put(self, arrays: ArrayRecord) -> BlobRef:
        # Bytes are immutable, so the same objects are the same values; holding them keeps their identities from being reused.
        identity: list[object] = []
        for name, array in arrays.items():
            identity += [name, array.ref if isinstance(array, BlobArray) else array.data]
        if self._written is not None and _same(self._written[0], identity):
            return self._written[1]
        parts = [array for array in arrays.values() if isinstance(array, BlobArray)]
        if (ref := _whole_blob(arrays, parts)) is not None:
            specs = [part.spec for part in parts]
        else:
            values = {name: np.asarray(view(array), order="C") for name, array in arrays.items()}
            ref, specs = self.blobs.put(tensors.encode(values)), tensors.specs(values)
        self._written, self.specs = (identity, ref), {**dict(list(self.specs.items())[-7:]), ref.sha256: specs}
        return ref


def to_content(record: RecordDict, blobs: Putter) -> Content:
    """A `RecordDict` as it stands in an event, its arrays in blobs. Raises as `ContentWriter.content` does."""
    return ContentWriter(blobs).content(record)


def from_content(content: Content, reader: TensorReader, specs: Mapping[str, Sequence[TensorSpec]] | None = None) -> RecordDict:
    """The `RecordDict` of a content; arrays are read when asked.

    `specs` says what each array record holds, for blobs that have been checked; without it each blob is read here, and
    BlobError or TensorError raised. The order of records of different kinds is not kept; no reader can rely on it.
    """
    record = RecordDict()
    for name, ref in content.arrays.items():
        record[name] = array_record(reader, ref, specs[name] if specs else tensors.specs(reader.tensors(ref)))
    for name, metrics in content.metrics.items():
        record[name] = MetricRecord(dict(metrics))
    for name, config in content.configs.items():
        record[name] = ConfigRecord(dict(config))  # type: ignore[arg-type]  # a list of scalars of one type, as it was written
    return record


def content_sha256(message_type: str, client_id: str, content: Content) -> str:
    """The hash of what a strategy decided for one client: no times, no ids."""
    decided = msgspec.json.encode([message_type, client_id, content], order="deterministic")
    return hashlib.sha256(decided).hexdigest()


def _same(left: Sequence[object], right: Sequence[object]) -> bool:
    pairs = zip(left, right, strict=False)
    return len(left) == len(right) and all(a is b or (isinstance(a, str | BlobRef) and a == b) for a, b in pairs)


def _whole_blob(arrays: ArrayRecord, parts: Sequence[BlobArray]) -> BlobRef | None:
    """The blob that holds exactly these arrays, by these names and in this order, if there is one."""
    names = tuple(arrays)
    if not parts or len(parts) != len(names) or tuple(part.spec.name for part in parts) != names:
        return None
    first = parts[0]
    return first.ref if all((part.ref, part.names) == (first.ref, names) for part in parts) else None


def _metric(value: object) -> Metric:
    if isinstance(value, list):
        return [_number(each) for each in value]
    return _number(value)


def _number(value: object) -> int | float:
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float) and math.isfinite(value):
        return float(value)
    raise ContentError("a metric is not finite", hint="leave it out of the metric record")


def _setting(value: object) -> Scalar | list[Scalar]:
    return [_scalar(each) for each in value] if isinstance(value, list) else _scalar(value)


def _scalar(value: object) -> Scalar:
    if isinstance(value, bool | str):
        return value
    if isinstance(value, int | float):
        return _number(value)
    raise ContentError("a configuration record holds bytes", hint="put them into an array of uint8")


# --- messages and runs -----------------------------------------------------------------------------------------------


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


# --- the client's side -----------------------------------------------------------------------------------------------


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
) -> Content | Declined:
    """Call any Flower `ClientApp` with a recorded instruction; its arrays go into the reader's blob store.

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
        return to_content(answer.content, reader.blobs)
    except (ContentError, TensorError) as error:
        return Declined("unusable-answer", type(error).__name__)


def terms_of(message: Message) -> RoundOpened | None:
    """The round's terms in the message that a `ClientApp` got, if it is one of a Fedloop round."""
    config = message.content.config_records.get(TERMS)
    return None if config is None else msgspec.json.decode(str(config[TERMS]), type=RoundOpened)
