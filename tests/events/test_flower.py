"""Flower's records as contents of events, and a `ClientApp` served from one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fedloop_events.blobs.reader import TensorReader
from fedloop_events.blobs.store import BlobStore
from fedloop_events.errors import TensorError
from fedloop_events.flower.messages import new_context, pack_state, unpack_state
from fedloop_events.flower.records import (
    BlobArray,
    ContentError,
    ContentWriter,
    Unstored,
    content_sha256,
    from_content,
    to_content,
    view,
)
from fedloop_events.types import Content
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

names = st.text(st.characters(min_codepoint=33, max_codepoint=126), min_size=1, max_size=20)
arrays = hnp.arrays(
    st.sampled_from(["bool", "int8", "int64", "uint16", "float16", "float32", "float64"]),
    hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=4),
)
floats = st.floats(allow_nan=False, allow_infinity=False)
integers = st.integers(-(2**63), 2**63 - 1)


@pytest.fixture
def blobs(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tensors=st.dictionaries(names, arrays, max_size=4),
    metrics=st.dictionaries(names, floats | integers | st.lists(floats) | st.lists(integers), max_size=4),
    config=st.dictionaries(names, floats | integers | st.booleans() | st.text(max_size=9) | st.lists(st.text(max_size=9))),
)
def test_a_record_dict_survives_the_event(blobs: BlobStore, tensors: Any, metrics: Any, config: Any) -> None:
    record = RecordDict(
        {
            "arrays": ArrayRecord({name: Array(values) for name, values in tensors.items()}),
            "metrics": MetricRecord(metrics),
            "config": ConfigRecord(config),
        }
    )
    got = from_content(to_content(record, blobs), TensorReader(blobs))
    assert got["metrics"] == record["metrics"]
    assert got["config"] == record["config"]
    assert list(got.array_records["arrays"]) == list(tensors), "order is kept: Flower pairs arrays by it"
    for name, values in tensors.items():
        array = got.array_records["arrays"][name]
        assert (array.dtype, array.shape) == (str(values.dtype), values.shape)
        assert array.numpy().tobytes() == values.tobytes()
        assert Array(array.dtype, array.shape, array.stype, array.data).numpy().tobytes() == values.tobytes()


def test_each_numpy_call_gives_memory_of_the_callers_own(blobs: BlobStore) -> None:
    record = RecordDict({"arrays": ArrayRecord({"a": Array(np.zeros(3))})})
    array = from_content(to_content(record, blobs), TensorReader(blobs)).array_records["arrays"]["a"]
    array.numpy()[:] = 1
    assert not array.numpy().any()
    with pytest.raises(ValueError, match="read-only"):
        view(array)[:] = 1


def test_fortran_order_is_the_same_array(blobs: BlobStore) -> None:
    values = np.asfortranarray(np.arange(6.0).reshape(2, 3))
    record = RecordDict({"arrays": ArrayRecord({"a": Array(values)})})
    got = from_content(to_content(record, blobs), TensorReader(blobs))
    np.testing.assert_array_equal(got.array_records["arrays"]["a"].numpy(), values)


def test_the_same_arrays_are_written_once_and_a_changed_one_anew(blobs: BlobStore) -> None:
    writer, record = ContentWriter(blobs), RecordDict({"arrays": ArrayRecord({"a": Array(np.zeros(3))})})
    first = writer.content(record)
    assert writer.content(record) == first
    record.array_records["arrays"]["a"].data = Array(np.ones(3)).data
    assert writer.content(record) != first


def test_a_record_of_a_whole_blob_is_that_blob(blobs: BlobStore) -> None:
    record = RecordDict({"arrays": ArrayRecord({"a": Array(np.zeros(3)), "b": Array(np.ones(2))})})
    content = to_content(record, blobs)
    again = from_content(content, TensorReader(blobs))
    assert to_content(again, Unstored()) == content
    part = ArrayRecord()
    part["b"] = again.array_records["arrays"]["b"]
    assert isinstance(part["b"], BlobArray)
    assert to_content(RecordDict({"arrays": part}), blobs) != content


@pytest.mark.parametrize(
    "record",
    [
        MetricRecord({"loss": float("nan")}),
        MetricRecord({"losses": [0.0, float("inf")]}),
        ConfigRecord({"lr": float("-inf")}),
        ConfigRecord({"key": b"bytes"}),
    ],
)
def test_what_no_event_can_hold_is_an_error(blobs: BlobStore, record: MetricRecord | ConfigRecord) -> None:
    with pytest.raises(ContentError):
        to_content(RecordDict({"r": record}), blobs)


def test_arrays_that_are_not_numpys_are_an_error(blobs: BlobStore) -> None:
    for array in (Array("float32", (1,), "other", b"1234"), Array(np.ones(1, np.complex64))):
        with pytest.raises(TensorError):
            to_content(RecordDict({"arrays": ArrayRecord({"a": array})}), blobs)


def test_the_hash_of_a_decision_covers_type_destination_and_content() -> None:
    content = Content(configs={"config": {"lr": 0.1, "n": 1}})
    reordered = Content(configs={"config": {"n": 1, "lr": 0.1}})
    assert content_sha256("train", "c", content) == content_sha256("train", "c", reordered)
    others = {
        content_sha256("evaluate", "c", content),
        content_sha256("train", "d", content),
        content_sha256("train", "c", Content(configs={"config": {"lr": 0.2, "n": 1}})),
    }
    assert len(others | {content_sha256("train", "c", content)}) == 4


def test_a_contexts_state_survives_a_restart() -> None:
    context = new_context(1, 2, {"partition": 3})
    context.state["secret"] = ConfigRecord({"key": b"\x00\xff"})
    context.state["weights"] = ArrayRecord({"a": Array(np.arange(3))})
    other = new_context(1, 2)
    unpack_state(other, pack_state(context))
    assert other.state == context.state


def test_a_reader_keeps_what_fits_and_the_last_one(blobs: BlobStore) -> None:
    records = [RecordDict({"arrays": ArrayRecord({"a": Array(np.full(1000, i, np.float32))})}) for i in range(3)]
    refs = [to_content(record, blobs).arrays["arrays"] for record in records]
    reader = TensorReader(blobs, keep_bytes=refs[0].size_bytes)
    first, second = reader.tensors(refs[0]), reader.tensors(refs[1])
    assert reader.tensors(refs[1]) is second, "the last one is kept"
    reader.tensors(refs[2])
    assert reader.tensors(refs[0]) is first, "so is what fits"
    assert reader.tensors(refs[1]) is not second
