"""Flower's records as contents of events: arrays in blobs, metrics and configuration in the event itself.

Flower's private corner that is touched here, as read in flwr 1.41.0: `common.constant.SType`, the name of the numpy
serialisation.
"""

from __future__ import annotations

import hashlib
import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from io import BytesIO
from typing import Any, Final, Protocol

import msgspec
import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.common.constant import SType
from numpy.typing import NDArray

from fedloop_events.blobs import tensors
from fedloop_events.blobs.reader import TensorReader
from fedloop_events.blobs.tensors import TensorSpec
from fedloop_events.errors import FedloopError, TensorError
from fedloop_events.types import BlobRef, Content, Metric, Scalar

_NUMPY_DTYPES: Final = {"F16": "float16", "F32": "float32", "F64": "float64", "BOOL": "bool"} | {
    f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("I", "int"), ("U", "uint")) for bits in (8, 16, 32, 64)
}


_one_header = threading.Lock()
"""numpy parses a header as Python, and CPython 3.11 counts the depths of two threads' parsing together: one of them can fail with
a SystemError (https://github.com/python/cpython/issues/106905)."""


class ContentError(FedloopError):
    """A `RecordDict` that no event can hold: bytes, numbers that are not finite, arrays that are not numpy's."""


# --- arrays ----------------------------------------------------------------------------------------------------------


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
    with _one_header:
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
